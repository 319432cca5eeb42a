"""Text and token ids into model inputs, refused with a reason where they cannot be right; and ids back into text."""

import codecs
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from moe_interp.adapters import ModelSpec
from moe_interp.errors import BadInput

GIVE_TOKENIZER = "Pass one to moe.wrap(model, tokenizer), or put its files into the folder of the checkpoint."
Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Tensor]


def encode(
    inputs: Inputs, tokenizer: Any, spec: ModelSpec, device: torch.device, padding_side: str = "right"
) -> dict[str, Any]:
    """Model inputs of a text, texts, token ids [S] or [B, S], rows of ids of any lengths, or a mapping of them.

    Texts and rows of different lengths are padded.
    A model without tokens takes a mapping of its arguments, as they are.

    Raises:
        BadInput: an empty text, text without a tokenizer, ids out of the vocabulary, more tokens than the context;
            anything but a mapping, for a model without tokens.
    """
    if spec.kind == "other":
        found = _arguments(inputs, spec)
    elif isinstance(inputs, Mapping):
        found = _tensors(inputs)
    elif isinstance(inputs, str) or (isinstance(inputs, Sequence) and inputs and isinstance(inputs[0], str)):
        found = _tokenize([inputs] if isinstance(inputs, str) else list(inputs), tokenizer, padding_side)
    elif _uneven(inputs):
        found = pad(inputs, padding_side)  # type: ignore[arg-type]
    else:
        found = {"input_ids": _ids(inputs)}
    if "input_ids" in found and spec.kind != "other":
        _check(found["input_ids"], spec, found.get("attention_mask"))
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in found.items()}


def _arguments(inputs: Inputs, spec: ModelSpec) -> dict[str, Any]:
    if not isinstance(inputs, Mapping):
        raise BadInput(
            f"{spec.model_type} takes no tokens",
            expected='a mapping of the arguments of its forward, such as {"images": ...}',
            got=type(inputs).__name__,
        )
    return dict(inputs)


def _tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping of model inputs, its token ids and mask made [batch, pos] tensors."""
    found = dict(inputs)
    if not {"input_ids", "inputs_embeds"} & found.keys():
        raise BadInput("no tokens in the model inputs", expected="'input_ids'", got=f"keys {sorted(found)}")
    for key in {"input_ids", "attention_mask"} & found.keys():
        found[key] = _ids(found[key])
    ids, mask = found.get("input_ids"), found.get("attention_mask")
    if ids is not None and mask is not None and mask.dim() == 2 and mask.shape[0] != ids.shape[0]:
        raise BadInput(
            "ids and mask differ", expected=f"a mask of shape {tuple(ids.shape)}", got=str(tuple(mask.shape))
        )
    if ids is not None and mask is not None and mask.dim() == 2 and mask.shape[1] < ids.shape[1]:
        raise BadInput(
            "ids and mask differ", expected=f"a mask of shape {tuple(ids.shape)}", got=str(tuple(mask.shape))
        )
    return found


def _tokenize(texts: list[Any], tokenizer: Any, padding_side: str) -> dict[str, Any]:
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f"text {number} is empty", expected="at least one character", got=repr(text))
    if tokenizer is None:
        raise BadInput("text needs a tokenizer", expected="token ids", got="text", do=GIVE_TOKENIZER)
    return pad([tokenizer(text, verbose=False)["input_ids"] for text in texts], padding_side)


def pad(rows: Sequence[Sequence[int]], side: str = "right") -> dict[str, Tensor]:
    """Token ids of different lengths as ``input_ids`` and ``attention_mask``, both [B, S].

    Padding is token 0 under mask 0, so that any tokenizer will do.
    """
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[number, where] = torch.tensor(row, dtype=torch.long)
        mask[number, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _uneven(inputs: Any) -> bool:
    """Whether these are rows of token ids of different lengths."""
    if not isinstance(inputs, list | tuple) or not all(isinstance(row, list | tuple) for row in inputs):
        return False
    whole = all(isinstance(one, SupportsIndex) for row in inputs for one in row)
    return whole and len({len(row) for row in inputs}) > 1


def _ids(inputs: Any) -> Tensor:
    try:
        ids = inputs if isinstance(inputs, Tensor) else torch.tensor(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput("not model inputs", expected="text, texts or token ids", got=repr(inputs)[:80]) from error
    return ids[None] if ids.dim() == 1 else ids


def _check(ids: Tensor, spec: ModelSpec, mask: Tensor | None) -> None:
    if ids.dim() != 2 or ids.dtype.is_floating_point or ids.dtype is torch.bool or ids.numel() == 0:
        raise BadInput(
            "not token ids", expected="integers of shape [batch, pos]", got=f"{ids.dtype} of shape {tuple(ids.shape)}"
        )
    if mask is not None and not mask.any(dim=1).all():
        raise BadInput("a text without a real token", expected="an attention mask with a 1 in every row")
    if int(ids.min()) < 0 or int(ids.max()) >= spec.vocab_size:
        raise BadInput(
            "token id out of the vocabulary",
            expected=f"ids from 0 to {spec.vocab_size - 1}",
            got=f"{int(ids.min())} to {int(ids.max())}",
        )
    length = int(mask.sum(dim=1).max()) if mask is not None and mask.dim() == 2 else ids.shape[1]
    if length > spec.context_length:
        raise BadInput(
            "text over the context length",
            expected=f"at most {spec.context_length} tokens",
            got=str(length),
            do="Shorten it, or split it into documents.",
        )


def token_text(tokenizer: Any, token: int) -> str:
    """What a reader sees of one token: its text, or its bytes as <e4 b8> where they are only a part of a character.

    The id itself where nothing decodes it.
    """
    text = "" if tokenizer is None else str(tokenizer.decode([token]))
    if "\ufffd" in text:
        text = _token_bytes(tokenizer, token) or text
    return text.replace("\0", "\N{SYMBOL FOR NULL}") or str(token)  # a stored string cannot hold NUL


def _token_bytes(tokenizer: Any, token: int) -> str:
    """A byte-level token with what is no whole character as hexadecimal bytes; empty for another kind of token."""
    name = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    if not isinstance(name, str):
        return ""
    if len(name) == 6 and name.startswith("<0x"):  # SentencePiece's byte fallback
        return f"<{name[3:5].lower()}>"
    if not all(sign in _bytes_of_signs() for sign in name):
        return ""
    raw = bytes(_bytes_of_signs()[sign] for sign in name)
    return raw.decode("utf-8", "hexbytes")


@cache
def _bytes_of_signs() -> dict[str, int]:
    """The byte that each sign of a byte-level vocabulary stands for (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _as_hex(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "<" + error.object[error.start : error.end].hex(" ") + ">", error.end


codecs.register_error("hexbytes", _as_hex)
