"""Answers: single tokens that a metric, a lens or an attribution asks about, each given by its id or its text."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Int
from torch import Tensor

from moe_interp.analyses.functions import kind
from moe_interp.arguments import CheckedLater, index, is_whole
from moe_interp.encode import GIVE_TOKENIZER, token_text
from moe_interp.errors import BadInput
from moe_interp.model import MoEModel
from moe_interp.paths import lone_surrogate

Answers = Annotated[int | str | Sequence[int | str], CheckedLater()]
"""One token for all texts, or several, one for each text: ids, texts of exactly one token, or both."""


def as_answers(given: Any, what: str, form: str) -> tuple[int | str, ...]:
    """Answers as a tuple of ids and texts.

    Args:
        given: what a user wrote.
        what: what the answers are for, for the error.
        form: how to write it, for the error.

    Raises:
        BadInput: neither ids nor texts, or none at all.
    """
    alone = _id_or_text(given)
    listed = [alone] if alone is not None else list(given) if isinstance(given, list | tuple) else []
    found = [one for one in map(_id_or_text, listed) if one is not None]
    if not found or len(found) != len(listed):
        raise BadInput(
            f"{what} takes tokens",
            expected="a text of one token, an id, or a tuple of these",
            got=kind(given) if len(listed) or not isinstance(given, list | tuple) else "none",
            do=form,
        )
    return tuple(found)


def _id_or_text(given: Any) -> int | str | None:
    if isinstance(given, str):
        return given
    try:
        return index(given)
    except TypeError:
        return None


def answer_ids(model: MoEModel, tokens: Answers) -> Int[Tensor, " N"]:
    """Ids of tokens given by their ids or texts.

    Raises:
        BadInput: none, an id out of the vocabulary, or a text that is not exactly one token.
    """
    one = isinstance(tokens, str) or is_whole(tokens)
    listed: list[Any] = [tokens] if one else list(tokens)  # type: ignore[arg-type]
    ids = [_token_id(model, token) if isinstance(token, str) else int(token) for token in listed]
    if not ids or min(ids) < 0 or max(ids) >= model.spec.vocab_size:
        raise BadInput("no such tokens", expected=f"one id or more, 0 to {model.spec.vocab_size - 1}", got=str(ids))
    return torch.tensor(ids, device=model.device)


def _token_id(model: MoEModel, text: str) -> int:
    if model.tokenizer is None:
        raise BadInput("text needs a tokenizer", expected="token ids", got=repr(text), do=GIVE_TOKENIZER)
    if lone_surrogate(text):
        raise BadInput(f"{text!r} is no Unicode text", expected="the text of one token", got="half of a surrogate pair")
    ids = _ids(model, text)
    if len(ids) != 1:
        raise BadInput(
            f"{text!r} is not one token",
            expected="the text of one token",
            got=f"{len(ids)}: {_listed(model, ids)}" if ids else "none",
            do=_instead(model, text, ids),
        )
    return ids[0]


def _ids(model: MoEModel, text: str) -> list[int]:
    return [int(one) for one in model.tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []


def _listed(model: MoEModel, ids: Sequence[int]) -> str:
    some = ", ".join(f"{token_text(model.tokenizer, one)!r} (id {one})" for one in ids[:8])
    return some + (", ..." if len(ids) > 8 else "")


def _instead(model: MoEModel, text: str, ids: Sequence[int]) -> str | None:
    """Another spelling that is one token: words inside a text begin with a space in most vocabularies."""
    bare = text.strip()
    for other in (f" {bare}", bare):
        if bare and other != text and len(_ids(model, other)) == 1:
            return f"{other!r} is one token."
    return f"Ask about its first token, id {ids[0]}, or another word." if ids else None
