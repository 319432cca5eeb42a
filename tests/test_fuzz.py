"""Wrong values for every argument of every public function: an error of ours, at once, and nothing left behind.

`tests/doors.py` has the functions and the values. A value that is accepted must be in `FINE`, by the name of the
argument, or in `ALSO_FINE`, by function and argument: none is accepted in silence.
"""

import os
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_interp as moe
from tests.doors import IDS, Call, Things, bad_values, calls, things

LONGEST = 10.0  # seconds for one call
SLOW = ("load", "report", "router_saturation", "reference_saturation", "expert_similarity", "MoEModel.audit")
WRITES = ("path", "state", "resume")

@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Things]:
    """Models, a corpus and a run; nothing asks the hub."""
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("TQDM_DISABLE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.chdir(tmp_path_factory.mktemp("here"))
        yield things(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def table(on: Things) -> dict[str, Call]:
    return calls(on)


def pairs(on: Things, table: dict[str, Call]) -> list[tuple[str, str, str]]:
    """Every argument of every function with every value, by their names."""
    labels = list(bad_values(on))
    return [(name, argument, label) for name, call in table.items() for argument in call.arguments for label in labels]


def is_fine(name: str, argument: str, label: str) -> bool:
    """Whether a value is right for an argument."""
    return label in ALSO_FINE.get(f"{name}.{argument}", FINE.get(argument, ()))


def outcome(call: Call, changed: dict[str, Any]) -> str:
    """What a call came to: "done", "refused", "own fault" of a function that was given, or what else was raised."""
    begun = time.monotonic()
    try:
        call(**changed)
        found = "done"
    except moe.MoEError:
        found = "refused"
    except Exception as error:
        found = "own fault" if CALLED & changed.keys() else f"{type(error).__name__}: {error}"
    return found if time.monotonic() - begun < LONGEST else f"{found} after {time.monotonic() - begun:.0f} s"


@contextmanager
def nothing_left(on: Things, writes: bool) -> Iterator[None]:
    """Check that the model computes what it did, and that no file is new, unless one was asked for."""
    before = on.hf(IDS).logits, hooks(on), files()
    yield
    assert not on.model._standing
    assert torch.equal(on.hf(IDS).logits, before[0])
    assert hooks(on) == before[1]
    assert writes or files() == before[2]


def hooks(on: Things) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in on.hf.modules())


def files() -> list[str]:
    return sorted(os.listdir("."))


def tried(on: Things, table: dict[str, Call], chosen: list[tuple[str, str, str]]) -> Counter[str]:
    """How many calls came to what; anything that is wrong fails with a list of it."""
    counts, wrong = Counter[str](), []
    for name, argument, label in chosen:
        value = bad_values(on)[label]  # made anew: some are used up
        with nothing_left(on, argument in WRITES):
            found = outcome(table[name], {argument: value})
        counts[found] += 1
        due = {"done"} if is_fine(name, argument, label) else {"refused"}
        if found not in due | ({"own fault"} if label in FAULTY else set()):
            wrong.append(f"{name}({argument}={label}): {found}")
    assert not wrong, f"{len(wrong)} of {len(chosen)}:\n" + "\n".join(wrong)
    return counts
