"""What seeing everything costs, as a share of the plain forward pass.

A random OLMoE-shaped model; every row is measured in the same run, interleaved: each round times all rows once, in an
order that is shuffled anew, and a row's figure is the median over rounds of its time by the plain time of that round.
The plain forward stands there twice, so that the second (A/A) shows the noise.

    python benchmarks/overhead.py --rounds 30 --threads 2
    python benchmarks/overhead.py --only reads      8 x 128 tokens; step: one decoding step
    python benchmarks/overhead.py --only doors      the same through nnsight and TransformerLens
    python benchmarks/overhead.py --only edits      what interventions cost, or save
    python benchmarks/overhead.py --only logits     what is saved where nobody wants logits
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import nnsight
import torch
from nnsight import NNsight
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_interp as moe
from moe_interp.adapters import describe
from moe_interp.hosts.hooked import trace_points
from moe_interp.hosts.stock import reached, stock_points
from moe_interp.hosts.traces import TracePoints

PLAIN = "plain transformers (grouped_mm)"
Step = Callable[[], object]


def olmoe(vocabulary: int = 1000) -> OlmoeForCausalLM:
    """Hidden 512, expert width 256, 8 layers, 64 experts, top-8; random."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=vocabulary, eos_token_id=1, hidden_size=512, intermediate_size=256, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False,
    )  # fmt: skip
    hf = OlmoeForCausalLM(config).eval()
    hf.set_experts_implementation("grouped_mm")
    return hf


def plain(hf: OlmoeForCausalLM, inputs: dict[str, object]) -> Step:
    """The model as transformers runs it."""

    def step() -> object:
        with torch.no_grad():
            return hf(**inputs).logits

    return step


def local(model: moe.MoEModel, read: list[str]) -> Callable[[dict[str, object]], Step]:
    """An instrumented run that reads these points at all layers."""
    return lambda inputs: lambda: model.run(inputs, read=read)


def traced(points: TracePoints, lm: NNsight, names: list[str]) -> Callable[[dict[str, object]], Step]:
    """An nnsight trace that saves these points at all layers."""

    def bind(inputs: dict[str, object]) -> Step:
        def step() -> object:
            with torch.no_grad(), lm.trace(**inputs):
                saved = nnsight.save([])
                for layer in points.layers:
                    saved.append([getattr(layer, name).clone() for name in names])
            return saved

        return step

    return bind


def bridge_of(hf: OlmoeForCausalLM) -> Any:
    """A TransformerLens bridge."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)


def cached(bridge: Any, names: Callable[[str], bool] | None = None) -> Callable[[dict[str, object]], Step]:
    """A pass of a bridge that caches the hooks of these names (None: all that TransformerLens has)."""

    def bind(inputs: dict[str, object]) -> Step:
        def step() -> object:
            with torch.no_grad():
                return bridge.run_with_cache(inputs["input_ids"], names_filter=names)

        return step

    return bind


def measure(rows: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every row in every round."""
    for step in rows.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in rows}
    order = list(rows)
    for _ in tqdm(range(rounds), desc="rounds"):
        random.shuffle(order)
        for name in order:
            began = time.perf_counter()
            rows[name]()
            times[name].append(time.perf_counter() - began)
    return times


def table(title: str, times: dict[str, list[float]]) -> str:
    """Medians, and the ratio to the plain pass of the same round with its quartiles, as a markdown table."""
    lines = [f"### {title}", "", "| row | ms (median) | × plain (median) | quartiles |", "|---|---:|---:|---|"]
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[PLAIN], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"| {name} | {1e3 * statistics.median(seconds):.1f} | {middle:.3f} | {low:.3f} – {high:.3f} |")
    return "\n".join(lines)


def rows_for(inputs: dict[str, object], stack: ExitStack) -> dict[str, Step]:
    """Every row on these inputs; each way in has a model of its own, with the same weights."""
    bare = olmoe()
    model = stack.enter_context(moe.wrap(olmoe()))
    rows = {PLAIN: plain(bare, inputs), "the same again (A/A)": plain(bare, inputs)}
    rows["opened, called directly: idle hooks"] = plain(stack.enter_context(moe.wrap(olmoe())).hf, inputs)
    routing = ["expert_ids", "gate_weights"]
    for name, read in {
        "instrumented, reading nothing": [],
        "reading ids and gate weights of all layers": routing,
        "reading every expert_out": [*routing, "expert_out"],
        "reading every expert_out and expert_act": [*routing, "expert_out", "expert_act"],
    }.items():
        rows[name] = local(model, read)(inputs)
    return rows


def door_rows(inputs: dict[str, object], stack: ExitStack) -> dict[str, Step]:
    """The same values through every door."""
    routing = ["expert_ids", "gate_weights"]
    rows = {PLAIN: plain(olmoe(), inputs), "the same again (A/A)": plain(olmoe(), inputs)}
    rows["nnsight, a trace of nothing"] = traced(trace_points(lm := NNsight(olmoe())), lm, [])(inputs)
    for way, make in {
        "points": trace_points,
        "stock modules, as on a server": lambda lm: stock_points(lm, reached(describe(lm._module))),
    }.items():
        lm = NNsight(olmoe())
        points = make(lm)
        rows[f"nnsight, {way}: ids and gate weights"] = traced(points, lm, routing)(inputs)
        rows[f"nnsight, {way}: every expert_out"] = traced(points, lm, ["expert_out"])(inputs)
    rows["TransformerLens, nothing cached"] = cached(bridge_of(olmoe()), lambda name: False)(inputs)
    rows["TransformerLens, all its own hooks"] = cached(bridge_of(olmoe()))(inputs)
    bridge = bridge_of(olmoe())
    door = stack.enter_context(moe.attach(bridge))
    rows["TransformerLens attached, nothing cached"] = cached(bridge, lambda name: False)(inputs)
    rows["TransformerLens attached: ids and gate weights"] = cached(bridge, door.names(*routing))(inputs)
    rows["TransformerLens attached: every expert_out"] = cached(bridge, door.names("expert_out"))(inputs)
    return rows


def edit_rows(inputs: dict[str, object], stack: ExitStack) -> dict[str, Step]:
    """Interventions at all layers."""
    model = stack.enter_context(moe.wrap(olmoe()))
    other = model.run(inputs["input_ids"].flip(0), read="expert_out")
    layers, some = model.layers, list(range(8))
    edits = {
        "no edit": [],
        "8 of 64 experts ablated": [moe.ablate(layer=layers, expert=some)],
        "8 of 64 experts forbidden": [moe.mask(layer=layers, expert=some)],
        "one expert patched from another run": [moe.patch(other, layer=layers, expert=0)],
        "random routes": [moe.randomize()],
        "top_k(4) of 8": [moe.top_k(4)],
        "top_k(1) of 8": [moe.top_k(1)],
        "top_k(1) of 8, reading every expert_out": [moe.top_k(1)],
    }
    rows = {PLAIN: plain(olmoe(), inputs), "the same again (A/A)": plain(olmoe(), inputs)}
    for name, some_edits in edits.items():
        read = ["expert_out"] if "reading" in name else []
        rows[name] = lambda read=read, edit=some_edits: model.run(inputs, read=read, edit=edit)
    return rows


def logit_rows(inputs: dict[str, object], stack: ExitStack) -> dict[str, Step]:
    """A vocabulary as large as OLMoE's, with its logits and without."""
    vocabulary, routing = 50_304, ["expert_ids", "gate_weights"]
    bare = olmoe(vocabulary)
    model = stack.enter_context(moe.wrap(olmoe(vocabulary)))
    return {
        PLAIN: plain(bare, inputs),
        "the same again (A/A)": plain(bare, inputs),
        "ids and gate weights": lambda: model.run(inputs, read=routing),
        "ids and gate weights, output=False": lambda: model.run(inputs, read=routing, output=False),
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["reads", "step", "alone", "doors", "edits", "logits"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    ids = torch.randint(1000, (8, 128), generator=torch.Generator().manual_seed(0))
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds\n")
    inputs = {"input_ids": ids, "use_cache": False}
    tables = {
        "reads": (rows_for, inputs, "8 x 128 tokens", 1),
        "step": (rows_for, decoding_step(ids), "one decoding step after 128 tokens, batch of 8", 5),
        "alone": (rows_for, decoding_step(ids[:1]), "one decoding step after 128 tokens, one text", 10),
        "doors": (door_rows, inputs, "8 x 128 tokens, through every door", 1),
        "edits": (edit_rows, inputs, "8 x 128 tokens, under edits", 1),
        "logits": (logit_rows, inputs, "8 x 128 tokens, vocabulary 50,304", 1),
    }
    for name in [options.only] if options.only else tables:
        make, given, title, times = tables[name]
        with ExitStack() as stack:
            print(table(title, measure(make(given, stack), times * options.rounds)), "\n", flush=True)


def decoding_step(ids: torch.Tensor) -> dict[str, object]:
    """Inputs of one more token after a cached prompt; the cache is of fixed length, so that steps repeat."""
    from transformers import DynamicCache

    class Repeating(DynamicCache):
        """Forgets each step, so that every repetition sees the same past."""

        def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: object, **kwargs: object):
            past = self.layers[layer] if layer < len(self.layers) else None
            if past is None or not getattr(self, "frozen", False):
                return super().update(keys, values, layer, *args, **kwargs)
            return torch.cat([past.keys, keys], dim=-2), torch.cat([past.values, values], dim=-2)

    hf, cache = olmoe(), Repeating()
    with torch.no_grad():
        hf(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.frozen = True
    return {"input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True}


if __name__ == "__main__":
    main()
