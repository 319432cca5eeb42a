"""What seeing everything costs, as a share of the plain forward pass.

A random OLMoE-shaped model; every row is measured in the same run, interleaved: each round times all rows once, in an
order that is shuffled anew, and a row's figure is the median over rounds of its time by the plain time of that round.
The plain forward stands there twice, so that the second (A/A) shows the noise.

    python benchmarks/overhead.py                     8 x 128 tokens, and one decoding step, each beside other hosts
    python benchmarks/overhead.py --rounds 30 --threads 2
    python benchmarks/overhead.py --only edits      what interventions cost, or save
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_interp as moe

PLAIN = "plain transformers (grouped_mm)"
Step = Callable[[], object]


def olmoe() -> OlmoeForCausalLM:
    """Hidden 512, expert width 256, vocabulary 1,000, 8 layers, 64 experts, top-8; random."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1000, eos_token_id=1, hidden_size=512, intermediate_size=256, num_hidden_layers=8,
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


def nnsight_points(model: moe.MoEModel, point: str) -> Callable[[dict[str, object]], Step]:
    """An nnsight trace that saves a hook point at all layers."""
    import nnsight

    traced = nnsight.NNsight(model.hf)

    def bind(inputs: dict[str, object]) -> Step:
        def step() -> object:
            with torch.no_grad(), traced.trace(**inputs):
                saved = nnsight.save([layer.moe_points[point].output.clone() for layer in traced.model.layers])
            return saved

        return step

    return bind


def nnsight_slots(hf: OlmoeForCausalLM) -> Callable[[dict[str, object]], Step]:
    """What a user of nnsight writes without hook points: every (token, slot) run as a token of its own."""
    import nnsight

    traced = nnsight.NNsight(hf)

    def bind(inputs: dict[str, object]) -> Step:
        def step() -> object:
            with torch.no_grad(), traced.trace(**inputs):
                saved = nnsight.save([])
                for layer in traced.model.layers:
                    hidden, ids, weights = layer.mlp.experts.inputs[0]
                    slots = ids.shape[-1]
                    alone = layer.mlp.experts(
                        hidden.repeat_interleave(slots, 0), ids.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1)
                    )
                    saved.append(alone)
            return saved

        return step

    return bind


def lens_cache() -> Callable[[dict[str, object]], Step]:
    """TransformerLens' own cache of its own hooks on the same weights; it has no per-expert outputs to cache."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    hf = olmoe()
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)

    def bind(inputs: dict[str, object]) -> Step:
        def step() -> object:
            with torch.no_grad():
                return bridge.run_with_cache(inputs["input_ids"])

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


def rows_for(inputs: dict[str, object], stack: ExitStack, hosts: bool) -> dict[str, Step]:
    """Every row on these inputs; each way in has a model of its own, with the same weights."""
    bare = olmoe()
    model = stack.enter_context(moe.wrap(olmoe()))
    rows = {PLAIN: plain(bare, inputs), "the same again (A/A)": plain(bare, inputs)}
    routing = ["expert_ids", "gate_weights"]
    for name, read in {
        "instrumented, reading nothing": [],
        "reading ids and gate weights of all layers": routing,
        "reading every expert_out": [*routing, "expert_out"],
        "reading every expert_out and expert_act": [*routing, "expert_out", "expert_act"],
    }.items():
        rows[name] = local(model, read)(inputs)
    if not hosts:
        return rows
    watched = stack.enter_context(moe.wrap(olmoe()))
    for layer in watched.hf.model.layers:
        layer.moe_points.expert_out.exposed = True
    rows["nnsight trace of every expert_out hook point"] = nnsight_points(watched, "expert_out")(inputs)
    rows["nnsight trace that computes the slots itself"] = nnsight_slots(olmoe())(inputs)
    rows["TransformerLens cache of its own hooks"] = lens_cache()(inputs)
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


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["reads", "edits"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    ids = torch.randint(1000, (8, 128), generator=torch.Generator().manual_seed(0))
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds\n")
    if options.only != "reads":
        with ExitStack() as stack:
            rows = edit_rows({"input_ids": ids, "use_cache": False}, stack)
            print(table("8 x 128 tokens, under edits", measure(rows, options.rounds)), "\n")
    if options.only == "edits":
        return
    with ExitStack() as stack:
        rows = rows_for({"input_ids": ids, "use_cache": False}, stack, hosts=True)
        print(table("8 x 128 tokens", measure(rows, options.rounds)), "\n")
    with ExitStack() as stack:
        cached = decoding_step(ids)
        rows = rows_for(cached, stack, hosts=False)
        print(table("one decoding step after 128 tokens, batch of 8", measure(rows, 5 * options.rounds)))


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
