"""torch.compile: an opened model runs eagerly, whatever was compiled before or is compiled after."""

import pytest
import torch
import torch._dynamo

import moe_interp as moe
from tests import tiny

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
LAYER = 2
EDITS = {
    "ablation": moe.ablate(layer=LAYER, expert=3),
    "routing": moe.apply("router_logits", lambda logits: -logits, layers=LAYER),
}


def compiled_call(hf, backend):
    return torch.compile(hf, backend=backend)


def compiled_in_place(hf, backend):
    hf.compile(backend=backend)
    return hf


def compiled_by_layer(hf, backend):
    for layer in hf.model.layers:
        layer.compile(backend=backend)
    return hf


WAYS = {"torch.compile(model)": compiled_call, "model.compile()": compiled_in_place, "layers": compiled_by_layer}
BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(hf) -> torch.Tensor:
    with torch.no_grad():
        return hf(input_ids=IDS, use_cache=False).logits


def outcomes(model: moe.MoEModel) -> dict:
    found = dict(model.run(IDS, read=list(model.points)).values)
    found |= {name: model.run(IDS, edit=edit).logits for name, edit in EDITS.items()}
    found["generated"] = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_what_was_compiled_before_does_not_run_while_open_and_is_back_afterwards(way, backend):
    with moe.wrap(tiny.build("qwen2_moe")) as model:
        expected = outcomes(model)
    hf = tiny.build("qwen2_moe")
    compiled = WAYS[way](hf, backend)
    before = logits(compiled)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    with moe.wrap(compiled) as model:
        assert model.hf is hf
        got = outcomes(model)
        assert model.audit().passed
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
    assert "forward" not in vars(hf)
    assert torch.equal(logits(compiled), before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # the code that was there


def test_hooks_that_come_after_compiling_an_open_model_are_called():
    hf = tiny.build("olmoe")
    with moe.wrap(hf) as model:
        compiled = torch.compile(hf, backend="eager")
        plain = logits(compiled)
        seen = []
        point = hf.model.layers[LAYER].moe_points.expert_out
        handle = point.register_forward_hook(lambda module, args, value: seen.append(value.clone()))
        assert torch.equal(logits(compiled), plain)
        assert torch.equal(seen[0].flatten(), model.run(IDS, read="expert_out")["expert_out", LAYER].flatten())
        handle.remove()
        edited = model.run(IDS, edit=EDITS["ablation"]).logits
    assert (edited - plain).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["model.compile()", "layers"])
def test_compiling_in_place_while_open_drops_no_edit(way):
    with moe.wrap(tiny.build("qwen2_moe")) as model:
        expected = outcomes(model)
    calls = []

    def counting(graph, inputs):
        calls.append(graph)
        return graph.forward

    with moe.wrap(tiny.build("qwen2_moe")) as model:
        WAYS[way](model.hf, counting)
        got = outcomes(model)
    assert not calls
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


def test_compiling_an_open_model_as_one_graph_is_refused_by_torch():
    hf = tiny.build("olmoe")
    with moe.wrap(hf), pytest.raises(RuntimeError, match="no compiled frames|moe_interp"):
        logits(torch.compile(hf, backend="eager", fullgraph=True))


def test_the_plain_run_of_the_audit_is_not_compiled_either():
    calls = []

    def counting(graph, inputs):
        calls.append(graph)
        return graph.forward

    hf = tiny.build("olmoe")
    hf.compile(backend=counting)
    with moe.wrap(hf) as model:
        with model.plain():
            logits(hf)
        assert not calls
    logits(hf)
    assert calls
