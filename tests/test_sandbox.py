"""Where NDIF's sandbox is told to edit: operations in modules' own code, as it has only copies of tensors.

The sandbox itself is run by ``tests/check_ndif.py``. Here the same places are used in this process, where every value
can be compared.
"""

from functools import partial

import pytest
import torch
from nnsight import NNsight, TransformersModel

import moe_interp as moe
from moe_interp.adapters import describe
from moe_interp.errors import MoEError
from moe_interp.hosts import choices, sandbox, stock
from tests import tiny
from tests.edits import change
from tests.served import tokenizer

IDS = torch.randint(3, 92, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process were one of NDIF's runners."""
    assert not sandbox.sandboxed()
    for module in (sandbox, stock, choices):
        monkeypatch.setattr(module, "sandboxed", lambda: True)


PLACES = [*((family, "resid_mid") for family in tiny.FAMILIES)]
PLACES += [(family, "shared_out") for family in ("qwen2_moe", "deepseek_v2", "deepseek_v3")]


@pytest.mark.parametrize("family, point", PLACES)
def test_values_are_edited_where_the_code_makes_them(family, point, inside):
    hf = tiny.build(family)
    with moe.wrap(hf) as model:
        layer = model.layers[1]
        plain = model.run(IDS, read=point)
        expected = model.run(IDS, edit=moe.apply(point, partial(change, point), layers=layer)).logits
    lm = NNsight(hf)
    points = stock.stock_points(lm, stock.reached(describe(hf)))
    with torch.no_grad(), lm.trace(input_ids=IDS, use_cache=False):
        value = getattr(points.layers[layer], point).clone().save()
    with torch.no_grad(), lm.trace(input_ids=IDS, use_cache=False):
        setattr(points.layers[layer], point, change(point, getattr(points.layers[layer], point)))
        logits = lm.output.logits.save()
    assert torch.equal(value, plain[point, layer])
    assert (expected - plain.logits).abs().max() > 1e-3
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_choice_is_edited_at_its_top_k_or_refused(family, inside):
    hf = tiny.build(family)
    lm = TransformersModel(hf, tokenizer=tokenizer())
    router = describe(hf).moe(describe(hf).moe_layers[1]).router
    found = sandbox.last_topk(lm.get(router).source)
    with moe.wrap(hf, tokenizer()) as here:
        layer = here.layers[1]
        chosen = here.run("hello").routing[layer].ids[0, -1].tolist()
        expert, other = chosen[0], next(one for one in range(8) if one not in chosen)
        edits = {
            "mask": moe.mask(layer=layer, expert=expert),
            "force": moe.force([other], layer=layer),
            "random": moe.randomize(layer=layer, weights="fresh"),
        }
        expected = {name: here.run("hello", edit=edit) for name, edit in edits.items()}
        plain = here.run("hello").logits
    away = moe.wrap(lm, remote="local")
    for name, edit in edits.items():
        if found is None:
            assert family == "deepseek_v2"
            with pytest.raises(
                MoEError, match="the choice of the router at layer .* cannot be edited in a server's sandbox"
            ):
                away.run("hello", edit=edit)
            continue
        run = away.run("hello", edit=edit)
        assert (expected[name].logits - plain).abs().max() > 1e-4
        assert (run.logits - expected[name].logits).abs().max() <= 1e-6 * plain.abs().max(), name
        assert run.touched == expected[name].touched
