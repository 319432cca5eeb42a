"""Wrapped, edited, traced and dropped models leave memory and hooks where they were."""

import gc
import weakref
from typing import Any

import pytest
import torch
from nnsight import NNsight

import moe_interp as moe
from moe_interp.hosts.hooked import trace_points
from tests.bridges import bridged
from tests.test_host import traces
from tests.tiny import build

IDS = torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(2))
many = pytest.mark.parametrize("times", [30, pytest.param(1000, marks=pytest.mark.slow)])


def small() -> Any:
    return build("olmoe", num_hidden_layers=1)


def grown(job: Any, times: int) -> int:
    """How many objects a job adds, each time that it is done, over so many times."""
    for _ in range(10):
        job()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(times):
        job()
    gc.collect()
    return len(gc.get_objects()) - before


def wrapped(hf: Any) -> None:
    with moe.wrap(hf) as model:
        model.run(IDS)


def forgotten(hf: Any) -> None:
    moe.wrap(hf).run(IDS)  # never closed: another one goes on with the hooks that are there


def abandoned(hf: Any) -> None:
    model = moe.wrap(hf)
    model.edit(moe.ablate(layer=0, expert=1)).__enter__()
    hf(input_ids=IDS)
    model.close()


def traced(hf: Any) -> None:
    lm = NNsight(hf)
    with trace_points(lm) as points, torch.no_grad(), lm.trace(IDS):
        points.layers[0].expert_out.save()


def failing(hf: Any) -> None:
    def fail(value: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mine")

    with moe.wrap(hf) as model, pytest.raises(RuntimeError, match="mine"):
        model.run(IDS, edit=[moe.ablate(layer=0, expert=1), moe.apply("router_logits", fail)])


@many
@pytest.mark.parametrize("job", [wrapped, forgotten, abandoned, traced, failing])
def test_what_is_done_to_a_model_again_and_again(job, times):
    hf = small()
    first = moe.wrap(hf)
    opened = traces(hf)
    assert grown(lambda: job(hf), times) < times // 2  # fewer than one object each time
    hooks = {name: count for name, count in traces(hf)["hooks"].items() if count != (0, 0)}
    assert hooks == {name: count for name, count in opened["hooks"].items() if count != (0, 0)}
    first.close()


@many
def test_models_that_are_dropped_are_freed(times):
    def job() -> None:
        model = moe.wrap(small())
        with model.edit(moe.ablate(layer=0, expert=1)):
            model.run(IDS)
        model.edit(moe.ablate(layer=0, expert=1)).__enter__()

    assert grown(job, times) < times // 2


@pytest.mark.parametrize("way", ["wrap", "trace_points", "attach", "watch", "load"])
def test_nothing_keeps_a_model_that_nobody_holds(way):
    hf = small() if way != "load" else None
    match way:
        case "wrap":
            holder: Any = moe.wrap(hf)
            holder.run(IDS, edit=moe.randomize(layer=None))
        case "trace_points":
            holder = trace_points(NNsight(hf))
        case "attach":
            holder = moe.attach(bridged(hf))
        case "watch":
            holder = moe.RoutingWatch(hf, every=1)
            holder.begin(0)
            hf(input_ids=IDS)
        case "load":
            holder = moe.load()
            hf = holder.hf
    kept = weakref.ref(hf)
    del holder, hf
    gc.collect()
    assert kept() is None
