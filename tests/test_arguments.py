"""Arguments are held to the annotations: what is accepted, what a refusal says, and what stays as it was."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

import moe_interp as moe
from moe_interp import stats
from moe_interp.analyses.collect import Options
from moe_interp.arguments import CheckedLater, Count, Otherwise, Range, checked, checked_fields, frames_up
from moe_interp.errors import BadInput
from moe_interp.run import Indices
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build


def refusal(annotation: Any, given: Any) -> str | None:
    """What is said of a value that does not fit an annotation; None where it fits."""

    def function(value):
        return value

    function.__annotations__ = {"value": annotation}
    function.__signature__ = inspect.Signature(
        [inspect.Parameter("value", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)]
    )
    try:
        checked(function)(given)
    except BadInput as error:
        return f"{error.expected}, got {error.got}" + (f". {error.do}" if error.do else "")
    return None


VECTOR = torch.ones(3)
FITS: list[tuple[Any, list[Any]]] = [
    (bool, [True, False]),
    (int, [0, -3, np.int32(4), np.uint8(4), torch.tensor(5), torch.tensor(250, dtype=torch.uint8)]),
    (float, [0, 1.5, np.float32(2), torch.tensor(0.5), np.array(1.5), 2**70]),
    (str, ["", "a", "\ud800"]),
    (Literal["a", "b"], ["a", "b"]),
    (int | None, [None, 3]),
    (Path, [Path("a")]),
    (str | Path, ["a", Path("a")]),
    (Sequence[str], [[], ["a"], ("a", "b"), np.array(["a"])]),
    (Iterable[str], [["a"], {"a"}, iter(["a"]), iter([3])]),
    (Sequence[int], [[1], range(3), np.arange(3), torch.arange(3)]),
    (tuple[int, int], [(1, 2), [1, np.int64(2)]]),
    (tuple[int, ...], [(), (1, 2, 3)]),
    (Mapping[str, int], [{}, {"a": 1}]),
    (Callable[[int], int], [abs, lambda a: a, lambda *a: a, torch.neg, partial(max, 1)]),
    (Callable[..., int], [lambda: 1, dict]),
    (Indices, [None, 3, [1, 2], np.array([1]), torch.tensor([1, 2]), range(2), {1}]),
    (Tensor, [VECTOR]),
    (Float[Tensor, " D"], [VECTOR]),
    (Float[Tensor, "*rows D"], [VECTOR, torch.ones(2, 3, 4)]),
    (Int[np.ndarray, "N E"], [np.ones((2, 3), int)]),
    (Annotated[int, Range(2, 5)], [2, 5]),
    (Annotated[float, Range(0, above=True)], [0.001, 9]),
    (Annotated[int, CheckedLater()], ["anything"]),
    (Any, [None, object()]),
]
DO_NOT_FIT: list[tuple[Any, Any, str]] = [
    (bool, 1, "True or False, got 1"),
    (bool, "no", "True or False, got 'no'"),
    (bool, np.True_, "True or False, got np.True_"),
    (int, True, "a whole number, got True"),
    (int, 1.0, "a whole number, got 1.0"),
    (int, "5", "a whole number, got '5'"),
    (int, 2**63, "a whole number, got 9223372036854775808. Whole numbers have 64 bits here."),
    (int, torch.tensor(True), "a whole number, got torch.bool values of shape ()"),
    (int, torch.tensor([5]), "a whole number, got torch.int64 values of shape (1,)"),
    (float, float("nan"), "a finite number, got nan"),
    (float, True, "a finite number, got True"),
    (float, "1.5", "a finite number, got '1.5'"),
    (float, 1j, "a finite number, got 1j"),
    (float, 10**400, "a finite number, got 1000"),
    (str, b"x", "a string, got b'x'"),
    (Literal["a", "b"], "c", "one of 'a', 'b', got 'c'"),
    (bool | Literal["both"], "yes", "True or False or 'both', got 'yes'"),
    (int | None, "a", "a whole number or None, got 'a'"),
    (str | Path, 3, "a string or a path, got 3"),
    (Sequence[str], "abc", "a list of strings, got 'abc'"),
    (Sequence[str], ["a", 3], "a list of strings, got ['a', 3]"),
    (Sequence[str], iter(["a"]), "a list of strings, got <list_iterator"),
    (Sequence[str], torch.zeros(0), "a list of strings, got torch.float32 values of shape (0,)"),
    (Iterable[int], {"a": 1}, "a list of whole numbers, got {'a': 1}"),
    (tuple[int, int], (1,), "(a whole number, a whole number), got (1,)"),
    (Mapping[str, int], {"a": "b"}, "a mapping from strings to whole numbers, got {'a': 'b'}"),
    (Callable[[int], int], lambda: 1, "a function of 1 argument, got <function"),
    (Callable[[int, int], int], 3, "a function of 2 arguments, got 3"),
    (Float[Tensor, " D"], torch.ones(2, 3), "a tensor of floats, [D], got torch.float32 values of shape (2, 3)"),
    (Float[Tensor, " D"], torch.arange(3), "a tensor of floats, [D], got torch.int64 values"),
    (Int[np.ndarray, "N E"], [[1]], "an array of whole numbers, [N, E], got [[1]]"),
    (Annotated[int, Range(2, 5)], 6, "a whole number from 2 to 5, got 6"),
    (Count, 0, "a whole number of at least 1, got 0"),
    (Count | None, 0, "a whole number of at least 1 or None, got 0"),
    (Annotated[float, Range(0, 1, above=True)], 0.0, "a finite number above 0 and up to 1, got 0.0"),
    (Annotated[int, Otherwise("Count them.")], "x", "a whole number, got 'x'. Count them."),
    (int, torch.nn.Linear(2, 2), "a whole number, got the module Linear"),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "values"), FITS, ids=[str(one[0]) for one in FITS])
def test_what_fits_is_accepted(annotation, values):
    assert [refusal(annotation, one) for one in values] == [None] * len(values)


@pytest.mark.parametrize(("annotation", "given", "says"), DO_NOT_FIT)
def test_what_does_not_fit_is_refused(annotation, given, says):
    found = refusal(annotation, given)
    assert found is not None and found.startswith(says)


def test_a_function_stays_what_it_was():
    def function(first: int, *rest: str, last: Count = 1, untold=None, **more: Any) -> tuple[Any, ...]:
        """Its own words."""
        return first, rest, last, untold, more

    wrapped = checked(function)
    assert inspect.signature(wrapped) == inspect.signature(function)
    assert (wrapped.__doc__, wrapped.__name__) == ("Its own words.", "function")
    assert wrapped(3, "a", "b", untold=4, x=5) == (3, ("a", "b"), 1, 4, {"x": 5})
    with pytest.raises(BadInput, match="invalid rest for .*function: expected a string, got 7"):
        wrapped(3, "a", 7)
    with pytest.raises(BadInput, match="invalid first"):  # of several, the first
        wrapped("a", 7, last=0)
    with pytest.raises(TypeError, match="missing"):
        wrapped()


def test_defaults_are_the_business_of_the_function():
    @checked
    def function(value: int = "auto"):  # type: ignore[assignment]
        return value

    assert function() == "auto"


def test_iterators_are_not_consumed_and_lists_are_not_copied():
    @checked
    def function(some: Iterable[int], others: Sequence[int]):
        return some, others

    some, others = iter([1, 2]), [3, 4]
    found = function(some, others)
    assert found[0] is some and list(some) == [1, 2] and found[1] is others


def test_numbers_of_numpy_and_torch_are_handed_on_as_pythons_own():
    @checked
    def function(whole: int | None, real: float):
        return whole, real

    for whole, real in ((np.int64(3), np.float32(0.5)), (torch.tensor(3), torch.tensor(0.5)), (3, 0.5)):
        found = function(whole, real)
        assert found == (3, 0.5) and [type(one) for one in found] == [int, float]


def test_a_warning_points_at_who_called():
    @checked
    def function(value: int):
        warnings.warn(f"{value}", stacklevel=frames_up(2))

    with pytest.warns(UserWarning, match="3") as told:
        function(3)
    assert told[0].filename == __file__
    assert told[0].lineno == inspect.currentframe().f_lineno - 2


def test_an_annotation_that_is_not_understood_is_an_error_of_the_author():
    @checked
    def function(value: type[int]):
        return value

    with pytest.raises(TypeError, match="cannot check arguments annotated type"):
        function(int)


def test_fields_of_a_dataclass():
    @checked_fields
    @dataclass(frozen=True)
    class Some:
        count: Count = 1

    assert Some(2).count == 2
    with pytest.raises(BadInput, match="invalid count for .*Some: expected a whole number of at least 1, got 0"):
        Some(0)
    with pytest.raises(BadInput, match="invalid batch_tokens for Options"):
        Options(batch_tokens=0)


def test_every_public_function_is_checked():
    functions = [getattr(moe, name) for name in moe.__all__] + [getattr(stats, name) for name in stats.__all__]
    open_ended = {
        one.__name__
        for one in functions
        if inspect.isfunction(one) and not inspect.getsourcefile(one.__code__).endswith("arguments.py")
    }
    assert open_ended == NOT_CHECKED


# What checks its one argument itself, and what takes NaN.
NOT_CHECKED = {"trace_points", "permutation_p", "spearman_interval"}


def test_what_is_something_else_is_told_what_to_do():
    hf, texts = build("olmoe"), ["one", "two"]
    with moe.wrap(hf, StubTokenizer()) as model:
        corpus = moe.Corpus.from_texts({"all": texts})
        for given, says in (
            (hf, "an opened model, got the module OlmoeForCausalLM. Open it: moe.wrap"),
            ("olmoe", "an opened model, got 'olmoe'. Load it: moe.load"),
            (corpus, "an opened model, got Corpus of 2 documents"),
        ):
            with pytest.raises(BadInput, match=f"invalid model for routing: expected {says}"):
                moe.routing(given, corpus)
        for given, says in (
            (texts, r"a corpus, got \['one', 'two'\]. Make one: moe.Corpus.from_texts"),
            ("texts.jsonl", "a corpus, got 'texts.jsonl'. Read a file: moe.read_corpus"),
            ({"all": texts}, "a corpus, got {'all': .*}. Make one: moe.Corpus.from_texts"),
            (model, "a corpus, got MoEModel"),
        ):
            with pytest.raises(BadInput, match=f"invalid corpus for routing: expected {says}"):
                moe.routing(model, given)
        with pytest.raises(BadInput, match="invalid run for patch: expected a run, got MoEModel.* Make one: model.run"):
            moe.patch(model, layer=0, expert=0)


def test_arguments_that_would_be_ignored_are_refused():
    means = {(0, 1): torch.ones(64)}
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        run = model.run([3, 4, 5], read="expert_out")
        for how in ("zero", "resample", "forbid"):
            with pytest.raises(BadInput, match=f"mean is not used by how='{how}': expected no mean, or how='mean'"):
                moe.ablate(layer=0, expert=1, how=how, mean=means, run=run if how == "resample" else None)
            with pytest.raises(BadInput, match="mean is not used"):
                moe.expert_effects(model, [3, 4, 5], how=how, mean=means)
        for how in ("zero", "mean", "forbid"):
            with pytest.raises(BadInput, match=f"run is not used by how='{how}': expected no run, or how='resample'"):
                moe.ablate(layer=0, expert=1, how=how, run=run)
        with pytest.raises(BadInput, match="options for moe.load are not used: expected checkpoints to load"):
            moe.router_saturation([model, model], moe.Corpus.from_texts({"a": ["ab"]}), dtype="float32")
