"""Every public function with arguments that are right, and values that are wrong for most: what the fuzz calls.

`calls` gives each function as a `Call` on tiny models. A call of an intervention also runs it, since what it says of a
model is checked there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import moe_interp as moe
from moe_interp.analyses.collect import Options, sizes
from moe_interp.analyses.metrics import as_metric
from moe_interp.analyses.routing import RoutingCounts
from tests.bridges import bridge
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

IDS = torch.arange(3, 11)[None]
OTHER = torch.tensor([[3, 4, 40, 6, 7, 8, 9, 10]])


@dataclass(frozen=True)
class Call:
    """A function and arguments that are right."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    def __call__(self, **changed: Any) -> Any:
        return self.function(**{**self.arguments, **changed})


@dataclass(frozen=True)
class Things:
    """What calls are made on."""

    hf: Any
    model: moe.MoEModel
    corpus: moe.Corpus
    run: moe.Run
    bridge: Any
    folder: Path


def things(folder: Path) -> Things:
    """A tiny model with shared experts and one dense layer, opened; its corpus, a run, and a bridge."""
    hf = build("qwen2_moe", num_hidden_layers=3, max_window_layers=3)
    model = moe.wrap(hf, StubTokenizer())
    texts = {"a": ["ab cd ef ab", "hello ab cd"], "b": ["one two ab", "xyz uvw ab cd"]}
    run = model.run(IDS, read=["expert_out", "resid_pre", "moe_out"])
    return Things(hf, model, moe.Corpus.from_texts(texts), run, bridge("olmoe", num_hidden_layers=2), folder)


def bad_values(on: Things) -> dict[str, Any]:
    """Values by what they are."""
    return {
        "None": None, "True": True, "-1": -1, "0": 0, "huge": 2**70, "large": 2**40, "1.5": 1.5,
        "numpy 2": np.int64(2), "tensor 2": torch.tensor(2), "nan": float("nan"),
        "-inf": -float("inf"), "complex": 1j, "word": "no", "empty text": "", "surrogate": "\ud800", "NUL": "a\0b",
        "bytes": b"x", "empty list": [], "empty dict": {}, "empty tuple": (), "object": object(), "class": dict,
        "uneven rows": [[1, 2], [3]], "list of None": [None], "list of words": ["x", "y"], "dict": {"a": 1},
        "iterator": iter([object()]), "no-argument function": lambda: None, "error": ValueError("x"),
        "empty tensor": torch.zeros(0), "floats": torch.zeros(2, 3), "marks": torch.ones(7, dtype=torch.bool),
        "uint8": torch.tensor([250], dtype=torch.uint8), "NaN tensor": torch.full((4,), torch.nan),
        "meta tensor": torch.zeros(3, device="meta"), "array of words": np.array(["a", "b"]), "0-d": np.array(1.5),
        "module": nn.Linear(2, 2), "raw model": on.hf, "model": on.model, "corpus": on.corpus, "run": on.run,
        "edit": moe.ablate(layer=2, expert=0), "missing path": Path("nothing/here"),
    }  # fmt: skip


def calls(on: Things) -> dict[str, Call]:
    """Every public function by its name."""
    found: dict[str, Call] = {}
    for part in (_edits, _analyses, _causes, _stacks, _files, _rest):
        found |= part(on)
    return found


def _edits(on: Things) -> dict[str, Call]:
    """Interventions, made and run; those of one token, which the text has, are where the others are."""
    where = dict(layer=2, positions=None, tokens=None)
    every = dict(layers=2, positions=None, tokens=None)
    vector = torch.ones(64)
    means = {(2, 1): vector}
    table: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "ablate": (moe.ablate, dict(expert=1, how="zero", mean=None, run=None, seed=0, **where)),
        "ablate to the mean": (moe.ablate, dict(expert=1, how="mean", mean=means, run=None, seed=0, **where)),
        "ablate by another run": (
            moe.ablate, dict(expert=_used(on), how="resample", mean=None, run=on.run, seed=0, **where)
        ),
        "scale": (moe.scale, dict(expert=1, by=2.0, **where)),
        "replace": (moe.replace, dict(values=vector, expert=1, point=None, **where)),
        "steer": (moe.steer, dict(vector=vector, expert=1, point=None, by=1.0, **where)),
        "noise": (moe.noise, dict(std=1.0, point="resid_pre", seed=0, **where)),
        "patch": (moe.patch, dict(run=on.run, expert=1, point=None, **where)),
        "patch_route": (moe.patch_route, dict(run=on.run, **where)),
        "force": (moe.force, dict(experts=[1, 2], weights="own", **where)),
        "mask": (moe.mask, dict(expert=1, on="selection", **where)),
        "bias": (moe.bias, dict(expert=1, by=1.0, on="selection", **where)),
        "randomize": (moe.randomize, dict(weights="kept", seed=0, **where)),
        "swap": (moe.swap, dict(experts=(1, 2), layers=None, **where)),
        "top_k": (moe.top_k, dict(k=2, renormalise=False, **every)),
        "share": (moe.share, dict(of_weight=0.5, renormalise=False, **every)),
        "apply": (moe.apply, dict(point="moe_out", fn=torch.neg, **every)),
    }  # fmt: skip
    return {name: Call(partial(_made_and_run, on.model, make), given) for name, (make, given) in table.items()}


def _used(on: Things) -> int:
    return int(on.run.routing[2].ids[0, 0, 0])


def _made_and_run(model: moe.MoEModel, make: Callable[..., Any], **arguments: Any) -> moe.Run:
    edit = make(**arguments)
    run = model.run(IDS, edit=edit)
    if make is not moe.apply:
        assert moe.from_json(moe.to_json([edit])) == [edit]
    return run


def _analyses(on: Things) -> dict[str, Call]:
    base = dict(model=on.model, corpus=on.corpus, seed=0, max_tokens=8, batch_tokens=64)
    sampled, special = {**base, "resamples": 9}, dict(special_tokens=False)
    lens = moe.TunedLens.zeros(on.model)
    counts = RoutingCounts.empty(len(on.corpus), *sizes(on.model))
    moe.collect(on.model, on.corpus, {"routing": counts})
    table: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "routing": (moe.routing, sampled | special),
        "routing_by_label": (moe.routing_by_label, sampled | special | dict(label="kind")),
        "coactivation": (moe.coactivation, sampled | special),
        "transitions": (moe.transitions, base | special | dict(blocks=2)),
        "vocabulary_specialization": (moe.vocabulary_specialization, base | special | dict(at_least=1, folds=2)),
        "token_identity": (moe.token_identity, sampled | special | dict(at_least=1, folds=2)),
        "expert_profiles": (moe.expert_profiles, sampled | special | dict(top=2, examples=1, partners=1)),
        "mean_contributions": (
            moe.mean_contributions, dict(model=on.model, corpus=on.corpus, layers=None, options=Options())
        ),
        "norm_and_weight": (moe.norm_and_weight, sampled | special | dict(layers=None, tokens_per_document=2)),
        "expert_similarity": (
            moe.expert_similarity, base | special | dict(layers=None, weights=False, tokens=8, null_pairs=2)
        ),
        "shared_experts": (moe.shared_experts, sampled | special | dict(layers=None)),
        "super_experts": (
            moe.super_experts, sampled | dict(most=1, percentile=99.5, share_of_largest=0.1, special_tokens=True)
        ),
        "neuron_lens": (
            moe.neuron_lens, dict(model=on.model, layer=2, expert=0, top=2, null_directions=2, seed=0)
        ),
        "ensemble_similarity": (moe.ensemble_similarity, sampled | dict(layers=None, definition="paper")),
        "perplexity": (moe.perplexity, sampled | dict(ks=[1], renormalise=False, per_layer=False)),
        "tuned_lens_quality": (moe.tuned_lens_quality, sampled | dict(lens=lens)),
        "train_tuned_lens": (
            moe.train_tuned_lens,
            base | dict(held_out=None, steps=1, learning_rate=0.001, every=1, patience=1, state=None),
        ),
        "score_audit": (moe.score_audit, sampled | dict(random_routers=1, blocks=2)),
        "routing_health": (moe.routing_health, dict(sums=counts)),
        "collect": (
            lambda **given: moe.collect(**{"sums": {"n": RoutingCounts.empty(4, *sizes(on.model))}, **given}),
            dict(model=on.model, corpus=on.corpus, options=None, resume=None, every=1),
        ),
        "collect into": (moe.collect, dict(model=on.model, corpus=on.corpus, sums={"routing": counts}, options=None)),
        "router_saturation": (
            moe.router_saturation,
            dict(
                checkpoints=[on.model, on.model], corpus=on.corpus, revisions=None, names=["a", "b"], resamples=9,
                seed=0, tokens_per_document=2, special_tokens=False, max_tokens=8,
            ),
        ),
        "reference_saturation": (moe.reference_saturation, dict(resamples=9, seed=0)),
        "routing_from_counts": (
            moe.routing_from_counts,
            dict(counts=[[[1, 1], [2, 0]]], tokens=2, domains=["a"], top_k=1, layers=[0, 1], model="counts"),
        ),
    }  # fmt: skip
    return {name: Call(*row) for name, row in table.items()}


def _causes(on: Things) -> dict[str, Call]:
    both = dict(model=on.model, clean=IDS, corrupted=OTHER, metric="nll", direction="restore", resamples=9, seed=0)
    one = dict(model=on.model, text="ab cd")
    table: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "activation_patching": (
            moe.activation_patching, both | dict(over="experts", point=None, layers=None, batch_tokens=64)
        ),
        "path_patching": (moe.path_patching, both | dict(sender=(0, _sends(on)), receivers="logits", batch_tokens=64)),
        "causal_trace": (
            moe.causal_trace,
            dict(
                model=on.model, prompt="ab cd", subject="ab", answer=7, noise=1.0, samples=2, seed=0, at="all",
                layers=2, batch_tokens=64,
            ),
        ),
        "coalitions": (
            moe.coalitions,
            one | dict(
                experts=[(2, 0), (2, 1)], metric="nll", how="zero", size=2, mean=None, run=None, resamples=9, seed=0,
                batch_tokens=64,
            ),
        ),
        "attribution_patching": (
            moe.attribution_patching,
            dict(
                model=on.model, inputs="ab cd", corrupted=None, metric="nll", layers=2, steps=1, neurons=False,
                sample=2, seed=0, batch_tokens=64,
            ),
        ),
        "expert_effects": (
            moe.expert_effects,
            dict(
                model=on.model, inputs="ab cd", metric="nll", how="zero", layers=2, mean=None, seed=0, batch_tokens=64
            ),
        ),
        "expert_lens": (
            moe.expert_lens,
            one | dict(layers=None, positions=None, top=2, definition="paper", lens=None, chunk=64),
        ),
        "logit_attribution": (moe.logit_attribution, one | dict(tokens=7, position=-1)),
        "routing_map": (moe.routing_map, one),
    }  # fmt: skip
    return {name: Call(*row) for name, row in table.items()}


def _sends(on: Things) -> int:
    """An expert that the token which differs uses in the first layer."""
    return int(on.model.run(OTHER).routing[0].ids[0, 2, 0])


def _stacks(on: Things) -> dict[str, Call]:
    door = moe.attach(on.bridge)
    _, cache = on.bridge.run_with_cache(IDS, names_filter=door.names())
    stack = dict(cache=cache, layer=-1, by="slot", directions=None, pos_slice=None, return_labels=False)
    stacked = moe.stack_expert_results(cache)
    tokens = dict(cache=cache, tokens=7, incorrect_tokens=None, pos_slice=None)
    table: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "attach": (moe.attach, dict(bridge=object())),
        "stack_expert_results": (moe.stack_expert_results, stack | dict(incl_remainder=False)),
        "decompose_resid": (moe.decompose_resid, stack | dict(mlp_input=False, incl_embeds=True)),
        "logit_directions": (moe.logit_directions, tokens),
        "logit_attrs": (moe.logit_attrs, tokens | dict(stack=stacked)),
        "get_act_patch_expert_out": (
            moe.get_act_patch_expert_out,
            dict(
                bridge=on.bridge, corrupted_tokens=OTHER, clean_cache=cache, layers=0,
                patching_metric=lambda logits: logits[0, -1, 7], return_labels=False,
            ),
        ),
    }  # fmt: skip
    return {name: Call(*row) for name, row in table.items()}


def _files(on: Things) -> dict[str, Call]:
    (on.folder / "texts.jsonl").write_text('{"text": "ab", "domain": "a", "kind": "k"}\n{"text": "cd", "kind": "l"}\n')
    profiles = moe.expert_profiles(on.model, on.corpus, top=2, examples=1, partners=1, resamples=9)
    table: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "read_corpus": (
            moe.read_corpus,
            dict(path=on.folder / "texts.jsonl", text="text", domain=None, domain_field=None, limit=None),
        ),
        "load": (moe.load, dict(name=on.folder, trust_remote_code=False)),
        "tuned_lens": (moe.tuned_lens, dict(name="reference")),
        "profile": (moe.profile, dict(profiles=profiles, layer=2, expert=0)),
        "profile_page": (moe.profile_page, dict(profiles=profiles, path=on.folder / "page.html")),
        "report": (
            moe.report,
            dict(
                model=on.model, corpus=on.corpus, path=on.folder / "report.html", text="ab cd", resamples=9, seed=0,
                max_tokens=8, scored=1,
            ),
        ),
        "TunedLens.save": (moe.TunedLens.zeros(on.model).save, dict(path=on.folder / "lens", dtype=torch.float32)),
        "TunedLens.load": (moe.TunedLens.load, dict(path=on.folder / "none")),
        "from_json": (moe.from_json, dict(text=moe.to_json([moe.ablate(layer=2, expert=0)]))),
        "to_json": (moe.to_json, dict(interventions=[moe.ablate(layer=2, expert=0)])),
    }  # fmt: skip
    return {name: Call(*row) for name, row in table.items()}


def _rest(on: Things) -> dict[str, Call]:
    model, corpus, run = on.model, on.corpus, on.run
    watch = dict(every=1, to=None, alarms=None, on_alarm=None)
    lens = moe.TunedLens.zeros(model)
    selected = lambda **given: model.run(IDS, read=moe.select(**given))  # noqa: E731
    table: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "wrap": (_wrapped, dict(model=object(), tokenizer=None, name=None, remote=False, trust_server=False)),
        "wrap a model": (partial(_wrapped, on.hf), dict(tokenizer=None, name=None, remote=False, trust_server=False)),
        "trace_points": (moe.trace_points, dict(lm=object())),
        "register_adapter": (moe.register_adapter, dict(model_type="", adapter=object())),
        "select": (selected, dict(point="resid_post", layers=2, positions=-1, top=2)),
        "spans": (_labelled_by_spans(on), dict(mark=lambda text: [(0, 1, "x")], other="other")),
        "to_tensorboard": (moe.to_tensorboard, dict(writer=object())),
        "MoEModel.run": (model.run, dict(inputs=IDS, read="moe_out", edit=(), grad=False, output=True)),
        "MoEModel.generate": (model.generate, dict(inputs=IDS, edit=(), max_new_tokens=1)),
        "MoEModel.edit": (partial(_standing, model), dict(edits=moe.ablate(layer=2, expert=0), everywhere=False)),
        "MoEModel.experts": (model.experts, dict(layer=2)),
        "MoEModel.weights": (model.weights, dict(layer=2, expert=0)),
        "MoEModel.audit": (model.audit, dict(inputs=IDS)),
        "MoEModel.decode": (model.decode, dict(hidden=torch.ones(2, 64))),
        "MoEModel.encode": (model.encode, dict(inputs=IDS)),
        "Corpus": (moe.Corpus, dict(documents=corpus.documents, source="here")),
        "Corpus.from_texts": (moe.Corpus.from_texts, dict(texts={"a": ["x"]}, source="here")),
        "Corpus.from_token_ids": (moe.Corpus.from_token_ids, dict(rows=[[1]], domains=["a"], source="here")),
        "Corpus.filter": (corpus.filter, dict(keep=lambda document: True)),
        "Corpus.take": (corpus.take, dict(per_domain=1)),
        "Corpus.__add__": (corpus.__add__, dict(other=corpus)),
        "Run.whole": (run.whole, dict(point="moe_out", layer=2)),
        "Run.top_tokens": (run.top_tokens, dict(point="moe_out", layer=2)),
        "Run.expert": (run.expert, dict(layer=2, expert=0)),
        "Run.contribution": (run.contribution, dict(layer=2, expert=0)),
        "Run.heaviest": (run.heaviest, dict(layer=2, rank=0)),
        "Routing.slots_of": (run.routing[2].slots_of, dict(expert=0)),
        "Routing.uses": (run.routing[2].uses, dict(expert=0)),
        "TunedLens.zeros": (moe.TunedLens.zeros, dict(model=model)),
        "TunedLens.into": (lens.into, dict(layer=2)),
        "TunedLens.out_of": (lens.out_of, dict(layer=1)),
        "TunedLens.check": (lens.check, dict(model=model)),
        "ByToken.of": (moe.ByToken.of, dict(given=torch.ones(1, 8))),
        "RoutingWatch": (moe.RoutingWatch, dict(model=model, **watch)),
        "RoutingWatch.step": (moe.RoutingWatch(model).step, dict(number=1)),
        "RoutingCallback": (moe.RoutingCallback, dict(stop=False, **watch)),
        "NLL": (partial(_measured, on, moe.NLL), dict(name="nll", units="nats")),
        "KL": (partial(_measured, on, moe.KL), dict(position=-1, name="kl", units="nats")),
        "LogProbability": (partial(_measured, on, moe.LogProbability), dict(answers=7, position=-1)),
        "Probability": (partial(_measured, on, moe.Probability), dict(answers=7, position=-1)),
        "LogitDifference": (partial(_measured, on, moe.LogitDifference), dict(answers=7, wrong="a", position=-1)),
        "Options": (Options, dict(special_tokens=False, max_tokens=8, batch_tokens=64)),
    }
    return {name: Call(*row) for name, row in table.items()}


def _measured(on: Things, make: Callable[..., Any], **arguments: Any) -> Any:
    """A metric, made and measured on the run."""
    bound = as_metric(make(**arguments), on.model).bind(on.run)
    return bound.of(on.run)


def _wrapped(model: Any, tokenizer: Any, name: Any, remote: Any, trust_server: Any) -> str:
    with moe.wrap(model, tokenizer, name=name, remote=remote, trust_server=trust_server) as opened:
        return repr(opened)


def _standing(model: moe.MoEModel, edits: Any, everywhere: Any) -> Any:
    with model.edit(edits, everywhere=everywhere) as standing:
        return standing.touched


class _Offsets(StubTokenizer):
    """Also says where each token lies, as fast tokenizers do."""

    is_fast = True

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().__call__(text)
        return found | {"offset_mapping": [(at, at + 1) for at in range(len(text))]}


def _labelled_by_spans(on: Things) -> Callable[..., Any]:
    opened = moe.wrap(on.hf, _Offsets())
    return lambda **given: moe.routing_by_label(opened, on.corpus, moe.spans(**given), resamples=9)
