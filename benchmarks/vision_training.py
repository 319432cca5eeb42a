"""What a training step of the vision mixture costs: launched kernel by kernel, and on a GPU recorded as one graph.

On random pictures of CIFAR-10's size. Milliseconds a step by model and precision, median and quartiles over rounds, and
the mean loss over all steps of a round, which must not depend on how the kernels get to the GPU.

    python benchmarks/vision_training.py                          on a GPU: the full study's models
    python benchmarks/vision_training.py --width 16 --rounds 3    narrow ones, for a CPU
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moe_interp.zoo import vision
from moe_interp.zoo.vision import Plan, VisionMoE

WARM = 20  # steps of a round that are not timed: the graph is recorded before the first


def one_round(plan: Plan, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Milliseconds a step, and the mean cross-entropy over the round."""
    steps = vision.steps_per_epoch(len(images), plan)
    times: list[float] = []

    def done() -> None:
        times.append(0.0)
        if len(times) in (WARM, steps):
            if images.is_cuda:
                torch.cuda.synchronize()
            times[-1] = time.perf_counter()

    hf = VisionMoE(3, 32, 10, plan).to(images.device)
    hf.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss = vision.train(hf, images, labels, plan, done)["loss"]
    return 1e3 * (times[steps - 1] - times[WARM - 1]) / (steps - WARM), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128, help="filters of the first convolution")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    base = Plan(width=options.width, neurons=4 * options.width, epochs=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.steps * base.batch, 3, 32, 32, generator=generator).to(options.device)
    labels = torch.randint(10, (len(images),), generator=generator).to(options.device)
    recorded = vision._recorded
    ways = {"launched": lambda step, batch: step} | ({"recorded": recorded} if images.is_cuda else {})
    print("| model | precision | kernels | ms a step (median) | quartiles | loss |\n|---|---|---|---:|---|---:|")
    for name, plan in (("base, 2 experts", base), ("base, 5 experts", replace(base, experts=5)),
                       ("short, 3 experts", replace(base, experts=3, depth="short"))):  # fmt: skip
        for precision in ("float32", "bfloat16"):
            for way, record in ways.items():
                vision._recorded = record
                rounds = [one_round(replace(plan, precision=precision), images, labels) for _ in range(options.rounds)]
                low, middle, high = np.quantile([ms for ms, _ in rounds], (0.25, 0.5, 0.75))
                print(
                    f"| {name} | {precision} | {way} | {middle:.2f} | {low:.2f} – {high:.2f} | {rounds[0][1]:.4f} |",
                    flush=True,
                )
    vision._recorded = recorded


if __name__ == "__main__":
    main()
