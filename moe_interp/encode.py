"""Text and token ids into model inputs, refused with a reason where they cannot be right; and ids back into text.

1. Texts become ids, one text at a time. Rows of different lengths are padded with the id that the model takes for
   padding (its config, else the tokenizer says which), under a mask of zeros.
2. A mapping is taken as it is, if the model's forward takes its keys.
3. Ids, masks and other tensors are checked. Where padding under the mask changes what the model gives at real tokens,
   a warning says so; where it decides the output and is no padding to the model, it is refused.
"""

import codecs
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, SupportsIndex

import torch
from torch import Tensor

from moe_interp.adapters import ModelSpec
from moe_interp.arguments import CheckedLater, is_whole, shown
from moe_interp.errors import BadInput

GIVE_TOKENIZER = "Pass one to moe.wrap(model, tokenizer), or put its files into the folder of the checkpoint."
Inputs = Annotated[
    str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Tensor], CheckedLater()
]
_IDS = ("input_ids", "decoder_input_ids")


def encode(
    inputs: Inputs, tokenizer: Any, spec: ModelSpec, device: torch.device, padding_side: str = "right"
) -> dict[str, Any]:
    """Model inputs of a text, texts, token ids [S] or [B, S], rows of ids of any lengths, or a mapping of them.

    Texts and rows of different lengths are padded with `padding_of`; those of an encoder on the right, whatever
    ``padding_side`` says. A model without tokens takes a mapping of its arguments, as they are.

    Warns where padding under the mask changes the output of the model at real tokens.

    Raises:
        BadInput: a text that is empty or no Unicode, text without a tokenizer, ids out of the vocabulary, more tokens
            than the context, keys that the model does not take, NaN, padding that the model takes for tokens;
            anything but a mapping, for a model without tokens.
    """
    side = "right" if spec.kind == "encoder-decoder" else padding_side
    if spec.kind == "other":
        found = _arguments(inputs, spec)
    elif isinstance(inputs, Mapping):
        found = _tensors(inputs)
    elif isinstance(inputs, str) or (isinstance(inputs, Sequence) and inputs and isinstance(inputs[0], str)):
        rows = token_ids([inputs] if isinstance(inputs, str) else list(inputs), tokenizer)
        _check_rows(rows)
        found = pad(rows, side, padding_of(tokenizer, spec))
    elif _uneven(inputs):
        found = pad(inputs, side, padding_of(tokenizer, spec))  # type: ignore[arg-type]
    else:
        found = {"input_ids": _ids(inputs)}
    _check_keys(found, spec)
    _check_values(found)
    if spec.kind != "other":
        _check_tokens(found, spec, generating=padding_side == "left")
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in found.items()}


def padding_of(tokenizer: Any, spec: ModelSpec) -> int:
    """The token id that fills short rows: the one of the model's config, else the tokenizer's, else 0.

    The model's own comes first, for it is what a model compares ids with. An id that the model has no embedding for
    is passed over.
    """
    for one in (spec.padding_id, getattr(tokenizer, "pad_token_id", None)):
        if isinstance(one, int) and 0 <= one < spec.vocab_size:
            return one
    return 0


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer; None is fine.

    Raises:
        BadInput: a name, a processor, a class, a ``tokenizers.Tokenizer``, or anything that is not called with a text
            and decodes ids.
    """
    if tokenizer is None:
        return
    got, do = type(tokenizer).__name__, None
    if isinstance(tokenizer, str):
        got, do = repr(tokenizer), f"transformers.AutoTokenizer.from_pretrained({tokenizer!r}) loads one by its name."
    elif isinstance(tokenizer, type):
        got, do = f"the class {tokenizer.__name__}", "Pass an instance: tokenizer_class.from_pretrained(name)."
    elif hasattr(tokenizer, "tokenizer"):
        do = "Pass the processor's tokenizer: processor.tokenizer."
    elif hasattr(tokenizer, "encode_batch") and not callable(tokenizer):
        do = "Pass transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)."
    elif callable(tokenizer) and hasattr(tokenizer, "decode"):
        return
    raise BadInput("not a tokenizer", expected="a tokenizer of transformers, or None", got=got, do=do)


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
        raise BadInput("no tokens in the model inputs", expected="'input_ids'", got=f"keys {sorted(map(str, found))}")
    for key in {*_IDS, "attention_mask", "decoder_attention_mask"} & found.keys():
        if found[key] is not None:
            found[key] = _ids(found[key])
    ids, mask = found.get("input_ids"), found.get("attention_mask")
    if ids is None or mask is None or mask.dim() != 2 or ids.dim() != 2:
        return found
    if mask.shape[0] != ids.shape[0] or mask.shape[1] < ids.shape[1]:
        raise BadInput(
            "ids and mask differ", expected=f"a mask of shape {tuple(ids.shape)}", got=str(tuple(mask.shape))
        )
    return found


def token_ids(texts: Sequence[Any], tokenizer: Any) -> list[list[int]]:
    """The token ids of each text, as the tokenizer gives them, with its special tokens.

    Raises:
        BadInput: a text that is empty or no Unicode; no tokenizer.
    """
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f"text {number} is empty", expected="at least one character", got=repr(text))
        if not _is_unicode(text):
            raise BadInput(
                f"text {number} is no Unicode text",
                expected="characters that UTF-8 can encode",
                got="half of a surrogate pair",
                do='text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") mends it.',
            )
    if tokenizer is None:
        raise BadInput("text needs a tokenizer", expected="token ids", got="text", do=GIVE_TOKENIZER)
    check_tokenizer(tokenizer)
    return [tokenizer(text, verbose=False)["input_ids"] for text in texts]


def _check_rows(rows: Sequence[Sequence[int]]) -> None:
    for number, row in enumerate(rows):
        if not len(row):
            raise BadInput(
                f"text {number} has no tokens", expected="a text that the tokenizer makes tokens of", got="none"
            )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def pad(rows: Sequence[Sequence[int]], side: str = "right", padding: int = 0) -> dict[str, Tensor]:
    """Token ids of different lengths as ``input_ids`` and ``attention_mask``, both [B, S].

    Short rows are filled with ``padding``, which `padding_of` gives, under mask 0.
    """
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), padding, dtype=torch.long)
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
    """Ids or a mask as a tensor [B, S]; whole numbers of any width as int64, which embeddings take."""
    try:
        ids = inputs if isinstance(inputs, Tensor) else torch.tensor(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput("not model inputs", expected="text, texts or token ids", got=repr(inputs)[:80]) from error
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
    ids = ids.long() if whole else ids
    return ids[None] if ids.dim() == 1 else ids


def _check_keys(found: Mapping[str, Any], spec: ModelSpec) -> None:
    unknown = [] if spec.arguments is None else sorted(map(repr, found.keys() - spec.arguments))
    if unknown:
        raise BadInput(
            f"{spec.model_type} takes no input {', '.join(unknown)}",
            expected=f"keys among {', '.join(sorted(spec.arguments or ()))}",
            got=f"a mapping with {', '.join(map(repr, found))}",
        )


def _check_values(found: Mapping[str, Any]) -> None:
    """Refuse tensors without values, NaN, and infinity but for masks, whose minus infinity keeps tokens apart."""
    for key, value in found.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise BadInput(f"{key!r} has no values", expected="a tensor in memory", got="one on the meta device")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        wrong = value.isnan() if "mask" in key else ~value.isfinite()
        if bool(wrong.any()):
            raise BadInput(
                f"values of {key!r} are not finite", expected="finite numbers", got=f"{int(wrong.sum())} that are not"
            )


def _check_tokens(found: Mapping[str, Any], spec: ModelSpec, generating: bool) -> None:
    for key in _IDS:
        ids = found.get(key)
        if ids is not None:
            _check(ids, spec, found.get(key.replace("input_ids", "attention_mask")))
    ids, mask = found.get("input_ids"), found.get("attention_mask")
    if ids is not None:
        _check_pooling(ids, spec)
        _check_shapes(ids, found, spec)
    if generating and mask is not None and mask.dim() != 2:
        raise BadInput("cannot generate under this mask", expected="one of [batch, pos]", got=str(tuple(mask.shape)))
    if ids is None or mask is None or mask.shape != ids.shape or bool(mask.bool().all()):
        return
    _check_padding(ids, mask.bool(), spec)
    _tell_padding(mask.bool(), spec, positions=generating or found.get("position_ids") is not None)


def _check_shapes(ids: Tensor, found: Mapping[str, Any], spec: ModelSpec) -> None:
    """Refuse positions, and labels of tokens, that are not one for each token id."""
    positions, labels = found.get("position_ids"), found.get("labels")
    if isinstance(positions, Tensor) and (positions.dim() < 2 or positions.shape[-1] != ids.shape[1]):
        got = str(tuple(positions.shape))
        raise BadInput("position_ids do not fit the ids", expected=f"[..., {ids.shape[1]}], one for each id", got=got)
    if spec.kind != "causal" or spec.head != "tokens" or not isinstance(labels, Tensor):
        return
    if labels.shape != ids.shape:
        raise BadInput(
            "labels do not fit the ids", expected=f"{tuple(ids.shape)}, one for each id", got=str(tuple(labels.shape))
        )


def _check_padding(ids: Tensor, mask: Tensor, spec: ModelSpec) -> None:
    """Refuse padding that the model takes for tokens, where it tells tokens from padding by their ids.

    A classifier of texts looks at the last id that is not padding, so what stands after a text decides. Positions that
    count ids that are not padding are moved by what stands before a token.
    """
    seen = mask.long().cumsum(dim=1)
    decides = {"pooled": seen == seen[:, -1:], "tokens": seen < seen[:, -1:]}.get(_reads_ids(spec), seen < 0) & ~mask
    wrong = ids[decides & (ids != spec.padding_id)]
    if len(wrong):
        raise BadInput(
            f"{spec.model_type} would take padding for tokens",
            expected=f"the padding id of its config, {spec.padding_id}, where the mask is 0",
            got=f"id {int(wrong[0])}",
            do="Give texts or lists of ids, which are padded so.",
        )


def _reads_ids(spec: ModelSpec) -> str:
    """What a model tells from padding by ids: the "pooled" token of a text, the positions of "tokens", or "nothing"."""
    return "pooled" if spec.head == "pooled" else "tokens" if spec.padding_reaches == "ids" else "nothing"


def _check_pooling(ids: Tensor, spec: ModelSpec) -> None:
    if spec.head == "pooled" and spec.padding_id is None and len(ids) > 1:
        raise BadInput(
            f"a classifier of {spec.model_type} cannot tell padding from tokens",
            expected="one text, or a config that names the padding id",
            got=f"{len(ids)} texts",
            do="Set pad_token_id in the model's config, close the model and open it again.",
        )


def _tell_padding(mask: Tensor, spec: ModelSpec, positions: bool) -> None:
    """Warn where padding under the mask changes what the model gives at real tokens."""
    before = bool((mask.int().diff(dim=1) > 0).any())
    if {"left": before, "positions": before and not positions, "any": True}.get(spec.padding_reaches, False):
        which = "padding" if spec.padding_reaches == "any" else "padding before a text"
        do = " Give position_ids." if spec.padding_reaches == "positions" else " Run texts of one length, or one text."
        warnings.warn(
            f"{which} changes the output of {spec.model_type} at real tokens, although the mask leaves it out.{do}",
            stacklevel=4,
        )


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


def check_room(given: Mapping[str, Any], spec: ModelSpec, config: Any, options: Mapping[str, Any]) -> None:
    """Before a generation: refuse one that would go on beyond the context length of the model.

    Args:
        given: what `encode` gave.
        spec: of the model.
        config: the generation config that counts (``options["generation_config"]``, else the model's own).
        options: of ``generate``: ``max_new_tokens`` or ``max_length`` come before those of the config.

    Raises:
        BadInput: prompt and new tokens together are more than the context length, or no number of tokens.
    """
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    crossed = spec.kind == "encoder-decoder"  # whose decoder starts anew, from one token
    embedded = given.get("inputs_embeds") if ids is None else ids
    prompt = 1 if crossed or embedded is None else embedded.shape[1]
    if mask is not None and mask.dim() == 2 and not crossed:
        prompt = int(mask.sum(dim=1).max())
    for name in ("max_new_tokens", "max_length"):
        if options.get(name) is not None and not (is_whole(options[name]) and options[name] >= 1):
            raise BadInput(f"invalid {name}", expected="a whole number of at least 1", got=shown(options[name]))
    new, whole = (options.get(name, getattr(config, name, None)) for name in ("max_new_tokens", "max_length"))
    if options.get("max_length") is not None and options.get("max_new_tokens") is None:
        new = None  # a length that is given comes before a number of the config
    length = prompt + new if new is not None else max(prompt, whole or 0)
    if length > spec.context_length:
        raise BadInput(
            "a generation beyond the context length",
            expected=f"at most {spec.context_length} tokens, prompt and new ones together",
            got=f"{prompt} + {length - prompt}",
            do="Shorten the prompt, or ask for fewer by max_new_tokens=.",
        )


def special_token_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that a tokenizer marks as special, added ones too, in order.

    The token that stands for unknown words of a text is not among them, unless it begins, ends or pads texts as well.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    marked = {id for id, token in added.items() if getattr(token, "special", False)}
    unknown = getattr(tokenizer, "unk_token_id", None)
    markers = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    return sorted(id for id in marked | {*getattr(tokenizer, "all_special_ids", ())} if id != unknown or id in markers)


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
