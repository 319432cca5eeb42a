"""What the expert lens costs: rows (tokens x parts) decoded a second, as a share of the bare product.

A random OLMoE-shaped model: hidden 512, top-8, so 34 parts a token. The bare product is ``rows @ W_U.T`` on the
same rows, 1,024 at a time, with nothing kept; it stands there twice, so that the second (A/A) shows the noise.
Each round times all steps once, in an order that is shuffled anew; a share is that of one round.

    python benchmarks/lens.py                          vocabularies of 1,000 and 50,304
    python benchmarks/lens.py --threads 1 --rounds 21

Memory is what the process gains at its peak during a step (Linux only).
"""

import argparse
import ctypes
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_interp as moe
from moe_interp.analyses.decoding import CHUNK, decode_top
from moe_interp.analyses.lens import expert_lens, part_terms

BARE = "bare product"
CHUNKS = (64, 256, 512, 1024, 2048)
SLOTS = 8
Step = Callable[[], object]


def olmoe(vocabulary: int) -> moe.MoEModel:
    """Two layers are enough: decoding does not depend on them."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=vocabulary, eos_token_id=1, hidden_size=512, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8, num_experts=64, num_experts_per_tok=SLOTS,
    )  # fmt: skip
    return moe.wrap(OlmoeForCausalLM(config).eval())


def steps_for(model: moe.MoEModel, positions: int) -> tuple[dict[str, Step], dict[str, int]]:
    """What is timed, and how many rows each of them decodes."""
    parts = len(part_terms(SLOTS, shared=False))
    rows = torch.randn(positions, parts, model.spec.d_model)
    targets = torch.randint(model.spec.vocab_size, (positions,))
    final = model.decode(rows[:, -1]).log_softmax(-1)
    weight = model.hf.get_output_embeddings().weight

    def bare() -> None:
        for some in rows.flatten(0, 1).split(CHUNK):
            functional.linear(some, weight)

    def norm_and_product() -> None:
        for some in rows.flatten(0, 1).split(CHUNK):
            model.decode(some)

    def decode(chunk: int) -> Step:
        return lambda: decode_top(model.decode, rows, final, targets, chunk=chunk)

    steps: dict[str, Step] = {
        BARE: bare,
        "the same again (A/A)": bare,
        "final norm and product": norm_and_product,
    }
    steps |= {f"decode_top, chunk {chunk}" + " (default)" * (chunk == CHUNK): decode(chunk) for chunk in CHUNKS}
    steps["expert_lens, forward pass and all"] = lambda: expert_lens(model, targets)
    counts = dict.fromkeys(steps, positions * parts)
    return steps, counts | {"expert_lens, forward pass and all": 2 * positions * parts}


@torch.no_grad()
def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in tqdm(range(rounds), desc="rounds"):
        random.shuffle(order)
        for name in order:
            began = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - began)
    return times


@torch.no_grad()
def peak_mib(step: Step) -> float:
    """Memory that the process gains at its peak during a step; NaN where the system does not tell."""
    step()  # what stays allocated afterwards, threads and tables, is no part of the peak
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return math.nan
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def memory(field: str) -> float:
    """A line of the kernel's account of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def table(times: dict[str, list[float]], counts: dict[str, int], peaks: dict[str, float]) -> str:
    """Rows a second, and the share of the bare product in the same round with its quartiles, as markdown."""
    head = "| step | tokens·parts / s (median) | share of the bare product (median) | quartiles | peak MiB |"
    lines = [head, "|---|---:|---:|---|---:|"]
    for name, seconds in times.items():
        rate = counts[name] / statistics.median(seconds)
        shares = [
            (counts[name] / mine) / (counts[BARE] / bare) for mine, bare in zip(seconds, times[BARE], strict=True)
        ]
        low, middle, high = statistics.quantiles(shares, n=4)
        peak = "–" if math.isnan(peaks[name]) else f"{peaks[name]:.0f}"
        lines.append(f"| {name} | {rate:,.0f} | {middle:.2f} | {low:.2f} – {high:.2f} | {peak} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table for each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds")
    for vocabulary, positions in ((1_000, 256), (50_304, 32)):
        with olmoe(vocabulary) as model:
            steps, counts = steps_for(model, positions)
            peaks = {name: peak_mib(step) for name, step in steps.items()}
            times = measure(steps, options.rounds)
        rows, whole = counts[BARE], counts[BARE] * vocabulary * 4 / 2**20
        print(f"\n### Vocabulary {vocabulary:,}: {rows:,} rows, whose logits would take {whole:,.0f} MiB\n")
        print(table(times, counts, peaks))


if __name__ == "__main__":
    main()
