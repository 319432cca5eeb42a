"""What it costs to know what every expert is worth: estimated by a gradient, and exactly.

On the reference model and prompts of one length from the bundled sample. Costs are in plain forward passes of the same
prompts by transformers alone, of the same round; that pass stands there twice, so that the second (A/A) shows the
noise. The exact sweep is given in plain forwards *per expert*: 1 is what a run of the whole model for each would cost.

    python benchmarks/attribution.py                       32 prompts of 32 tokens, seven rounds, three sweeps
    python benchmarks/attribution.py --rounds 3 --sweeps 1
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

import moe_interp as moe
from moe_interp.analyses.attribution_patching import estimates

PLAIN = "plain transformers (grouped_mm)"


def prompts(model: moe.MoEModel, count: int, length: int) -> tuple[Tensor, Tensor]:
    """The first tokens of documents of the sample, of all domains in turn, and as many others."""
    ids = [model.tokenizer(text)["input_ids"] for text in moe.sample().texts]
    long = [row[:length] for row in ids if len(row) >= length]
    step = max(1, len(long) // (2 * count))
    chosen = torch.tensor(long[::step][: 2 * count])
    return chosen[::2], chosen[1::2]


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def plain(model: moe.MoEModel, ids: Tensor) -> float:
    """Seconds of transformers' own forward pass."""
    with model.plain(), torch.no_grad():
        return seconds(lambda: model.hf(input_ids=ids, use_cache=False).logits)


def estimated(model: moe.MoEModel, ids: Tensor, other: Tensor, rounds: int) -> dict[str, list[float]]:
    """Plain forwards that each kind of estimate costs, round by round."""
    call = partial(estimates, model, ids, metric="nll", layers=model.layers)
    steps: dict[str, Callable[[], object]] = {
        "ablation of every expert": partial(call, None),
        "and of every neuron": partial(call, None, neurons=True),
        "ablation, gradient at two steps": partial(call, None, steps=2),
        "towards corrupted prompts": partial(call, other),
    }
    found: dict[str, list[float]] = {"the same again (A/A)": [], **{name: [] for name in steps}}
    for _ in tqdm(range(rounds), desc="rounds"):
        whole = plain(model, ids)
        found["the same again (A/A)"].append(plain(model, ids) / whole)
        for name, step in steps.items():
            found[name].append(seconds(step) / whole)
    return found


def swept(model: moe.MoEModel, ids: Tensor, sweeps: int) -> tuple[list[float], np.ndarray]:
    """Plain forwards for each expert that an exact sweep costs, sweep by sweep, and the effects."""
    experts, costs = len(model.layers) * model.spec.num_experts, []
    for _ in range(sweeps):
        began = time.perf_counter()
        found = moe.expert_effects(model, ids)
        took = time.perf_counter() - began
        costs.append(took / statistics.median(plain(model, ids) for _ in range(5)) / experts)
    return costs, found.effect_mean.values


def row(name: str, costs: list[float]) -> str:
    """A row of the table: median and range."""
    return f"| {name} | {statistics.median(costs):.2f} | {min(costs):.2f} – {max(costs):.2f} |"


def main() -> None:
    """Print the table and what else is measured, as markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rounds", 7), ("sweeps", 3), ("prompts", 32), ("tokens", 32), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = moe.load()
    ids, other = prompts(model, options.prompts, options.tokens)
    plain(model, ids)
    costs = estimated(model, ids, other, options.rounds)
    exact_costs, exact = swept(model, ids, options.sweeps)
    print(
        f"{platform.machine()}, {options.threads} thread, torch {torch.__version__}, {len(ids)} x {ids.shape[1]} tokens"
    )
    print("\n| | plain forwards (median) | range |\n|---|---:|---:|")
    for name, some in costs.items():
        print(row(name, some))
    print(row(f"exact sweep, for each of {exact.size} experts", exact_costs))
    print("\n| rank correlation with the exact effect, all experts | |\n|---|---:|")
    for steps in (1, 2, 4):
        found = estimates(model, ids, None, "nll", model.layers, steps).experts.mean(dim=2).numpy()
        print(
            f"| gradient at {steps} step{'s' * (steps > 1)} | {spearmanr(found.ravel(), exact.ravel()).statistic:.2f} |"
        )
    errors = [float(np.abs(moe.logit_attribution(model, one, [5, 50]).remainder).max()) for one in ids]
    print(f"\nDirect logit attribution: parts sum to the logit up to {max(errors):.1e}.")


if __name__ == "__main__":
    main()
