"""What TransformerLens's users do with heads, for experts: stacks of what was added to the residual, from a cache.

A layer adds gate_weight * expert_out of every slot, and its shared experts, to the residual stream. `decompose_resid`
stacks all that was added, embedding and attention included; `stack_expert_results` what experts added. A stack has one
component for each slot of each layer, in the model's slot order, or one for each expert, zero where it was not chosen.
The latter holds E / K times as much, so ask for it with ``directions``: every slot is projected first, and only numbers
are sorted by expert.

With its scale frozen the final norm is linear (`moe_interp.analyses.attribution`): `logit_directions` takes tokens'
rows of the unembedding back through it, and `logit_attrs` is the product of a stack with them.

All takes the `ActivationCache` of a bridge that `moe_interp.attach` has attached, and computes in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_interp.analyses.answers import answer_ids
from moe_interp.analyses.attribution import freeze, linear_head
from moe_interp.analyses.inputs import moe_layers
from moe_interp.analyses.plain import check_plain, check_plain_model, check_writes_text
from moe_interp.arguments import checked, is_whole, kind_of, shown
from moe_interp.bridge import Attached, attached
from moe_interp.errors import BadInput, UnknownName
from moe_interp.run import Indices

By = Literal["slot", "expert"]
Tokens = int | str | Int[Tensor, "..."]


def _slice(given: Any) -> Any:
    """TransformerLens's slice of positions.

    Raises:
        BadInput: what makes none.
    """
    from transformer_lens.utilities.slice import Slice

    if isinstance(given, Slice):
        return given
    several = given is not None and not is_whole(given)
    row = [one for one in given if one is not None] if isinstance(given, tuple) else given
    if several and not (kind_of(Sequence[int]).accepts(row) and len(given)):
        raise BadInput(
            "invalid pos_slice", expected="a position, (start, stop), or a list of positions", got=shown(given)
        )
    return Slice(given)


def _products(values: Float[Tensor, "*rows D"], directions: Float[Tensor, "... D"]) -> Float[Tensor, "*rows"]:
    """Each vector's product with its direction.

    Raises:
        BadInput: directions of other shapes.
    """
    shape = tuple(values.shape)
    fits = directions.dim() <= values.dim() and directions.shape[-1] == shape[-1] and not directions.is_meta
    pairs = zip(directions.shape[-2::-1], shape[-2::-1], strict=False)
    if not fits or any(size not in (1, wanted) for size, wanted in pairs):
        got = str(tuple(directions.shape)) + " on the meta device" * directions.is_meta
        raise BadInput("directions do not fit the values", expected=f"the last dims of {shape}", got=got)
    return torch.einsum("...d,...d->...", values, directions.to(values.device))


class _Cached:
    """Values of points in a cache, at some positions, projected on directions if there are any."""

    def __init__(self, cache: Any, pos_slice: Any = None, directions: Tensor | None = None, by: By = "slot"):
        self.door: Attached = attached(getattr(cache, "model", None))
        self.cache, self.by = cache, by
        self.slice = _slice(pos_slice)
        self.directions = None if directions is None else directions.float()

    def value(self, point: str, layer: int | None, after: int = 1) -> Tensor:
        """A point, with ``after`` dims after the positions."""
        there = [name for name in self.door.spellings(point, layer) if name in self.cache.cache_dict]
        if not there:
            raise UnknownName(
                f"the cache holds no {self.door.hook_names[point, layer]!r}",
                expected=f"a cache of {point!r}",
                got=f"{len(self.cache.cache_dict)} other values",
                do="Cache it: bridge.run_with_cache(tokens, names_filter=door.names()), of what moe.attach returned.",
            )
        value = self.cache.cache_dict[there[0]]
        try:
            found: Tensor = self.slice.apply(value, dim=-1 - after)
        except IndexError as error:
            raise BadInput(
                "no such positions", expected=f"some of {value.shape[-1 - after]}", got=str(error)
            ) from error
        if not found.numel():
            raise BadInput("no positions", expected=f"some of {value.shape[-1 - after]}", got="none")
        return found.float() if found.is_floating_point() else found

    def has(self, point: str, layer: int) -> bool:
        """Whether the layer has the point."""
        return point in self.door.spec.layer(layer).sites

    def whole(self, point: str, layer: int | None) -> Tensor:
        """[*rows, D], or its products with the directions [*rows]."""
        found = self.value(point, layer)
        if self.directions is None:
            return found
        return _products(found, self.directions)

    def experts(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """What each slot or expert added, and the shared experts."""
        added = self._slots(layer)
        if self.by == "expert":
            added = self._by_expert(layer, added)
        letter = "S" if self.by == "slot" else "E"
        for number, one in enumerate(added.unbind(-1 if self.directions is not None else -2)):
            yield f"L{layer}{letter}{number}", one
        if self.has("shared_out", layer):
            yield f"L{layer}shared", self.whole("shared_out", layer)

    def _slots(self, layer: int) -> Tensor:
        outputs, weights = self.value("expert_out", layer, after=2), self.value("gate_weights", layer)
        if self.directions is None:
            return outputs * weights[..., None]
        return weights * _products(outputs, self.directions[..., None, :])

    def _by_expert(self, layer: int, added: Tensor) -> Tensor:
        ids = self.value("expert_ids", layer)
        shape = (*ids.shape[:-1], self.door.spec.moe(layer).num_experts)
        if self.directions is not None:
            return added.new_zeros(shape).scatter_add(-1, ids, added)
        return added.new_zeros(*shape, added.shape[-1]).scatter_add(-2, ids[..., None].expand_as(added), added)


@checked
@torch.no_grad()
def stack_expert_results(
    cache: Any,
    layer: int | None = -1,
    *,
    by: By = "slot",
    directions: Float[Tensor, "... D"] | None = None,
    incl_remainder: bool = False,
    pos_slice: Any = None,
    return_labels: bool = False,
) -> Float[Tensor, "component *rows"] | tuple[Float[Tensor, "component *rows"], list[str]]:
    """What experts added to the residual stream, up to a layer.

    Args:
        cache: of a bridge that is attached, with expert_out, gate_weights, shared_out where there is one, expert_ids
            ``by`` expert, and resid_post of the last layer for the remainder.
        layer: experts of the layers before this one; -1, None or the number of layers: of all.
        by: "slot": L2S0 is what the first slot of layer 2 added, whichever expert was in it. "expert": L2E7 is what
            expert 7 of layer 2 added, 0 where it was not chosen.
        directions: [D], or one for each position [batch, pos, D], such as `logit_directions` gives: components are
            their products with these. ``by`` expert this holds a number, not a vector, for every expert at every
            position.
        incl_remainder: add what else the residual is made of.
        pos_slice: of TransformerLens, which positions; directions are those of the same.
        return_labels: also the components' names: "L2S0", "L2E7", "L2shared", "remainder".

    Returns:
        [component, batch, pos, D], or [component, batch, pos] with directions.

    Raises:
        BadInput: the bridge is not attached, an unknown option, or no such layer.
        UnknownName: the cache lacks a value.
        UnsupportedModel: a layer that does not add its experts as they are, or no causal language model.
    """
    cached = _Cached(cache, pos_slice, directions, by)
    last = _layer(cached.door, layer)
    layers = [one for one in cached.door.model.layers if one < last]
    if not layers:
        raise BadInput(
            "no experts to stack", expected=f"a layer above {cached.door.model.layers[0]}, or -1 for all", got=str(last)
        )
    check_writes_text(cached.door.model)
    check_plain(cached.door.model, layers)
    found = [part for one in layers for part in cached.experts(one)]
    if incl_remainder:
        rest = cached.whole("resid_post", last - 1) - torch.stack([value for _, value in found]).sum(0)
        found.append(("remainder", rest))
    return _stacked(found, return_labels)


@checked
@torch.no_grad()
def decompose_resid(
    cache: Any,
    layer: int | None = -1,
    *,
    mlp_input: bool = False,
    by: By = "slot",
    directions: Float[Tensor, "... D"] | None = None,
    incl_embeds: bool = True,
    pos_slice: Any = None,
    return_labels: bool = False,
) -> Float[Tensor, "component *rows"] | tuple[Float[Tensor, "component *rows"], list[str]]:
    """All that the residual stream into a layer is the sum of, experts one by one.

    Args:
        cache, by, directions, pos_slice, return_labels: as in `stack_expert_results`; the cache needs embed,
            attn_out and mlp_out besides.
        layer: the components of the residual into this layer; -1, None or the number of layers: out of the last one.
        mlp_input: also the attention output of ``layer``, for the residual into its MLP or mixture.
        incl_embeds: include the embedding.

    Returns:
        [component, batch, pos, D], or [component, batch, pos] with directions; labels are "embed", "0_attn_out",
        "0_mlp_out" of a dense layer, and those of `stack_expert_results`.

    Raises:
        BadInput: the bridge is not attached, an unknown option, or no such layer.
        UnknownName: the cache lacks a value.
        UnsupportedModel: a residual that is not the plain sum of the embedding and all outputs, or no causal language
            model.
    """
    cached = _Cached(cache, pos_slice, directions, by)
    last = _layer(cached.door, layer)
    if mlp_input and last == cached.door.spec.num_layers:
        raise BadInput("no MLP after the last layer", expected=f"mlp_input of a layer below {last}", got=str(last))
    check_writes_text(cached.door.model)
    check_plain_model(cached.door.model)
    found = [("embed", cached.whole("embed", None))] if incl_embeds else []
    for one in range(last):
        found += _layer_parts(cached, one)
    if mlp_input and cached.has("attn_out", last):
        found.append((f"{last}_attn_out", cached.whole("attn_out", last)))
    if not found:
        raise BadInput("nothing to stack", expected="a layer above 0, or the embedding", got="neither")
    return _stacked(found, return_labels)


def _layer_parts(cached: _Cached, layer: int) -> Iterator[tuple[str, Tensor]]:
    for point in ("attn_out", "mlp_out"):
        if cached.has(point, layer):
            yield f"{layer}_{point}", cached.whole(point, layer)
    if cached.door.spec.layer(layer).moe:
        yield from cached.experts(layer)


def _layer(door: Attached, layer: int | None) -> int:
    count = door.spec.num_layers
    chosen = count if layer is None or layer == -1 else int(layer)
    if not 0 <= chosen <= count:
        raise BadInput("no such layer", expected=f"0 to {count}, or -1 for all", got=str(layer))
    return chosen


def _stacked(found: Sequence[tuple[str, Tensor]], labels: bool) -> Any:
    device = found[0][1].device
    stack = torch.stack([value.to(device) for _, value in found])
    return (stack, [label for label, _ in found]) if labels else stack


@checked
@torch.no_grad()
def logit_directions(
    cache: Any, tokens: Tokens, incorrect_tokens: Tokens | None = None, *, pos_slice: Any = None
) -> Float[Tensor, "*rows D"]:
    """The direction at every position whose product with the last residual is a token's logit.

    That is the token's row of the unembedding taken back through the final norm, with its gain, and its scale frozen at
    the residual of the cache. A soft-cap is left out, and so is the bias of norm or unembedding where they have one.

    Args:
        cache: of a bridge that is attached, with resid_post of the last layer.
        tokens: one token by its id or text; ids [batch], one for each text; or [batch, pos], one for each position.
        incorrect_tokens: the direction is of the difference to the logit of these.
        pos_slice: of TransformerLens, which positions; tokens are those of the same.

    Returns:
        [batch, pos, D].

    Raises:
        BadInput: the bridge is not attached, or tokens of another shape.
        UnknownName: the cache lacks the residual.
        UnsupportedModel: a final norm or unembedding that is not linear once its scale is frozen.
    """
    cached = _Cached(cache, pos_slice)
    model = cached.door.model
    check_writes_text(model)
    norm, unembed = linear_head(model)
    last = model.spec.last(model.spec.main_stack)
    residual = cached.value("resid_post", last)
    rows = _rows(cached, unembed.weight, tokens, residual)
    if incorrect_tokens is not None:
        rows = rows - _rows(cached, unembed.weight, incorrect_tokens, residual)
    frozen = freeze(norm, residual.to(model.dtype))
    return (frozen.back(rows) * model.spec.logit_scale).expand_as(residual)


def _rows(cached: _Cached, weight: Tensor, tokens: Tokens, residual: Tensor) -> Tensor:
    """Rows of the unembedding, which go over the residual's dims."""
    if not isinstance(tokens, Tensor) or not tokens.dim():
        return weight[answer_ids(cached.door.model, int(tokens) if isinstance(tokens, Tensor) else tokens)[0]].float()
    answer_ids(cached.door.model, tokens.flatten().tolist())  # refuses what is no token
    rows = weight[tokens.to(weight.device)].float()
    one_a_text = tokens.dim() == 1 and residual.dim() == 3 and len(tokens) == len(residual)
    rows = rows[:, None] if one_a_text else rows
    if tokens.dim() and not one_a_text and rows.shape != residual.shape:
        raise BadInput(
            "tokens do not fit the cache",
            expected=f"one token, one for each text, or {list(residual.shape[:-1])}",
            got=str(list(tokens.shape)),
        )
    return rows


@checked
@torch.no_grad()
def logit_attrs(
    cache: Any,
    stack: Float[Tensor, "component *rows D"],
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    *,
    pos_slice: Any = None,
) -> Float[Tensor, "component *rows"]:
    """What every component of a stack gave to a token's logit, or to a difference of two.

    Over all components of the residual it sums to the logit, before any soft-cap. TransformerLens's own
    ``cache.logit_attrs`` leaves out the gain of the final norm unless it was folded into the unembedding.

    Args:
        cache: of the same run.
        stack: [component, batch, pos, D], such as `decompose_resid` or `stack_expert_results` give.
        tokens, incorrect_tokens, pos_slice: as in `logit_directions`; the stack is of the same positions.

    Returns:
        [component, batch, pos], in logits.

    Raises:
        BadInput, UnknownName, UnsupportedModel: as in `logit_directions`.
    """
    directions = logit_directions(cache, tokens, incorrect_tokens, pos_slice=pos_slice)
    return _products(stack.float(), directions)


@checked
@torch.no_grad()
def get_act_patch_expert_out(
    bridge: Any,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: Any,
    patching_metric: Callable[[Tensor], Any],
    *,
    layers: Indices = None,
    return_labels: bool = False,
) -> Float[Tensor, "layer expert"] | tuple[Float[Tensor, "layer expert"], tuple[list[str], list[str]]]:
    """Activation patching of every expert: its contribution in the corrupted run replaced by that in the clean one.

    A contribution is weight times output at every position, 0 where the expert was not chosen; the corrupted run keeps
    its routes. An expert that contributes the same in both runs is not run again.

    Args:
        bridge: attached.
        corrupted_tokens: [batch, pos].
        clean_cache: of as many texts and positions, with expert_out, expert_ids and gate_weights.
        patching_metric: from logits [batch, pos, vocab] to a number.
        layers: MoE layers, as the checkpoint numbers them (None: all).
        return_labels: also the names of the rows, "L1", "L2", ..., and of the columns, "E0", "E1", ...

    Returns:
        The metric of the patched run, for every layer and expert. NaN where a layer has fewer experts than another.
        Dense layers have no row: with a first dense layer, row 0 is layer 1.

    Raises:
        BadInput: the bridge is not attached, or runs of other shapes.
        UnknownName: no such MoE layer, or the cache lacks a value.
    """
    door = attached(bridge)
    chosen = moe_layers(door.model, layers)
    unpatched = float(patching_metric(bridge(corrupted_tokens)))
    patched = torch.full((len(chosen), door.spec.num_experts), float("nan"))
    for row, layer in enumerate(chosen):
        names = [door.hook_names[point, layer] for point in ("expert_out", "expert_ids", "gate_weights")]
        _, cache = bridge.run_with_cache(corrupted_tokens, names_filter=names)
        clean, corrupted = _Contributions(clean_cache, layer), _Contributions(cache, layer)
        if clean.ids.shape[:-1] != corrupted.ids.shape[:-1]:
            shapes = [list(one.ids.shape[:-1]) for one in (corrupted, clean)]
            raise BadInput("runs do not match", expected=f"a clean cache of {shapes[0]}", got=str(shapes[1]))
        for expert in range(door.spec.moe(layer).num_experts):
            change = clean.of(expert) - corrupted.of(expert)
            patched[row, expert] = unpatched
            if bool(change.any()):
                logits = bridge.run_with_hooks(
                    corrupted_tokens, fwd_hooks=[(door.hook_names["routed_out", layer], _adding(change))]
                )
                patched[row, expert] = float(patching_metric(logits))
    if not return_labels:
        return patched
    return patched, ([f"L{layer}" for layer in chosen], [f"E{expert}" for expert in range(patched.shape[1])])


class _Contributions:
    """What each expert of a layer added in a run."""

    def __init__(self, cache: Any, layer: int):
        cached = _Cached(cache)
        self.ids, self.outputs = cached.value("expert_ids", layer), cached.value("expert_out", layer, after=2)
        on_output = cached.door.spec.moe(layer).weights_on == "output"
        self.weights = cached.value("gate_weights", layer) if on_output else torch.ones_like(self.ids).float()

    def of(self, expert: int) -> Float[Tensor, "*rows D"]:
        """Weight times output, 0 where it was not chosen."""
        return torch.einsum("...kd,...k->...d", self.outputs, self.weights * (self.ids == expert))


def _adding(change: Tensor) -> Any:
    return lambda value, hook: value + change.to(value)
