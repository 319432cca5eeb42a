"""Ctrl-C at every line: afterwards the model, its modules and the process are as before."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import pytest
import torch
from torch._C import _pop_torch_function_stack
from torch._dynamo import eval_frame
from torch.overrides import _get_current_function_mode_stack

import moe_interp as moe
from moe_interp.hosts import eager
from moe_interp.hosts.modes import FirstLinear, StateKept
from tests.interrupts import Lines, numbers, run_under
from tests.test_host import traces
from tests.tiny import build

IDS = torch.randint(3, 90, (1, 5), generator=torch.Generator().manual_seed(2))
EDITS = [
    moe.top_k(4),
    moe.bias(layer=1, expert=2, by=3.0, on="logits"),
    moe.mask(layer=1, expert=1),
    moe.steer(torch.ones(64), layer=0, point="resid_mid"),
    moe.ablate(layer=0, expert=0),
]


def process() -> dict[str, Any]:
    """What of the process a forward pass could leave changed."""
    return {
        "modes": len(_get_current_function_mode_stack()),
        "grad": torch.is_grad_enabled(),
        "stance": eval_frame._stance.stance,
        "eager": list(eager._BEFORE),
        "context": {
            var.name: value for var, value in copy_context().items() if value and var.name.startswith("moe_interp")
        },
    }


def standing(model: moe.MoEModel) -> None:
    with model.edit(EDITS[:2]), model.edit(EDITS[2:], everywhere=True):
        model.hf(input_ids=IDS, use_cache=False)
        model.run(IDS)


def plain(model: moe.MoEModel) -> None:
    with model.plain(), model.plain():
        model.hf(input_ids=IDS, use_cache=False)


def collected(model: moe.MoEModel) -> None:
    moe.routing(model, moe.sample().take(1), max_tokens=8, resamples=2)


JOBS = {
    "run": lambda model: model.run(IDS, read=["expert_out", "router_logits"], edit=EDITS),
    "generate": lambda model: model.generate(IDS, edit=EDITS, max_new_tokens=2, do_sample=False),
    "edit": standing,
    "plain": plain,
    "effects": lambda model: moe.expert_effects(model, IDS, "kl"),
}


def small() -> Any:
    return build("qwen2_moe", num_hidden_layers=2, mlp_only_layers=[])


def check(job: Any, which: str) -> None:
    hf = small()
    with moe.wrap(hf) as model:
        expected, edited, opened = model.run(IDS).logits, model.run(IDS, edit=EDITS).logits, traces(hf)
        before = process()
        stopped = 0
        for number in numbers(lambda: job(model), which):
            lines = Lines(number)
            stopped += run_under(lines, lambda: job(model))
            where = lines.seen[-1]
            assert process() == before, where
            assert model._standing == [], where
            assert traces(hf) == opened, where
            assert torch.equal(model.run(IDS).logits, expected), where
            assert torch.equal(model.run(IDS, edit=EDITS).logits, edited), where
            assert process() == before, where
    assert stopped > (10 if which == "some" else 100)


@pytest.mark.parametrize("job", ["run", "generate", "edit", "plain"])
def test_an_interrupt_at_any_line_leaves_nothing_behind(job):
    check(JOBS[job], "some")


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_an_interrupt_at_each_line_leaves_nothing_behind(job):
    check(JOBS[job], "each")


def test_an_interrupt_while_a_corpus_is_collected():
    with moe.load() as model:
        expected, opened, before = model.run("a b c").logits, traces(model.hf), process()
        for number in list(numbers(lambda: collected(model), "some"))[::4]:
            run_under(Lines(number), lambda: collected(model))
            assert process() == before and traces(model.hf) == opened
            assert torch.equal(model.run("a b c").logits, expected)


def test_closing_that_was_interrupted_can_be_ended():
    hf = small()
    before, expected = traces(hf), hf(input_ids=IDS, use_cache=False).logits
    opened: list[moe.MoEModel] = []

    def close() -> None:
        opened[-1].close()

    opened.append(moe.wrap(hf))
    for number in numbers(close, "all"):
        opened.append(moe.wrap(hf))
        with_edits = opened[-1].edit(EDITS)
        with_edits.__enter__()
        run_under(Lines(number), close)
        opened[-1].close()
        assert traces(hf) == before
        assert torch.equal(hf(input_ids=IDS, use_cache=False).logits, expected)


def test_modes_and_gradients_that_an_interrupt_left_are_put_right():
    with pytest.raises(KeyboardInterrupt), StateKept():
        FirstLinear(lambda logits: logits).__enter__()
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt
    assert process() == process() | {"modes": 0, "grad": True}


def test_a_mode_that_torch_has_taken_off_already_is_not_left_again():
    with torch.device("meta"), FirstLinear(lambda logits: logits) as mode:
        _pop_torch_function_stack()  # as a signal can leave it: see `_Own`
        assert mode not in _get_current_function_mode_stack()
    assert process()["modes"] == 0


def test_a_stance_whose_turning_back_was_interrupted_is_turned_back_when_the_call_is_gone(monkeypatch):
    own, calls = torch.compiler.set_stance, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.compiler, "set_stance", interrupted)
    with suppress(KeyboardInterrupt):
        eager.eagerly(lambda: None)()
    gc.collect()
    assert len(calls) == 3 and eval_frame._stance.stance == "default" and not eager._BEFORE


SIGNALLED = """
    import os, signal, sys, threading, time, random
    import torch
    import moe_interp as moe
    from tests.test_host import traces
    from tests.test_interrupts import EDITS, IDS, process, small, standing, plain
    torch.set_num_threads(1)
    hf = small()
    model = moe.wrap(hf)
    jobs = [
        lambda: model.run(IDS, edit=EDITS), lambda: model.generate(IDS, edit=EDITS, max_new_tokens=2, do_sample=False),
        lambda: standing(model), lambda: plain(model),
    ]
    expected, edited = model.run(IDS).logits, model.run(IDS, edit=EDITS).logits
    opened, before, rng, stopped, wrong = traces(hf), process(), random.Random(int(sys.argv[1])), 0, 0
    for trial in range(int(sys.argv[2])):
        job = jobs[trial % len(jobs)]
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + rng.random() * 0.012)
            job()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            stopped += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        fine = process() == before and traces(hf) == opened and model._standing == []
        fine = fine and torch.equal(model.run(IDS).logits, expected)
        wrong += not (fine and torch.equal(model.run(IDS, edit=EDITS).logits, edited))
    print(stopped, wrong)
"""


def signalled(seed: int, trials: int) -> tuple[int, int]:
    """Runs that real signals interrupted at random times, and how many left something behind."""
    handler = "import signal\ndef stop(*_):\n    raise KeyboardInterrupt\nsignal.signal(signal.SIGALRM, stop)\n"
    code = handler + textwrap.dedent(SIGNALLED)
    done = subprocess.run(
        [sys.executable, "-c", code, str(seed), str(trials)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    stopped, wrong = map(int, done.stdout.split()[-2:])
    return stopped, wrong


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers: ends where Python has them")
@pytest.mark.parametrize("trials", [pytest.param(1250, marks=pytest.mark.slow), 100])
def test_real_signals_at_random_times_leave_nothing_behind(trials):
    stopped, wrong = signalled(0, trials)
    assert stopped > trials // 5 and wrong == 0
