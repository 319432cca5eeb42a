"""Show in an error where two texts that should have as many tokens differ: one above the other."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from moe_interp.encode import token_text

_BEFORE, _AFTER = 4, 8  # how many tokens are shown before and after the first difference
_WIDEST = 24


def real_ids(ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> list[list[int]]:
    """The ids [B, S] of each text without its padding."""
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def side_by_side(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], tokenizer: Any, names: tuple[str, str]
) -> str:
    """Show the first pair of texts with different numbers of tokens: a line each, with a bar where they first differ.

    Tokens far from the bar are left out.

    Args:
        first, second: token ids of texts that should pair up.
        tokenizer: gives the tokens' texts; ids are shown without it.
        names: what the two are called.
    """
    pairs = zip(first, second, strict=False)
    number, (one, other) = next((n, pair) for n, pair in enumerate(pairs) if len(pair[0]) != len(pair[1]))
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = "… " * (same > _BEFORE) + _listed(one[max(0, same - _BEFORE) : same], tokenizer)
    width = max(map(len, names)) + 1
    lines = [
        f"  {name + ':':<{width}} {begin + ' ' if begin else ''}| {_rest(ids[same:], tokenizer)}"
        for name, ids in zip(names, (one, other), strict=True)
    ]
    return f"Of text {number} they differ from token {same} on:\n" + "\n".join(lines)


def _rest(ids: Sequence[int], tokenizer: Any) -> str:
    more = f" … {len(ids) - _AFTER} more" if len(ids) > _AFTER else ""
    return (_listed(ids[:_AFTER], tokenizer) or "(end)") + more


def _listed(ids: Sequence[int], tokenizer: Any) -> str:
    return " ".join(str(one) if tokenizer is None else _shown(token_text(tokenizer, one)) for one in ids)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…")
