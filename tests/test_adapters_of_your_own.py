"""A newcomer's architecture: no config, no tokens, one plain class, opened by a row; and what a wrong row is told."""

import inspect
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import moe_interp as moe
from moe_interp import adapters
from moe_interp.adapters import Separate, linear_gate
from moe_interp.errors import BadInput, UnsupportedModel

D, E, K, V, S = 16, 4, 2, 5, 7
X = torch.randn(2, S, 6, generator=torch.Generator().manual_seed(1))
KERNEL = Separate(up="up", down="down")
ROW: dict[str, Any] = dict(
    embed="inputs",
    unembed="head",
    attention=lambda layer: "mixer",
    mid="norm2",
    block="moe",
    router="router",
    experts="specialists",
    kernel=KERNEL,
    call=linear_gate(KERNEL, returns="out"),
    returns_logits=True,
    renormalises=True,
    num_experts="num_experts",
    top_k="top_k",
    kind="other",
)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Block(nn.Module):
    """Router and experts under names that no default knows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = E, K
        self.router, self.specialists = nn.Linear(D, E), nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        """Every token by itself, slowly."""
        out = torch.zeros_like(x)
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                scores = self.router(x[b, s]).softmax(-1)
                chosen = scores.argsort(descending=True)[: self.top_k]
                for expert in chosen.tolist():
                    out[b, s] += scores[expert] / scores[chosen].sum() * self.specialists[expert](x[b, s])
        return out


class Mixer(nn.Module):
    """Every position gets the mean of those up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.moe = nn.LayerNorm(D), Mixer(), nn.LayerNorm(D), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.moe(self.norm2(x))


class Newcomer(nn.Module):
    """Vectors in, V numbers an input out, or V a position."""

    def __init__(self, pooled: bool = False, bare: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.inputs, self.layers = nn.Linear(6, D), nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Sequential(nn.Linear(D, V)) if bare else nn.Linear(D, V)

    def forward(self, features: Tensor) -> Tensor:
        x = self.inputs(features)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.pooled else x)


@pytest.fixture
def opened(monkeypatch) -> Callable[..., moe.MoEModel]:
    """Opens a model by a row of its own, which is forgotten afterwards."""
    monkeypatch.setattr("moe_interp.adapters.families.FAMILIES", dict(adapters.FAMILIES))

    def open_(hf: nn.Module, **changes: Any) -> moe.MoEModel:
        moe.register_adapter("Newcomer", moe.Family(**{**ROW, **changes}))
        return moe.wrap(hf.eval())

    return open_


def build(**options: Any) -> Newcomer:
    """Seeded; the router's choices are far apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = Newcomer(**options)
        for layer in hf.layers:
            nn.init.normal_(layer.moe.router.weight)
    return hf


def failed(audit: Any) -> list[str]:
    return [check.name for check in audit.checks if not check.passed]


# A row for a model without a config


CONFIGS = {
    "none": None,
    "without sizes": types.SimpleNamespace(),
    "a mapping": {"hidden_size": 99},
    "with a type": types.SimpleNamespace(model_type="Newcomer", max_position_embeddings=9),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_row_opens_a_plain_module_whatever_it_calls_its_config(config, opened):
    hf = build()
    if CONFIGS[config] is not None:
        hf.config = CONFIGS[config]
    with opened(hf) as model:
        run = model.run({"features": X}, read=list(model.points))
        spec, audit = model.spec, model.audit({"features": X})
        assert (spec.model_type, spec.d_model, spec.vocab_size) == ("Newcomer", D, V)
        assert spec.context_length == (9 if config == "with a type" else 2**31 - 1)
        assert torch.allclose(model.decode(run["resid_post", 1]), run.logits, atol=1e-6)
    assert audit.passed, str(audit)
    assert "logits = decode(resid_post of the last layer)" in [check.name for check in audit.checks]
    with torch.no_grad():
        assert torch.allclose(run.logits, hf(X), atol=1e-6)
    scores = functional.softmax(run["moe_in", 0] @ hf.layers[0].moe.router.weight.T + hf.layers[0].moe.router.bias, -1)
    assert torch.equal(run.routing[0].ids.sort(-1).values, scores.topk(K).indices.sort(-1).values)


def test_sizes_come_from_the_router_where_no_norm_has_a_weight_and_from_the_row_above_all(opened):
    hf = build()
    for owner, name in [(hf, "norm"), (hf.layers[0], "norm2"), (hf.layers[1], "norm2")]:
        setattr(owner, name, nn.LayerNorm(D, elementwise_affine=False))
    with opened(hf) as model:
        assert (model.spec.d_model, model.spec.vocab_size) == (D, V)
    with opened(hf, sizes=lambda hf: {"d_model": 3, "vocab_size": 4, "context_length": 5}) as model:
        assert (model.spec.d_model, model.spec.vocab_size, model.spec.context_length) == (3, 4, 5)


def test_a_size_that_nothing_says_is_asked_for(opened):
    with pytest.raises(UnsupportedModel, match=r"cannot tell vocab_size of Newcomer: .*sizes=lambda model: {\"vocab_"):
        opened(build(bare=True))
    with opened(build(bare=True), sizes=lambda hf: {"vocab_size": hf.head[0].out_features}) as model:
        assert model.spec.vocab_size == V and model.audit({"features": X}).passed
    hf = build()
    hf.norm = hf.layers[0].norm2 = hf.layers[1].norm2 = nn.Identity()
    with pytest.raises(UnsupportedModel, match="cannot tell d_model of Newcomer"):
        for layer in hf.layers:
            layer.moe.router = nn.Sequential(layer.moe.router)
        opened(hf)


def test_a_model_without_embedding_norm_and_head(opened):
    hf = build()
    hf.inputs, hf.norm, hf.head = nn.Identity(), nn.Identity(), nn.Identity()
    x = torch.randn(2, S, D, generator=torch.Generator().manual_seed(2))
    with opened(hf, embed=None, norm=None, unembed=None) as model:
        assert "embed" not in model.points and (model.spec.d_model, model.spec.vocab_size) == (D, 0)
        run = model.run({"features": x}, read="resid_post")
        audit = model.audit({"features": x})
        assert torch.equal(run.output, run["resid_post", 1])
        with pytest.raises(BadInput, match=r"no logits: .*Use run.output"):
            _ = run.logits
    assert audit.passed, str(audit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed": "embed_tokens"}, r"no module 'embed_tokens' for embed: .*Newcomer with modules inputs.*say None"),
        ({"norm": "ln_f"}, "no module 'ln_f' for the way from the last residual to the output"),
        ({"unembed": "score"}, "no module 'score' for unembed"),
        ({"mid": "ln_2"}, "no module 'layers.0.ln_2' for resid_mid of layer 0"),
        ({"attention": lambda layer: "attn"}, "no module 'layers.0.attn' for attn_out of layer 0"),
        ({"experts": "experts"}, "no module 'layers.0.moe.experts' for the experts of layer 0"),
        (
            {"block": "ffn"},
            "without experts: .* with 'ffn.router' in it, got 2 dense layers of Newcomer with modules inputs",
        ),
        (
            {"router": "rt"},
            "without experts: .* with 'moe.rt' in it, got 2 dense layers of Newcomer with modules inputs",
        ),
        ({"num_experts": "count"}, "no attribute 'count': expected it in Block"),
        ({"renormalises": None}, "no attribute 'norm_topk_prob': expected it in Linear"),
        ({"layers": "blocks"}, "cannot find the layers of Newcomer"),
        ({"streams": "hc_mult"}, "no attribute 'hc_mult'"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_those_that_are(changes, message, opened):
    hf = build()
    with pytest.raises(UnsupportedModel, match=message):
        opened(hf, **changes)
    assert not any(name.endswith("moe_points") for name, _ in hf.named_modules())


def test_a_model_that_is_in_no_table_is_told_the_name_to_register():
    with pytest.raises(UnsupportedModel, match=r"register_adapter\('Newcomer', moe.Family"):
        moe.wrap(build())


# Fields of the wrong kind


WRONG = {
    "Family(attention='attn')": "this attention: expected a function, got 'attn'. Write attention=lambda _: 'attn'.",
    "Family(final=())": "this final: expected a function or None, got (). Write final=lambda _: ().",
    "Family(block=None)": "this block: expected str, got None",
    "Family(top_k=1.5)": "this top_k: expected str or int or None, got 1.5",
    "Family(kind='image')": "this kind: expected 'causal' or 'encoder' or 'encoder-decoder' or 'other', got 'image'",
    "Family(weights_on='both')": "this weights_on: expected 'output' or 'input', got 'both'",
    "Family(kernel='experts')": "this kernel: expected Kernel or None, got 'experts'",
    "linear_gate(kernel, returns='logits')": "this returns: expected 'out, logits' or 'out', got 'logits'",
}


def test_a_field_of_the_wrong_kind_is_refused_when_the_row_is_made():
    """In an interpreter of its own, for here the tests' own type checker comes first."""
    code = f"""
from moe_interp import Family
from moe_interp.adapters import Separate, linear_gate
from moe_interp.errors import BadInput
kernel = Separate(up="up", down="down")
for made in {list(WRONG)!r}:
    try:
        print(eval(made))
    except BadInput as error:
        print(error)
"""
    lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    for line, (made, message) in zip(lines, WRONG.items(), strict=True):
        assert line == f"{'LinearGate' if 'gate' in made else 'Family'} cannot have {message}"


# The router and the experts where the row says


@pytest.mark.parametrize("mixture", [None, "outer.moe"])
def test_linear_gate_finds_router_and_experts_by_the_names_of_the_row(mixture, opened):
    hf = build()
    if mixture:
        for layer in hf.layers:
            layer.outer = nn.Sequential()
            layer.outer.moe, layer.moe = layer.moe, layer.outer
    with torch.no_grad():
        expected = hf(X)
    call = linear_gate(KERNEL, returns="out", top_k="moe.top_k" if mixture else "top_k")
    with opened(hf, block="outer" if mixture else "moe", mixture=mixture, call=call) as model:
        assert torch.allclose(model.run({"features": X}).logits, expected, atol=1e-6)
        audit = model.audit({"features": X})
    assert audit.passed, str(audit)
    assert linear_gate(KERNEL).router == "gate"  # told by the row, not changed for others


# An audit reports


def test_a_pooled_head_fails_by_name_and_a_row_can_say_so(opened):
    with opened(build(pooled=True)) as model:
        audit = model.audit({"features": X})
        assert failed(audit)[0] == "logits = decode(resid_post of the last layer)"
        assert f"(2, {V}) is there, (2, {S}, {V}) follows" in str(audit)
    with opened(build(pooled=True), final=lambda body: None) as model:
        audit = model.audit({"features": X})
        with pytest.raises(UnsupportedModel, match="cannot decode a residual stream"):
            model.decode(torch.zeros(1, 1, D))
        assert model.run({"features": X}).logits.shape == (2, V)
    assert audit.passed, str(audit)
    assert not any("logits" in check.name and "decode" in check.name for check in audit.checks)


def test_a_forward_that_needs_the_logits_of_all_tokens_gets_them(opened):
    hf = build()
    forward = hf.forward
    hf.forward = lambda features: forward(features).view(*features.shape[:2], V)
    with opened(hf) as model:
        run = model.run({"features": X}, read="expert_out", output=False)
        assert torch.equal(run["expert_out", 0], model.run({"features": X}, read="expert_out")["expert_out", 0])


def test_one_input_does_not_pass_by_broadcasting(opened):
    """[1, V] against [1, S, V] could be compared, and says nothing."""
    with opened(build(pooled=True)) as model:
        assert failed(model.audit({"features": X[:1, :1]}))[0] == "logits = decode(resid_post of the last layer)"


@pytest.mark.parametrize(
    ("changes", "name", "detail"),
    [
        ({"call": linear_gate(KERNEL)}, "every point is read", "TypeError"),  # a pair, where the layer adds
        ({"call": linear_gate(Separate(up="up", down="out"), returns="out")}, "every point is read", "AttributeError"),
        ({"final": lambda body: (body.through("layers.0.moe.specialists"),)}, "logits = decode", "NotImplementedError"),
    ],
)
def test_a_check_that_cannot_be_carried_out_fails_by_name(changes, name, detail, opened):
    with opened(build(), **changes) as model:
        audit = model.audit({"features": X})
        assert failed(audit)[0].startswith(name)
        assert detail in str(audit)
        with pytest.raises(BadInput, match="takes no tokens"):  # wrong inputs are no finding about the model
            model.audit(X)


def test_running_out_of_memory_is_no_finding(opened, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    with opened(build()) as model:
        monkeypatch.setattr(model, "run", full)
        with pytest.raises(torch.OutOfMemoryError):
            model.audit({"features": X})


def test_an_output_that_is_no_tensor_is_refused(opened):
    hf = build()
    hf.forward = lambda features: (Newcomer.forward(hf, features), 0.0)
    with opened(hf) as model, pytest.raises(UnsupportedModel, match="no output of Newcomer to keep: .*got tuple"):
        model.run({"features": X})


# Options


def test_no_cache_is_asked_for_only_where_the_forward_takes_it(opened):
    class Cached(Newcomer):
        def forward(self, features: Tensor, use_cache: bool = True) -> Tensor:
            return super().forward(features) + use_cache

    hf = Cached()
    hf.config = types.SimpleNamespace(model_type="Newcomer")
    for kind, options in (("encoder", {"use_cache": False}), ("other", {})):
        with opened(hf, kind=kind) as model:
            assert model.spec.options == options
    with opened(build(), kind="encoder") as model:
        assert model.spec.options == {}
    with opened(build(), options={"scale": 2}) as model:
        assert model.spec.options == {"scale": 2}


# Maps of positions


def test_a_routing_map_has_positions_where_there_are_no_tokens(opened, tmp_path):
    with opened(build()) as model:
        found = moe.routing_map(model, {"features": X[:1]})
        run = model.run({"features": X[:1]})
        with pytest.raises(BadInput, match=r"no map of this: expected one text or input, .*got 2 inputs"):
            moe.routing_map(model, {"features": X})
    assert found.pos.values.tolist() == list(range(S)) and found.token.values.tolist() == [""] * S
    for layer in model.layers:
        for place in range(S):
            weights, ids = (getattr(run.routing[layer], name)[0, place].tolist() for name in ("weights", "ids"))
            one = found.sel(pos=place, layer=layer)
            assert int(one.heaviest_expert) == ids[weights.index(max(weights))]
            assert float(one.heaviest_share) == pytest.approx(max(weights) / sum(weights))


# Public names


def test_what_a_description_needs_is_public():
    for name in ("EXPERTS_POINTS", "ExpertsCall", "Input", "Output", "RouterOutput", "Site", "chooses", "run_experts"):
        assert name in adapters.__all__ and hasattr(adapters, name)
    assert inspect.signature(linear_gate).parameters["returns"].default == "out, logits"
