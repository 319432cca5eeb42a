"""Shapes in signatures run in tests: else a wrong one would be noticed by nobody."""

from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from moe_interp.analyses.perplexity import nll_sums
from moe_interp.errors import BadInput
from moe_interp.run import Tokens
from moe_interp.stats import gini
from tests.shapes import shapes_alone


@pytest.mark.parametrize(
    "call",
    [
        lambda: nll_sums(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)),
        lambda: Tokens(mask=torch.ones(2, 3, dtype=torch.bool), index=torch.zeros(2, 4, dtype=torch.long)),
    ],
)
def test_a_wrong_shape_or_array_is_an_error(call):
    with pytest.raises(TypeCheckError):
        call()


def test_an_array_of_another_library_is_told_in_our_words():
    with pytest.raises(BadInput, match="invalid counts for gini: expected an array of numbers"):
        gini(torch.ones(3))


def test_only_what_names_a_shape_is_decorated():
    def plain(count: int) -> int:
        return count

    def shaped(value: Float[Tensor, "B S"] | None = None, **others: Any) -> int:
        return 1

    def refuse(function: Any) -> Any:
        raise AssertionError(f"{function} is decorated")

    assert shapes_alone(typechecker=refuse)(plain) is plain
    with pytest.raises(AssertionError, match="shaped"):
        shapes_alone(shaped, typechecker=refuse)
