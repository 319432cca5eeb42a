"""Wrong values for every argument of every public function: an error of ours, at once, and nothing left behind.

`tests/public_calls.py` has the functions and the values. A value that is accepted must be in `FINE`, by the name of the
argument, or in `ALSO_FINE`, by function and argument: none is accepted in silence.
"""

import os
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_interp as moe
from tests.public_calls import IDS, Call, Things, bad_values, calls, things

LONGEST = 10.0  # seconds for one call
SLOW = ("load", "report", "reference_saturation", "expert_similarity", "MoEModel.audit", "activation_patching")
WRITES = ("path", "state", "resume")

# ---- what is right -----------------------------------------------------------------------------------------

WHOLE = ("numpy 2", "tensor 2")  # numbers of numpy and torch, wherever a number is due
REAL = ("-1", "0", "1.5", "0-d", "huge", "large", *WHOLE)
COUNT = ("large", *WHOLE)
TEXT = ("word", "NUL", "surrogate", "empty text")
LAYERS = ("None", "0", *WHOLE)
SWITCH = ("True",)
CALLABLE = ("class", "module", "raw model")  # they can be called; what they make of it is their own fault
FINE: dict[str, tuple[str, ...]] = {
    "model": ("model",), "corpus": ("corpus",), "corrupted": ("None",), "held_out": ("None",), "lens": ("None",),
    "mean": ("None",), "run": ("None",), "directions": ("None",), "tokenizer": ("None",), "revisions": ("None",),
    "name": ("None", *TEXT), "units": TEXT, "names": ("None", "list of words", "array of words"), "options": ("None",),
    "alarms": ("None", "empty dict"), "on_alarm": ("None", *CALLABLE), "to": ("None", *CALLABLE),
    "adapter": CALLABLE, "domain": ("None", "word", "empty text"), "domain_field": ("None",), "domains": ("None",),
    "source": ("word", "empty text"), "other": ("word", "empty text"), "resume": ("None", "word"),
    "state": ("None", "word"), "path": ("word",), "point": ("None",),
    "inputs": ("word", "NUL", "list of words", "uneven rows"), "text": ("word", "NUL"),
    "edit": ("edit", "empty list", "empty tuple"), "edits": ("edit", "empty list", "empty tuple"),
    "read": ("empty list", "empty tuple"), "interventions": ("empty list", "empty tuple"),
    "expert": ("0", *WHOLE), "experts": ("0", *WHOLE), "layer": LAYERS, "layers": LAYERS,
    "positions": ("None", "-1", "0", *WHOLE), "position": ("-1", "0", *WHOLE), "subject": ("-1", "0", *WHOLE),
    "pos_slice": ("None", "-1", "0", *WHOLE), "tokens": ("None", "marks"), "rank": ("0", *WHOLE),
    "incorrect_tokens": ("None", "0", *WHOLE), "answer": ("0", *WHOLE),
    "answers": ("0", *WHOLE), "wrong": ("0", *WHOLE), "number": ("-1", "0", *COUNT),
    "by": REAL, "std": ("0", "1.5", "0-d", "huge", *COUNT), "noise": ("None", "1.5", "0-d", "huge", *COUNT),
    "learning_rate": ("1.5", "0-d", "huge", *COUNT), "percentile": ("0", "1.5", "0-d", *WHOLE),
    "seed": ("0", *COUNT), "resamples": WHOLE, "max_tokens": ("None", *COUNT), "batch_tokens": COUNT,
    "tokens_per_document": COUNT, "top": WHOLE, "examples": WHOLE, "partners": WHOLE, "at_least": WHOLE,
    "folds": WHOLE, "blocks": WHOLE, "every": COUNT, "patience": COUNT, "steps": WHOLE, "sample": ("None", *COUNT),
    "samples": WHOLE, "size": WHOLE, "most": COUNT, "chunk": WHOLE, "null_directions": WHOLE,
    "null_pairs": ("0", *WHOLE),
    "random_routers": WHOLE, "limit": ("None", *COUNT), "scored": ("None", *COUNT), "per_domain": COUNT,
    "max_new_tokens": ("None", *WHOLE), "k": WHOLE, "ks": ("None", *WHOLE), "values": (),
    "everywhere": SWITCH, "grad": SWITCH, "incl_embeds": SWITCH, "incl_remainder": SWITCH, "mlp_input": SWITCH,
    "neurons": SWITCH, "output": SWITCH, "per_layer": SWITCH, "renormalise": SWITCH, "return_labels": SWITCH,
    "special_tokens": SWITCH, "stop": SWITCH, "trust_server": SWITCH, "trust_remote_code": SWITCH,
}  # fmt: skip
NEED_A_MODEL = [
    "attach", "load", "TunedLens.load", "wrap", "trace_points", "register_adapter", "to_tensorboard", "Run.top_tokens",
]  # fmt: skip
ALSO_FINE: dict[str, tuple[str, ...]] = {
    "KL.position": ("None", "-1", "0", *WHOLE),
    "KL.name": TEXT,
    "NLL.name": TEXT,
    "Corpus.from_token_ids.domains": ("None", "uint8"),
    "decompose_resid.mlp_input": (),
    "decompose_resid.by": (),
    "stack_expert_results.by": (),
    "token_identity.max_tokens": ("None", "large"),
    "ablate to the mean.mean": (),
    "ByToken.of.given": ("floats", "marks", "uint8"),
    "Corpus.__add__.other": ("corpus",),
    "MoEModel.audit.inputs": ("None", "word", "NUL", "list of words", "uneven rows"),
    "MoEModel.experts.layer": ("0", *WHOLE),
    "MoEModel.weights.layer": ("0", *WHOLE),
    "Routing.slots_of.expert": ("0", *COUNT),
    "Routing.uses.expert": ("0", *COUNT),
    "RoutingWatch.model": ("model", "raw model"),
    "Run.contribution.expert": ("0", *COUNT),
    "Run.contribution.layer": ("0", *WHOLE),
    "Run.expert.expert": ("0", *COUNT),
    "Run.expert.layer": ("0", *WHOLE),
    "Run.heaviest.layer": ("0", *WHOLE),
    "Run.whole.layer": ("0", *WHOLE),
    "Run.whole.point": (),
    "TunedLens.into.layer": ("0", *WHOLE),
    "TunedLens.out_of.layer": ("0", *WHOLE),
    "ablate by another run.run": ("run",),
    "ablate by another run.seed": ("-1", "0", *COUNT),
    "ablate to the mean.expert": (),
    "ablate to the mean.layer": WHOLE,
    "ablate to the mean.seed": ("-1", "0", *COUNT),
    "ablate.expert": ("None", "0", *WHOLE),
    "ablate.seed": ("-1", "0", *COUNT),
    "activation_patching.corrupted": (),
    "apply.point": (),
    "attribution_patching.inputs": ("word", "NUL"),
    "bias.expert": ("None", "0", *WHOLE),
    "coalitions.experts": (),
    "decompose_resid.layer": ("None", "-1", "0", *WHOLE),
    "expert_effects.inputs": ("word", "NUL"),
    "expert_similarity.tokens": (),
    "expert_similarity.weights": SWITCH,
    "from_json.text": (),
    "get_act_patch_expert_out.layers": ("None", "0"),
    "load.name": ("None",),
    "logit_attribution.tokens": ("0", "list of words", "array of words", *WHOLE),
    "logit_attrs.tokens": ("0", *WHOLE),
    "logit_directions.tokens": ("0", *WHOLE),
    "neuron_lens.layer": ("0", *WHOLE),
    "noise.point": (),
    "noise.seed": ("-1", "0", *COUNT),
    "patch.run": ("run",),
    "patch_route.layer": ("0", *WHOLE),
    "patch_route.run": ("run",),
    "path_patching.corrupted": (),
    "profile.layer": ("0", *WHOLE),
    "randomize.seed": ("-1", "0", *COUNT),
    "read_corpus.path": (),
    "read_corpus.text": (),
    "report.text": ("None", "word", "NUL"),
    "routing_from_counts.domains": (),
    "routing_from_counts.layers": ("None",),
    "routing_from_counts.model": TEXT,
    "routing_from_counts.tokens": WHOLE,
    "scale.expert": ("None", "0", *WHOLE),
    "select.point": (),
    "select.top": ("None", *WHOLE),
    "stack_expert_results.layer": ("None", "-1", *WHOLE),
    "swap.experts": (),
    "swap.layers": ("None",),
    "train_tuned_lens.steps": COUNT,
    "tuned_lens.name": (),
    "tuned_lens_quality.lens": (),
    "wrap.model": ("raw model",),
}
CALLED = {"fn", "metric", "patching_metric", "label", "mark", "keep", "adapter"}


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Things]:
    """Models, a corpus and a run; nothing asks the hub, and annotations are not run: users have the package alone."""
    import huggingface_hub.constants

    annotations = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("TQDM_DISABLE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.chdir(tmp_path_factory.mktemp("here"))
        yield things(tmp_path_factory.mktemp("data"))
    jaxtyping.config.update("jaxtyping_disable", annotations)


@pytest.fixture(scope="module")
def table(on: Things) -> dict[str, Call]:
    return calls(on)


def pairs(on: Things, table: dict[str, Call]) -> list[tuple[str, str, str]]:
    """Every argument of every function with every value, by their names."""
    labels = list(bad_values(on))
    return [(name, argument, label) for name, call in table.items() for argument in call.arguments for label in labels]


def is_fine(name: str, argument: str, label: str) -> bool:
    """Whether a value is right for an argument."""
    by_name = () if name in NEED_A_MODEL else FINE.get(argument, ())
    return label in ALSO_FINE.get(f"{name}.{argument}", by_name)


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
    for name in files() if writes else ():
        os.remove(name)
    assert not on.model._standing
    assert torch.equal(on.hf(IDS).logits, before[0])
    assert hooks(on) == before[1]
    assert files() == before[2]


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
        if label in CALLABLE and argument in CALLED:
            due = {"refused", "done", "own fault"}
        if found not in due:
            wrong.append(f"{name}({argument}={label}): {found}")
    assert not wrong, f"{len(wrong)} of {len(chosen)}:\n" + "\n".join(wrong)
    return counts


# ---- tests -------------------------------------------------------------------------------------------------


def test_every_public_function_is_called(table):
    """With right arguments each gives a result, but for those whose good argument is an object that is none."""
    named = {name.split(".")[0].split(" ")[0] for name in table}
    public = {name for name in moe.__all__ if callable(getattr(moe, name))}
    assert (
        public - named == {"EditsElsewhere", "Family", "Intervention", "MoEError", "Routing", "Run", "sample"} - named
    )
    refused = [name for name, call in table.items() if outcome(call, {}) != "done"]
    assert refused == NEED_A_MODEL


def test_wrong_values_are_refused_at_once(on, table):
    """Of all that the slow test tries, a part that is the same in every run."""
    chosen = [one for one in pairs(on, table) if one[0] not in SLOW and zlib.crc32(".".join(one).encode()) % 16 == 0]
    counts = tried(on, table, chosen)
    assert counts.total() == len(chosen) > 800
    assert counts["refused"] > 700 and counts["done"] > 20


@pytest.mark.slow
def test_every_wrong_value_is_refused_for_every_argument(on, table):
    chosen = pairs(on, table)
    counts = tried(on, table, chosen)
    arguments = sum(len(call.arguments) for call in table.values())
    assert counts.total() == len(chosen) == arguments * len(bad_values(on)) > 15_000


@pytest.mark.slow
@settings(
    max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_several_wrong_values_are_refused_too(on, table, data):
    name = data.draw(st.sampled_from([name for name in table if name not in SLOW]))
    arguments = data.draw(st.lists(st.sampled_from(sorted(table[name].arguments)), min_size=1, max_size=4, unique=True))
    values = bad_values(on)
    labels = {argument: data.draw(st.sampled_from(sorted(values))) for argument in arguments}
    with nothing_left(on, bool({*WRITES} & labels.keys())):
        found = outcome(table[name], {argument: values[label] for argument, label in labels.items()})
    fine = all(is_fine(name, argument, label) for argument, label in labels.items())
    allowed = (
        {"refused"} | ({"done"} if fine else set()) | ({"own fault"} if {*CALLABLE} & {*labels.values()} else set())
    )
    assert found in allowed, (name, labels)
