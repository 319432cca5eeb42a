"""Attribution patching: what every expert, neuron and router logit is worth, estimated by one gradient.

Write c_e for what expert e adds to ``routed_out`` at a token (weight times output; 0 where it was not chosen), and g
for the gradient of the metric by ``routed_out``, which all experts of a layer share. To first order, putting another
c_e in its place changes the metric by (c_e' - c_e) . g, summed over tokens (Nanda 2023, "Attribution patching"; Syed
et al. 2023, arXiv 2310.10348).

1. Ablation: c_e' = 0. One forward and one backward pass: c_e . g = w dm/dw, with the gradient by the weight w.
2. Towards a corrupted input: c_e' is the expert's contribution there, token by token, by expert whatever its slot. Two
   forward passes and one backward pass.
3. Neurons: expert e adds the sum over n of w a_n times column n of its down-projection, so their shares sum to the
   expert's where that has no bias. Router logits: (l' - l) dm/dl, reported apart: c_e . g knows of no re-selection, and
   neither does the gradient by a logit, which sees weights alone.
4. ``steps`` > 1 averages the gradient at 0, 1/m, ..., (m-1)/m of a straight way from the routed sums of all MoE layers
   to those that take their place (integrated gradients, EAP-IG, Hanna et al. 2024, arXiv 2403.17806, who move the input
   instead). The first gradient is that of the run itself, in which later experts answer to earlier ones; at the other
   places later sums are put in place and do not. With many steps the estimates of all experts sum to the effect of
   replacing all at once; how near each comes to the effect of replacing it alone is what 5. tells.
5. How good is it? The exact effect is measured for a random sample of experts, and the rank correlation is told.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_interp.adapters.formats import rounds_activations
from moe_interp.analyses.effects import Sweep, patches, removals, tokens_of, used_experts
from moe_interp.analyses.inputs import moe_layers
from moe_interp.analyses.metrics import KL, AnyMetric, Metric, as_metric
from moe_interp.analyses.plain import check_not_edited, check_sets_no_contribution
from moe_interp.analyses.side_by_side import real_ids, side_by_side
from moe_interp.arguments import Count, Range, Seed, checked
from moe_interp.encode import Inputs
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.interventions import Intervention, apply
from moe_interp.measured import inputs_told, metric_told
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled
from moe_interp.run import Indices, Read, Run
from moe_interp.stats import spearman, spearman_interval

Slopes = Mapping[tuple[str, int], Tensor]
"""Gradients of the metric, summed over texts, by point and layer."""


@checked
def attribution_patching(
    model: MoEModel,
    inputs: Inputs,
    corrupted: Inputs | None = None,
    metric: AnyMetric = "nll",
    *,
    layers: Indices = None,
    steps: Annotated[int, Range(1, 10_000)] = 1,
    neurons: bool = False,
    sample: Count | None = 64,
    seed: Seed = 0,
    batch_tokens: Count = 1024,
) -> xr.Dataset:
    """Estimates of what every expert is worth, and their rank correlation with exact effects.

    Args:
        model: any opened model.
        inputs: texts, as `MoEModel.run` takes them, in one batch.
        corrupted: texts of as many tokens, whose contributions are put in place of an expert's own; None: none are,
            which is ablation.
        metric: as in `moe_interp.expert_effects`; "kl", which is at its minimum at the run, with ``steps`` above 1.
        layers: MoE layers (None: all).
        steps: 1: the gradient at the run itself. More: its mean along the path.
        neurons: whether to split experts into neurons.
        sample: how many of the experts that a token uses have their exact effect measured; None: all.
        seed: of the sample.
        batch_tokens: the most tokens in one pass of the exact measurement.

    Returns:
        Dims layer, expert, text. ``attribution``, the estimated change of the text's metric, in the metric's units;
        ``attribution_mean`` over texts; ``tokens`` that used the expert, and ``base`` (text), the metric of the run.
        ``effect_mean``: the exact change, NaN outside the sample of ``sampled`` experts. ``rank_correlation``: of the
        two over the sample, -1 ... 1 with 0 for no relation, with ``_interval`` (bound), 95 % over draws of experts.
        With ``neurons`` ``neuron_attribution`` (layer, expert, neuron), mean over texts. With ``corrupted``
        ``router_attribution`` (layer, expert, text), through the logit and apart from the above, by the gradient at the
        run itself whatever ``steps`` are (0 for "kl"). NaN where a layer has no such expert or neuron.

    Raises:
        BadInput: inputs that cannot be right, texts of other lengths, ``steps`` or ``sample`` below 1, a metric
            without a gradient, a standing edit that sets contributions, or with ``neurons`` any of experts' outputs.
        UnknownName: a layer that is no MoE layer, or a model without ``routed_out`` where that is needed.
        UnsupportedModel: a metric that the model has no logits for, or neurons of experts whose outputs do not follow
            from them by a matrix alone.
    """
    chosen = moe_layers(model, layers)
    found = estimates(model, inputs, corrupted, metric, chosen, steps, neurons)
    sweep = Sweep(model, inputs, metric)
    exact = _exact(sweep, corrupted, _sampled(found.used, sample, seed), chosen, batch_tokens)
    mean = found.experts.mean(dim=2).numpy()
    there = ~np.isnan(exact)
    rho = float(spearman(mean[there], exact[there]))
    values: dict[str, Any] = {
        "attribution": found.experts.numpy(),
        "attribution_mean": mean,
        "tokens": found.tokens.numpy(),
        "base": sweep.base.cpu().numpy(),
        "effect_mean": exact,
        "sampled": np.array(there.sum()),
        "rank_correlation": np.array(rho),
        "rank_correlation_interval": spearman_interval(rho, int(there.sum())),
    }
    values |= {} if found.neurons is None else {"neuron_attribution": found.neurons.numpy()}
    values |= {} if found.router is None else {"router_attribution": found.router.numpy()}
    coords: dict[str, Any] = {
        "layer": np.array(chosen),
        "expert": np.arange(mean.shape[1]),
        "text": np.arange(len(sweep.base)),
        "bound": ["low", "high"],
    }
    about = {
        **model.provenance(),
        **inputs_told(inputs=inputs, corrupted=corrupted),
        "metric": sweep.metric.name,
        "metric_told": metric_told(sweep.metric),
        "towards": "nothing" if corrupted is None else "corrupted inputs",
        "steps": steps,
        "sample": "all" if sample is None else sample,
        "seed": seed,
    }
    units = sweep.metric.units
    return labelled(described(values, _variables(units)), coords, analysis="attribution_patching", provenance=about)


def _variables(units: str) -> dict[str, Description]:
    told = "first-order estimate of the change of the text's metric, 0 if it does nothing"
    return {
        "attribution": (("layer", "expert", "text"), units, told),
        "attribution_mean": (("layer", "expert"), units, f"mean over texts: {told}"),
        "tokens": (("layer", "expert"), "tokens", "tokens that used the expert"),
        "base": (("text",), units, "the metric of the run as it is"),
        "effect_mean": (("layer", "expert"), units, "exact change of the metric, mean over texts; NaN if not sampled"),
        "sampled": ((), "experts", "experts whose exact change was measured"),
        "rank_correlation": ((), "1", "Spearman's, of estimate and exact change over the sample, -1 ... 1"),
        "rank_correlation_interval": (("bound",), "1", "95 % interval over draws of experts: rank correlation"),
        "neuron_attribution": (("layer", "expert", "neuron"), units, f"mean over texts, of single neurons: {told}"),
        "router_attribution": (("layer", "expert", "text"), units, f"by the router's logit, at fixed choice: {told}"),
    }


# ---- how good it is ----------------------------------------------------------------------------------------


def _sampled(used: Bool[Tensor, "L E"], sample: int | None, seed: int) -> dict[int, list[int]]:
    """A random sample of the experts that are used (None: all of them), by the number of their layer."""
    pairs = used.nonzero().numpy()
    order = np.random.default_rng(seed).permutation(len(pairs))
    drawn = pairs if sample is None else pairs[np.sort(order[:sample])]
    return {int(index): drawn[drawn[:, 0] == index, 1].tolist() for index in np.unique(drawn[:, 0])}


def _exact(
    sweep: Sweep, corrupted: Inputs | None, sampled: Mapping[int, list[int]], layers: Sequence[int], batch_tokens: int
) -> Float[np.ndarray, "L E"]:
    """The exact change of the metric by each sampled expert, mean over texts; NaN for the others."""
    only = {layers[index]: experts for index, experts in sampled.items()}
    changes = (
        removals(sweep, list(only), "zero", only=only)
        if corrupted is None
        else patches(sweep, list(only), corrupted, only)
    )
    found = sweep.effects(changes, sum(map(len, only.values())), batch_tokens)
    exact = np.full((len(layers), sweep.model.spec.num_experts), np.nan)
    for (layer, expert), effect in found.items():
        exact[layers.index(layer), expert] = float(effect.mean())
    return exact


# ---- gradients ---------------------------------------------------------------------------------------------


class Estimates(NamedTuple):
    """What one gradient says, in float64 on the CPU; NaN where a layer has no such expert.

    Attributes:
        experts: [L, E, B], change of each text's metric.
        neurons: [L, E, F], mean over texts; None if not asked for.
        router: [L, E, B], by the router's logits; None for an ablation.
        tokens: [L, E], tokens of all texts that used the expert.
        used: [L, E], whether one of them did, or one of the corrupted texts.
    """

    experts: Float[Tensor, "L E B"]
    neurons: Float[Tensor, "L E F"] | None
    router: Float[Tensor, "L E B"] | None
    tokens: Int[Tensor, "L E"]
    used: Bool[Tensor, "L E"]


def estimates(
    model: MoEModel,
    inputs: Inputs,
    corrupted: Inputs | None,
    metric: AnyMetric,
    layers: Sequence[int],
    steps: int = 1,
    neurons: bool = False,
) -> Estimates:
    """First-order changes of the metric by each expert, neuron and router logit, as `attribution_patching` has them."""
    measured = as_metric(metric, model)
    if isinstance(measured, KL) and steps == 1:
        raise BadInput(
            "KL has no gradient at the run, where it is 0",
            expected="another metric, or steps above 1",
            got=f"steps = {steps}",
        )
    check_sets_no_contribution(model, layers, "attributions")
    check_not_edited(model, layers if neurons else (), ("expert_out",), "shares of neurons")
    _check(model, inputs, corrupted, layers if neurons else ())
    held = [Read("expert_act", tuple(layers))] if neurons else []
    points = [_weight_point(model, layer) for layer in layers if steps == 1]
    points += [("routed_out", layer) for layer in layers if corrupted is not None or steps > 1 or neurons]
    points += [("router_logits", layer) for layer in layers if corrupted is not None]
    path = _path(model, inputs, corrupted, steps)
    run, slopes = _mean_slopes(model, inputs, measured, points, held if steps == 1 else [], path)
    before = _at_the_run(model, run, slopes, layers) if steps == 1 else _seen(model, inputs, held, slopes, layers)
    if corrupted is None:
        none = None if before.neurons is None else -before.neurons
        return Estimates(-before.experts, none, None, before.tokens, before.tokens > 0)
    held = [*held, Read("router_logits", tuple(layers))]
    after = _seen(model, corrupted, held, slopes, layers)
    return Estimates(
        after.experts - before.experts,
        None if before.neurons is None or after.neurons is None else after.neurons - before.neurons,
        _padded([_by_logit(model, run, after.run, slopes, layer) for layer in layers], model.spec.num_experts),
        before.tokens,
        before.tokens + after.tokens > 0,
    )


class _Side(NamedTuple):
    """Contribution times gradient, summed over tokens, of experts [L, E, B] and neurons [L, E, F] of one run."""

    run: Run
    experts: Tensor
    neurons: Tensor | None
    tokens: Tensor


def _weight_point(model: MoEModel, layer: int) -> tuple[str, int]:
    """The point of which value times gradient is contribution times gradient, slot by slot."""
    return ("gate_weights" if model.spec.moe(layer).weights_on == "output" else "expert_out", layer)


def _at_the_run(model: MoEModel, run: Run, slopes: Slopes, layers: Sequence[int]) -> _Side:
    """By gradients of this very run, which those by the weights are enough for: no output is held."""
    points = [_weight_point(model, layer) for layer in layers]
    products = [(run[point].detach().double() * slopes[point].double())[..., None] for point in points]
    return _summed(model, run, [one.flatten(3).sum(dim=3) for one in products], slopes, layers)


def _seen(model: MoEModel, inputs: Inputs, held: Sequence[Read], slopes: Slopes, layers: Sequence[int]) -> _Side:
    """By gradients of another run: one more forward pass, whose outputs are looked at as they come."""
    products: dict[int, Tensor] = {}

    def look(outputs: Tensor, layer: int) -> Tensor:
        products[layer] = torch.einsum("bskd,bsd->bsk", outputs.float(), slopes["routed_out", layer].float()).double()
        return outputs

    looks = [apply("expert_out", partial(look, layer=layer), layers=layer) for layer in layers]
    run = model.run(inputs, read=held, edit=looks, output=False)
    for layer, routing in run.routing.items():
        if layer in products and routing.weighs_output:
            products[layer] = products[layer] * routing.weights.double()
    return _summed(model, run, [products[layer] for layer in layers], slopes, layers)


def _summed(
    model: MoEModel, run: Run, products: Sequence[Float[Tensor, "B S K"]], slopes: Slopes, layers: Sequence[int]
) -> _Side:
    """Sums over the tokens of each text, by expert; of neurons over all texts, if their values were read."""
    experts = []
    for layer, values in zip(layers, products, strict=True):
        routing, count = run.routing[layer], model.spec.moe(layer).num_experts
        there = values.masked_fill(~routing.mask[..., None], 0.0).flatten(1)
        experts.append(there.new_zeros(len(there), count).scatter_add(1, routing.ids.flatten(1), there).T)
    neurons = [_neurons(model, run, slopes, layer) for layer in layers if ("expert_act", layer) in run.values]
    tokens = [tokens_of(run, layer, model.spec.num_experts).sum(dim=0).cpu() for layer in layers]
    most = model.spec.num_experts
    return _Side(run, _padded(experts, most), _padded(neurons, most) if neurons else None, torch.stack(tokens))


def _padded(rows: Sequence[Float[Tensor, "e X"]], experts: int) -> Float[Tensor, "L E Y"]:
    """Layers one on the other, NaN where one has fewer experts or columns than others."""
    found = torch.full((len(rows), experts, max(one.shape[1] for one in rows)), torch.nan, dtype=torch.float64)
    for index, one in enumerate(rows):
        found[index, : len(one), : one.shape[1]] = one.detach().cpu()
    return found


def _neurons(model: MoEModel, run: Run, slopes: Slopes, layer: int) -> Float[Tensor, "E F"]:
    """Weight times activation times (column . gradient), summed over tokens; mean over texts."""
    routing, acts = run.routing[layer], run["expert_act", layer].detach()
    sums = acts.new_zeros(model.spec.moe(layer).num_experts, acts.shape[-1], dtype=torch.float64)
    for expert in used_experts(run, layer).tolist():
        slots = (routing.ids == expert) & routing.mask[..., None]
        texts, columns, _ = slots.nonzero().T
        raised = slopes["routed_out", layer][texts, columns].float() @ model.weights(layer, expert).down.float()
        weights = routing.weights[slots].float() if routing.weighs_output else raised.new_ones(len(raised))
        sums[expert] = (weights[:, None] * acts[slots].float() * raised).sum(dim=0)
    return sums / len(run.mask)


def _by_logit(model: MoEModel, run: Run, other: Run, slopes: Slopes, layer: int) -> Float[Tensor, "E B"]:
    """Change of each router logit times the gradient by it, summed over tokens."""
    point = "router_logits", layer
    change = other[point].double() - run[point].detach().double()
    change = torch.where(other[point] == run[point], 0.0, change)  # two that are minus infinity
    products = (change * slopes[point].double()).masked_fill(~run.routing[layer].mask[..., None], 0.0)
    return products.sum(dim=1).T[: model.spec.moe(layer).num_experts]


def _mean_slopes(
    model: MoEModel,
    inputs: Inputs,
    metric: Metric,
    points: Sequence[tuple[str, int]],
    held: Sequence[Read],
    path: Sequence[Sequence[Intervention]],
) -> tuple[Run, Slopes]:
    """The run as it is, and the mean along the path of the gradients by some points (of routers: those at the run).

    Raises:
        BadInput: the metric has no gradient.
    """
    reads = [*held, *(Read(point, (layer,)) for point, layer in points)]
    sums: dict[tuple[str, int], Tensor] = {}
    first, bound = None, None
    for edits in path:
        with _frozen(model.hf), torch.enable_grad():
            run = model.run(inputs, read=reads, edit=edits, grad=True)
            first, bound = first or run, bound or metric.bind(run)
            total = bound.total(run.logits)
            slopes = (
                torch.autograd.grad(total, [run[point] for point in points], allow_unused=True)
                if total.requires_grad
                else ()
            )
        for point, slope in zip(points, slopes, strict=False):
            sums[point] = sums.get(point, 0.0) + (torch.zeros_like(run[point]) if slope is None else slope)
    if first is None or not any(bool(slope.any()) for slope in sums.values()):
        raise BadInput(
            f"the metric {metric.name!r} has no gradient at the run",
            expected="one that follows from the logits by differentiable steps",
            got="gradients of 0",
        )
    # Along the path all sums of experts are set, so that routers do nothing: theirs are of the first place alone.
    return first, {point: slope if point[0] == "router_logits" else slope / len(path) for point, slope in sums.items()}


@contextmanager
def _frozen(hf: nn.Module) -> Iterator[None]:
    """Without gradients of parameters, which nobody asks for; inside the ``with``."""
    parameters = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _path(model: MoEModel, inputs: Inputs, corrupted: Inputs | None, steps: int) -> list[list[Intervention]]:
    """Edits at 0, 1/m, ..., (m-1)/m of the way: the first is the run itself."""
    if steps == 1:
        return [[]]
    read = [Read("routed_out", model.layers)]
    own = model.run(inputs, read=read, output=False)
    other = None if corrupted is None else model.run(corrupted, read=read, output=False)

    def at(share: float) -> list[Intervention]:
        sums = {layer: (1 - share) * own["routed_out", layer] for layer in model.layers}
        if other is not None:
            sums = {layer: value + share * other["routed_out", layer] for layer, value in sums.items()}
        return [apply("routed_out", partial(_put, put=value), layers=layer) for layer, value in sums.items()]

    return [[], *(at(step / steps) for step in range(1, steps))]


def _put(value: Tensor, put: Tensor) -> Tensor:
    return put.to(value)


def _check(model: MoEModel, inputs: Inputs, corrupted: Inputs | None, with_neurons: Sequence[int]) -> None:
    """Refuse texts that do not fit token by token, and neurons whose columns do not add up to the output."""
    if corrupted is not None:
        (ids, own), (others, other) = (_tokens(model, side) for side in (inputs, corrupted))
        lengths, of_other = own.sum(dim=1).tolist(), other.sum(dim=1).tolist()
        if own.shape != other.shape or not torch.equal(own, other):
            shown = ids is not None and others is not None and len(own) == len(other) and lengths != of_other
            raise BadInput(
                "texts of other lengths",
                expected=f"corrupted texts of {lengths} tokens, padded alike",
                got=str(of_other),
                do=_apart(model, real_ids(ids, own), real_ids(others, other)) if shown else None,  # type: ignore[arg-type]
            )
    for layer in with_neurons:
        moe = model.spec.moe(layer)
        after = getattr(moe.kernel, "has_post_expert_norm", False)
        if after or rounds_activations(model.hf.get_submodule(moe.experts)):
            raise UnsupportedModel(
                f"outputs of experts at layer {layer} are no sum over neurons",
                expected="a down-projection of the neurons",
                got="a norm after it" if after else "one that rounds what it is given",
            )


def _apart(model: MoEModel, own: list[list[int]], other: list[list[int]]) -> str:
    names = ("inputs", "corrupted")
    return "Change words into others of as many tokens. " + side_by_side(own, other, model.tokenizer, names)


def _tokens(model: MoEModel, inputs: Inputs) -> tuple[Int[Tensor, "B S"] | None, Bool[Tensor, "B S"]]:
    """Token ids of a batch, None for embeddings, and which of its entries are tokens."""
    found = model.encode(inputs)
    ids = next(found[key] for key in ("decoder_input_ids", "input_ids", "inputs_embeds") if key in found)
    mask = None if "decoder_input_ids" in found else found.get("attention_mask")
    real = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
    return None if ids.is_floating_point() else ids, real
