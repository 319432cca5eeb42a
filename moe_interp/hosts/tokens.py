"""Which tokens a forward pass has, as far as its arguments say: padding, positions, and the text before a cache.

1. `tokens_of` reads the arguments of a whole model or of one of its stacks.
2. A mask of shape [batch, pos] says which tokens are real. From a mask of queries and keys, [batch, 1, query, key],
   which transformers makes for caches of a fixed size, the same is read off the keys that a query may see.
3. Random numbers depend on the text up to a token (`moe_interp.interventions.chance`). A pass that goes on from a
   cache sees the last tokens alone, so what stands for the text before them is kept with the cache, and follows it
   when a beam search reorders its rows or a rejected draft is cut off.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.adapters.spec import ModelSpec
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.interventions.chance import prefixes
from moe_interp.run import Tokens

_READ = "_moe_interp_read"  # of a cache: [B, L], the prefix of each token that it holds
_MOVES_ROWS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a module's forward by their names, also of those that were given by their place."""
    if not args:
        return kwargs
    named = [one.name for one in signature(module.forward).parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
    return dict(zip(named, args, strict=False)) | kwargs


def tokens_of(
    spec: ModelSpec, args: tuple[Any, ...], kwargs: dict[str, Any], only: str | None = None
) -> dict[str, Tokens]:
    """The tokens of each stack, as far as the arguments of the whole model, or of its stack ``only``, say.

    Raises:
        UnsupportedModel: several texts are packed into one row.
        BadInput: a mask that does not tell padding from text.
    """
    if spec.kind == "other":
        return {}
    _check_not_packed(kwargs)
    found: dict[str, Tokens] = {}
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    crossed = spec.kind == "encoder-decoder" and only is None
    if given is not None:
        stack = only or ("encoder" if crossed else spec.main_stack)
        found[stack] = _of(given, kwargs.get("attention_mask"), {} if crossed else kwargs)
    return found | _decoder_tokens(kwargs) if crossed else found


def _check_not_packed(kwargs: Mapping[str, Any]) -> None:
    """Refuse several texts in one row, which transformers keeps apart by their lengths or by positions that restart."""
    positions, got = kwargs.get("position_ids"), None
    if kwargs.get("cu_seq_lens_q") is not None:
        got = "lengths of packed texts (cu_seq_lens_q), as continuous batching gives them"
    elif kwargs.get("attention_mask") is None and _restart(positions):
        got = "position_ids that start again within a row, and no attention mask"
    if got is not None:
        raise UnsupportedModel(
            "edits and reads of texts that share a row",
            expected="a row for each text, padded",
            got=got,
            do="Run the texts as a padded batch, or leave the edit before such a call.",
        )


def _restart(positions: Any) -> bool:
    return isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions.diff(dim=1) < 0).any())


def _decoder_tokens(kwargs: dict[str, Any]) -> dict[str, Tokens]:
    """Those of the decoder; a decoder that makes its inputs from labels has padding where these are left out, -100."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
    given = next((name for name in names if kwargs.get(name) is not None), None)
    if given is None:
        return {}
    target, mask = kwargs[given], kwargs.get("decoder_attention_mask")
    if mask is None and given == "labels":
        mask = target != -100
    if isinstance(mask, Tensor) and mask.dim() == 2:  # some cover the prompt, whose tokens are the encoder's
        mask = mask[:, -(_cached(kwargs) + target.shape[1]) :]
    return {"decoder": _of(target, mask, kwargs)}


def _cached(kwargs: Mapping[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def tokens_at(known: Mapping[str, Tokens], stack: str, value: Tensor) -> Tokens:
    """The tokens that a value [B, S, ...] of a stack has; all are real where the model's inputs do not say."""
    tokens = known.get(stack)
    if tokens is None or tokens.mask.shape != value.shape[:2]:
        return Tokens.from_mask(value.new_ones(value.shape[:2]), value.shape[1])
    return tokens


def _of(given: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> Tokens:
    """The tokens of one stack that is given these ids or embeddings."""
    tokens = _masked(given, mask, kwargs)
    if given.dim() != 2 or given.is_floating_point():
        return tokens
    own = prefixes(given, tokens.mask, tokens.index)
    return _going_on(replace(tokens, prefixes=own), kwargs.get("past_key_values"), _cached(kwargs))


def _masked(given: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> Tokens:
    batch, length = given.shape[:2]
    if isinstance(mask, Mapping):  # by kind of attention; that of all keys tells most
        masks = [mask.get("full_attention"), *mask.values()]
        mask = next((one for one in masks if one is not None), None)
    if mask is None:
        mask = torch.ones(batch, _cached(kwargs) + length, dtype=torch.bool, device=given.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return Tokens.from_mask(mask, length)
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2] == length:
        return _of_queries(mask, batch, _cached(kwargs), kwargs.get("position_ids"))
    raise BadInput(
        "cannot tell real tokens from padding",
        expected="an attention mask of shape [batch, pos] or [batch, 1, query, key]",
        got=f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__,
    )


def _of_queries(mask: Tensor, batch: int, cached: int, positions: Any) -> Tokens:
    """From which keys each query may see: a real token sees itself, and those before it are real, too."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    sees = seen.any(dim=1).expand(batch, -1, -1)  # [B, Q, keys]
    own = torch.arange(cached, cached + sees.shape[1], device=sees.device)
    if int(own[-1]) >= sees.shape[2]:  # keys of a window: padding sees none of them
        real = sees.any(dim=2)
        index = cached + real.long().cumsum(dim=1) - 1
    else:
        real = sees.gather(2, own.expand(batch, -1)[..., None]).squeeze(2)
        index = (sees.any(dim=1).long().cumsum(dim=1) - 1)[:, own]
    if isinstance(positions, Tensor) and positions.dim() == 2:
        index = torch.where(real, positions.expand(batch, -1), index)
    return Tokens(real, index)


# ---- the text that a cache holds -----------------------------------------------------------------------------


def _going_on(tokens: Tokens, cache: Any, cached: int) -> Tokens:
    """Prefixes of tokens that follow cached ones begin with what the cache was filled with."""
    if cache is None or tokens.prefixes is None:
        return tokens
    before = vars(cache).get(_READ)
    if cached and (before is None or before.shape[0] != len(tokens.mask) or before.shape[1] < cached):
        return replace(tokens, prefixes=None, beginning_known=False)
    if cached:
        tokens = replace(tokens, prefixes=tokens.prefixes + before[:, cached - 1 : cached].to(tokens.prefixes.device))
    own: Any = tokens.prefixes
    vars(cache)[_READ] = own if not cached else torch.cat([before[:, :cached].to(own.device), own], dim=1)
    if before is None:
        kind: Any = type(cache)
        cache.__class__ = _followed(kind)
    return tokens


def follows(cache: Any) -> bool:
    """Tell whether the text that a cache holds is known, so that every pass that fills it must add to what is known."""
    return getattr(cache, _READ, None) is not None


@functools.cache
def _followed(kind: Any) -> Any:
    """A class of caches of the same name, of which methods that move rows move what is known of their texts along."""

    def moving(name: str) -> Callable[[Any, Any], Any]:
        def moved(self: Any, rows: Any) -> Any:
            result, read = getattr(kind, name)(self, rows), vars(self)[_READ]
            repeats = name == "batch_repeat_interleave"
            after = read.repeat_interleave(rows, dim=0) if repeats else read.index_select(0, rows.to(read.device))
            vars(self)[_READ] = after
            return result

        return moved

    def reduced(self: Any, protocol: Any) -> Any:
        return (_remade, (kind,), *kind.__reduce_ex__(self, protocol)[2:])

    methods = {name: moving(name) for name in _MOVES_ROWS if hasattr(kind, name)}
    shown = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**methods, "__reduce_ex__": reduced, **shown})


def _remade(kind: Any) -> Any:
    """An empty cache of a class of `_followed`, for copies and pickles."""
    return _followed(kind).__new__(_followed(kind))
