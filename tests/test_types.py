"""The contract of every point on every model type, against the slow reference of all types.

What the seven families of `test_contract` show in small steps, here a type at a time: points are there, values read
are right, edits arrive, gradients reach them, padding changes nothing, and the parts add up. Errors are relative to
the largest absolute value of the reference. Each is recorded under the type, and the run writes ``docs/coverage.md``
(`tests/conftest.py`).
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_interp as moe
from moe_interp.adapters import FAMILIES, Family
from moe_interp.adapters.reading import padding_id
from moe_interp.points import POINTS
from tests.edits import change, one_of_each_point
from tests.module_sites import cacheless, output_of
from tests.reference.types import Reference, forward, routers
from tests.tiny_types import TYPES, build, inputs, runner

TOLERANCE = 1e-5
QUICK = (
    "cohere2_moe", "dbrx", "deepseek_v4", "doge", "gemma4", "inkling2_text", "llama4_text", "longcat_flash", "minimax",
    "nemotron_h", "nllb-moe", "qwen4_exp", "step3p7", "switch_transformers", "zaya",
)  # fmt: skip
EACH_TYPE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
# Where transformers' own experts run on grouped_mm, to which an untouched run is bit-equal.
OWN_COMPUTATION = (
    "dbrx", "doge", "jetmoe", "llama4", "llama4_text", "longcat_flash", "nllb-moe", "step3p7", "switch_transformers",
)  # fmt: skip


@cache
def tiny(model_type: str) -> Any:
    return build(model_type)


@cache
def clean(model_type: str) -> Reference:
    with torch.no_grad():
        return forward(tiny(model_type), inputs(tiny(model_type)))


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def opened_by(hf: Any) -> str:
    """The shape of the adapter: a row of a table, a row and a block's own forward, or a function."""
    adapter = FAMILIES[hf.config.get_text_config().model_type]
    if not isinstance(adapter, Family):
        return "function"
    return "row" if adapter.call is None else "row, own block"


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_every_point_reads_what_the_reference_computes(model_type, record_property):
    reference = clean(model_type)
    with moe.wrap(tiny(model_type)) as model:
        run = model.run(inputs(tiny(model_type)), read=list(model.points), output=False)
        notes = model.spec.notes
    assert set(run.values) == set(reference.points)
    errors = {}
    for key, expected in reference.points.items():
        got = run.values[key]
        assert got.shape == expected.shape, key
        if POINTS[key[0]].integer:
            assert torch.equal(got, expected), key
        else:
            errors[key] = error(got, expected)
    worst = max(errors.values())
    record_property("points", " ".join(sorted({name for name, _ in reference.points}, key=list(POINTS).index)))
    record_property("read", worst)
    record_property("adapter", opened_by(tiny(model_type)))
    record_property("notes", " ".join(notes))
    assert worst < TOLERANCE, {key: value for key, value in errors.items() if value >= TOLERANCE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_an_untouched_run_is_the_plain_one(model_type, dtype, record_property):
    hf = build(model_type, dtype=dtype)
    arguments = inputs(hf)
    if hf._can_set_experts_implementation():
        hf.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        plain = output_of(runner(hf)(**arguments, **cacheless(hf)))
    with moe.wrap(hf) as model:
        untouched = model.run(arguments).output
        everything = model.run(arguments, read=list(model.points)).output
    record_property("clean", 0.0 if torch.equal(untouched, plain) else error(untouched, plain))
    assert torch.equal(everything, untouched)
    if model_type not in OWN_COMPUTATION:
        assert torch.equal(untouched, plain)
    elif dtype is torch.float32:
        assert error(untouched, plain) < TOLERANCE


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_every_edit_moves_the_output_as_the_reference_predicts(model_type, record_property):
    hf, reference = tiny(model_type), clean(model_type)
    scale = reference.output.abs().max().item()
    errors = {}
    with moe.wrap(hf) as model:
        for point, layer in one_of_each_point(reference.points):
            if not POINTS[point].editable:
                continue
            where = {} if layer is None else {"layers": layer}
            edit = moe.apply(point, lambda value, point=point: change(point, value), **where)
            got = model.run(inputs(hf), edit=edit).output
            with model.plain(), torch.no_grad():
                edits = {(point, layer): lambda value, point=point: change(point, value)}
                expected = forward(hf, inputs(hf), edits).output
            effect = (expected - reference.output).abs().max().item()
            assert effect > 1e-3 * scale, point
            errors[point] = (got - expected).abs().max().item() / max(effect, scale)
    record_property("edit", max(errors.values()))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_dropping_the_lightest_slot_is_what_the_reference_computes(model_type, record_property):
    def drop_the_lightest(weights: Tensor) -> Tensor:
        return weights.scatter(-1, weights.abs().argmin(dim=-1, keepdim=True), 0.0)

    hf, reference = tiny(model_type), clean(model_type)
    edits = {key: drop_the_lightest for key in reference.points if key[0] == "gate_weights"}
    with torch.no_grad():
        expected = forward(hf, inputs(hf), edits).output
    with moe.wrap(hf) as model:
        got = model.run(inputs(hf), edit=moe.apply("gate_weights", drop_the_lightest)).output
    record_property("drop", error(got, expected))
    assert error(reference.output, expected) > 1e-3
    assert error(got, expected) < TOLERANCE


# Routers that do not take the k largest of the scores of all experts: their choice is forced, not masked.
OTHER_CHOICE = ("nllb-moe", "phimoe", "switch_transformers")


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_a_forbidden_expert_is_replaced_as_the_reference_computes(model_type, monkeypatch):
    hf, reference = tiny(model_type), clean(model_type)
    with moe.wrap(hf) as model:
        spec = model.spec
        layers = [layer for layer in model.layers if "selection_scores" in spec.layers[layer].sites]
        if model_type in OTHER_CHOICE:
            assert not layers
            with pytest.raises(moe.MoEError, match="the choice of the router at layer . of .* cannot be edited"):
                model.run(inputs(hf), edit=moe.mask(layer=model.layers[0], expert=0))
            return
        expert = int(reference.points["expert_ids", layers[-1]].flatten().bincount().argmax())
        run = model.run(inputs(hf), edit=moe.mask(layer=layers, expert=expert))
        base = model.run(inputs(hf), read="expert_out")
        again = model.run(inputs(hf), edit=[moe.patch_route(base, layer=layer) for layer in model.layers])
    top = routers.top

    def top_of_others(selection: Tensor, count: int, ordered: bool = True) -> Tensor:
        forbidden = torch.arange(selection.shape[-1]) == expert
        return top(selection.clamp(min=torch.finfo().min).masked_fill(forbidden, -torch.inf), count, ordered)

    monkeypatch.setattr(routers, "top", top_of_others)
    with torch.no_grad():
        expected = forward(hf, inputs(hf))
    assert not any((run.routing[layer].ids == expert).any() for layer in layers) or model_type == "zaya"
    if "diffusion" not in model_type:  # the expert of the last layer is one of the canvas
        assert error(reference.output, expected.output) > 1e-3
    assert error(run.output, expected.output) < TOLERANCE
    assert torch.equal(again.output, base.output)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_contributions_are_patched_by_expert_id(model_type):
    """Every expert's contribution from other texts: the routed sum is theirs, whoever was chosen here."""
    hf = tiny(model_type)
    others = {name: value.flip(0) if name.endswith("ids") else value for name, value in inputs(hf).items()}
    with moe.wrap(hf) as model:
        layer = model.layers[-1]
        experts = range(model.spec.moe(layer).runs or model.spec.moe(layer).num_experts)
        source = model.run(others, read=["expert_out", "routed_out"])
        edit = moe.patch(source, layer=layer, expert=experts)
        run = model.run(inputs(hf), edit=edit, read="routed_out")
        base = model.run(inputs(hf), read="routed_out")
        one = int(base.routing[layer].ids[base.routing[layer].mask][0, 0])
        back = [
            moe.ablate(layer=layer, expert=one),
            moe.patch(model.run(inputs(hf), read="expert_out"), layer=layer, expert=one),
        ]
        restored = model.run(inputs(hf), edit=back)
        stand = model.run(inputs(hf), edit=moe.replace(source["routed_out", layer], layer=layer, point="routed_out"))
    assert error(base["routed_out", layer], source["routed_out", layer]) > 1e-3
    assert error(run["routed_out", layer], source["routed_out", layer]) < TOLERANCE
    assert error(run.output, stand.output) < TOLERANCE
    assert error(restored.output, base.output) < TOLERANCE


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_gradients_reach_every_point_and_match_the_reference(model_type, record_property):
    # doge's own renormalisation is in place and cannot be differentiated; over a softmax it changes nothing
    hf = build("doge", norm_topk_prob=False) if model_type == "doge" else tiny(model_type)
    again = forward(hf, inputs(hf))
    probe = torch.randn(again.output.shape, generator=torch.Generator().manual_seed(3))
    keys = [key for key in again.points if POINTS[key[0]].differentiable]
    expected = torch.autograd.grad((again.output * probe).sum(), [again.points[k] for k in keys], allow_unused=True)
    with moe.wrap(hf) as model:
        run = model.run(inputs(hf), read=list(model.points), grad=True)
        got = torch.autograd.grad((run.output * probe).sum(), [run.values[k] for k in keys], allow_unused=True)
    errors = {}
    for key, mine, theirs in zip(keys, got, expected, strict=True):
        if theirs is None:
            assert mine is None or mine.abs().max() == 0, key
        else:
            assert theirs.abs().max() > 0 or "diffusion" in model_type, key
            errors[key] = error(mine, theirs) if theirs.abs().max() > 0 else 0.0
    record_property("gradient", max(errors.values()))
    assert max(errors.values()) < 1e-4, {key: value for key, value in errors.items() if value >= 1e-4}


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_padding_counts_nowhere(model_type):
    hf = tiny(model_type)
    padded = inputs(hf)
    padded["attention_mask"][1, :3] = 0
    if (padding := padding_id(hf)) is not None:
        padded["input_ids"][1, :3] = padding
    with torch.no_grad():
        reference = forward(hf, padded)
    with moe.wrap(hf) as model:
        run = model.run(padded, read=["resid_post", "expert_out"])
        real = {layer: routing.mask for layer, routing in run.routing.items()}
    for (point, layer), got in run.values.items():
        mask = real.get(layer, padded["attention_mask"].bool() if got.shape[1] == 8 else None)
        expected = reference.points[point, layer]
        if point == "expert_out":  # the order of an unsorted top-k is not to be relied on
            got = by_expert(got, run.routing[layer].ids)
            expected = by_expert(expected, reference.points["expert_ids", layer])
        assert error(got[mask], expected[mask]) < TOLERANCE, (point, layer)


def by_expert(outputs: Tensor, ids: Tensor) -> Tensor:
    """Slots in the order of expert ids."""
    return outputs.gather(2, ids.argsort(dim=-1)[..., None].expand_as(outputs))


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_the_parts_add_up(model_type, record_property):
    hf = tiny(model_type)
    with moe.wrap(hf) as model:
        audit = model.audit(inputs(hf))
        layers = model.spec.layers
        for short, there in (("mid", "resid_mid"), ("residual", "resid_post")):
            joins = {
                layer.index: layer.mid if short == "mid" else layer.post for layer in layers if there in layer.sites
            }
            unchecked = [index for index, join in joins.items() if join is None]
            if unchecked and len(unchecked) < len(joins):
                record_property(f"partly {short}", f"layers {', '.join(map(str, unchecked))} of {len(layers)}")
        if model.spec.embedding is None:
            record_property("embedding", "unchecked")
    found = {check.name: check.error for check in audit.checks}
    for name, short in (
        ("gate_weights ∝ router_scores of expert_ids", "scores"),
        ("expert_out = down-projection of expert_act", "neurons"),
        ("moe_out = routed_out + shared_out", "block"),
        ("resid_mid = resid_pre + attn_out", "mid"),
        ("resid_post = resid_mid + moe_out (or mlp_out)", "residual"),
        ("logits = decode(resid_post of the last layer)", "decode"),
    ):
        if name in found:
            record_property(short, found[name])
    assert audit.passed, str(audit)


NO_GENERATION = {
    "diffusion_gemma": "it writes a canvas, not token after token: ends with a reference for that",
    "doge": "its router mixes the tokens of a pass, so that a cached step routes differently: ends with another router",
    "openai_privacy_filter": "it is a classifier",
}
# transformers' own cached step differs from a whole pass there, by 0.47 in the logits: its sparse attention pools.
WITHOUT_CACHE = ("glm5_next",)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_generation_makes_the_edit_at_every_step(model_type, record_property):
    hf = tiny(model_type)
    if model_type in NO_GENERATION or not runner(hf).can_generate():
        reason = NO_GENERATION.get(model_type, "transformers has no generate for it: ends when it has")
        record_property("generation", reason)
        pytest.skip(reason)
    prompt = {name: value[:1] for name, value in inputs(hf).items() if "decoder" not in name}
    crossed = "decoder_input_ids" in inputs(hf)
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    options |= {"use_cache": False} if model_type in WITHOUT_CACHE else {}
    with moe.wrap(hf) as model:
        layer = model.layers[-1]
        edit = moe.apply("routed_out", lambda value: change("routed_out", value), layers=layer)
        ids = torch.zeros(1, 1, dtype=torch.long) if crossed else prompt["input_ids"]
        start = {"decoder_start_token_id": 0} if crossed else {}
        got = model.generate(prompt, edit=edit, **start, **options)
        for _ in range(4):
            known = (
                {"decoder_input_ids": ids} if crossed else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            )
            output = model.run({**prompt, **known}, edit=edit).output
            ids = torch.cat([ids, output[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


class Half(torch.nn.Module):
    """Dropout that always drops the same half."""

    def forward(self, value: Tensor) -> Tensor:
        return 2.0 * value * (torch.arange(value.shape[-1]) % 2) if self.training else value


def test_nllb_drops_outputs_in_training_mode_as_the_model_does():
    hf = build("nllb-moe").train()
    assert hf.config.moe_token_dropout > 0
    for module in list(hf.modules()):
        module.layerdrop = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Dropout):
                setattr(module, name, Half())
    arguments = inputs(hf)
    with torch.no_grad():
        plain = hf(**arguments, use_cache=False).logits
        again = hf(**arguments, use_cache=False).logits
    with moe.wrap(hf) as model:
        run = model.run(arguments, read=list(model.points))
    assert torch.equal(plain, again)
    assert error(run.output, plain) < TOLERANCE
    for layer in model.layers:
        summed = (run["gate_weights", layer][..., None] * run["expert_out", layer]).sum(dim=2)
        assert error(summed, run["routed_out", layer]) < TOLERANCE
