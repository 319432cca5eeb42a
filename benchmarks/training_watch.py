"""What watching the router costs a training: `RoutingWatch` at intervals of 1, 10 and 100 steps, beside no watch.

A random OLMoE-shaped model takes whole steps (forward, backward, AdamW). Every row trains a model of its own, with the
same weights and batches. Each step is timed once for every row, in an order shuffled anew; a block is 100 steps,
so that each interval comes round at least once in it, and a row's ratio is its time over a block by the plain row's
over the same block. The plain row stands there twice, so that the second (A/A) shows the noise.

    python benchmarks/training_watch.py                    8 blocks of 100 steps of 4 x 128 tokens
    python benchmarks/training_watch.py --blocks 3 --tokens 64
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_interp as moe

PLAIN = "plain training step"
BLOCK = 100
Step = Callable[[int], object]


def olmoe() -> OlmoeForCausalLM:
    """Hidden 256, expert width 128, vocabulary 1,000, 4 layers, 64 experts, top-8; random."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1000, eos_token_id=1, hidden_size=256, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, num_experts=64, num_experts_per_tok=8,
    )  # fmt: skip
    hf = OlmoeForCausalLM(config).train()
    hf.set_experts_implementation("grouped_mm")
    return hf


def training(every: int | None, batches: list[torch.Tensor]) -> Step:
    """A model's training step by the number of the step; watched at an interval, or not at all."""
    hf = olmoe()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-4)

    def train(number: int) -> None:
        ids = batches[number % len(batches)]
        hf(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if every is None:
        return train
    watch = moe.RoutingWatch(hf, every=every, to=lambda step, values: None)

    def watched(number: int) -> None:
        with watch.step(number):
            train(number)

    return watched


def measure(rows: dict[str, Step], blocks: int) -> dict[str, list[float]]:
    """Seconds of every row in every step."""
    for step in rows.values():
        step(0)
    times: dict[str, list[float]] = {name: [] for name in rows}
    order = list(rows)
    for number in tqdm(range(blocks * BLOCK), desc="steps"):
        random.shuffle(order)
        for name in order:
            began = time.perf_counter()
            rows[name](number)
            times[name].append(time.perf_counter() - began)
    return times


def table(times: dict[str, list[float]]) -> str:
    """Medians over steps, and the ratio to the plain row over blocks with its quartiles, as a markdown table."""
    lines = ["| row | ms a step (median) | × plain over a block (median) | quartiles |", "|---|---:|---:|---|"]
    for name, seconds in times.items():
        ratios = [
            sum(seconds[start : start + BLOCK]) / sum(times[PLAIN][start : start + BLOCK])
            for start in range(0, len(seconds), BLOCK)
        ]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"| {name} | {1e3 * statistics.median(seconds):.1f} | {middle:.3f} | {low:.3f} – {high:.3f} |")
    return "\n".join(lines)


def by_kind(times: dict[str, list[float]], name: str, every: int) -> str:
    """Steps that are due and steps that are not, each by the plain row's time of the same step."""
    lines = [f"| steps of: {name} | × plain (median) | quartiles |", "|---|---:|---|"]
    for kind, due in (("due", True), ("not due", False)):
        ratios = [
            mine / plain
            for number, (mine, plain) in enumerate(zip(times[name], times[PLAIN], strict=True))
            if (number % every == 0) is due
        ]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"| {kind} ({len(ratios)}) | {middle:.3f} | {low:.3f} – {high:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="of each of the 4 texts of a batch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    drawn = torch.Generator().manual_seed(0)
    batches = [torch.randint(1000, (4, options.tokens), generator=drawn) for _ in range(8)]
    rows = {PLAIN: training(None, batches), "the same again (A/A)": training(None, batches)}
    rows |= {f"watched every {every} steps": training(every, batches) for every in (100, 10)}
    rows["watched at every step"] = training(1, batches)
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.blocks} blocks\n")
    times = measure(rows, options.blocks)
    print(table(times), "\n")
    print(by_kind(times, "watched every 10 steps", 10))


if __name__ == "__main__":
    main()
