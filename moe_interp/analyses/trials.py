"""What interventions do to a metric: the shared part of patching, tracing and coalitions.

1. `Trial`: edits of a base run, and at which tokens they can change it. Texts without such a token need no run: the
   effect on them is 0 exactly.
2. `effects` runs trials from the layers that they change on (`moe_interp.restart`), many side by side.
3. `Pair`: a clean and a corrupted run that match token by token, one of which is edited towards the other.
4. `summary`: means over texts, the share of the difference between both runs, and intervals over texts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from moe_interp.analyses.metrics import Bound, Metric, as_metric
from moe_interp.analyses.plain import check_writes_text
from moe_interp.analyses.side_by_side import real_ids, side_by_side
from moe_interp.encode import Inputs
from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention
from moe_interp.interventions.places import SetPoint
from moe_interp.interventions.values import ByToken
from moe_interp.measured import inputs_told, metric_told
from moe_interp.model import MoEModel, Reads
from moe_interp.restart import Restart, Variant
from moe_interp.results import Variable
from moe_interp.run import Run, Tokens
from moe_interp.stats import bootstrap_ratio, ratio

Direction = Literal["restore", "corrupt"]
BOUNDS = ("low", "high")


class Trial(NamedTuple):
    """Edits whose effect is wanted.

    Attributes:
        place: where the effect goes, an index for each dim of the result but that of texts.
        where: [B, S], the tokens at which they can change something; the effect on texts without any is 0.
        edits: makes them, to be carried out in order.
    """

    place: tuple[int, ...]
    where: Bool[Tensor, "B S"]
    edits: Callable[[], Sequence[Intervention]]


class Found(NamedTuple):
    """Effects of trials.

    Attributes:
        effects: [B, ...], each text's metric under each trial less that of the base run; NaN at places without one.
        tokens: [B, ...], at how many tokens each trial could change something.
    """

    effects: Float[np.ndarray, "B *shape"]
    tokens: Int[np.ndarray, "B *shape"]


def effects(
    restart: Restart,
    bound: Bound,
    base: Float[Tensor, " B"],
    groups: Iterable[Iterable[Trial]],
    shape: tuple[int, ...],
    *,
    batch_tokens: int = 4096,
    name: str = "effects",
) -> Found:
    """The effects of trials.

    Args:
        restart: the base run.
        bound: the metric.
        base: [B], that of the base run.
        groups: trials, whose edits are made when their group is run, so that only one group's values are held.
        shape: of the result, after its texts.
        batch_tokens: as in `Restart.run`.
        name: for the progress bar.
    """
    found = Found(np.full((len(base), *shape), np.nan), np.zeros((len(base), *shape), np.int32))
    for trials in tqdm(groups, desc=name, leave=False):
        live = []
        for trial in trials:
            at = (slice(None), *trial.place)
            found.effects[at], found.tokens[at] = 0.0, trial.where.sum(dim=1).cpu().numpy()
            if bool(trial.where.any()):
                live.append(trial)
        variants = [Variant(trial.edits(), trial.where.any(dim=1).nonzero()[:, 0]) for trial in live]
        for one in restart.run(variants, bound.at, batch_tokens=batch_tokens):
            for text, value in bound.per_text(one.logits, one.texts, one.columns).items():
                found.effects[(text, *live[one.number].place)] = value - float(base[text])
    return found


def contributions(run: Run, layer: int) -> Float[Tensor, "B S K *D"]:
    """What each slot added to ``routed_out``, zero where the mixture sees no token."""
    routing, outputs = run.routing[layer], run["expert_out", layer]
    weighted = outputs * routing.weights[..., None].to(outputs.dtype) if routing.weighs_output else outputs
    return weighted.masked_fill(~routing.mask[..., None, None], 0.0)


def differs(first: Tensor, second: Tensor, tokens: Tokens) -> Bool[Tensor, "B S"]:
    """[B, S], the real tokens at which two values [B, S, ...] are not the same."""
    return (first != second).flatten(2).any(dim=-1) & tokens.mask


def put(point: str, layer: int, values: Float[Tensor, "B S *rest"], tokens: Tokens) -> SetPoint:
    """Put these values of a batch's tokens in place of a point's."""
    return SetPoint(point=point, layers=(layer,), values=ByToken.of(values, tokens))


# ---- a clean and a corrupted run ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A base run and another that matches it token by token, and the metric of both.

    Attributes:
        restart: the base run, which is edited towards the other.
        other: the other run.
        bound: the metric, bound to the clean one of them.
        metric: what it is.
        direction: "restore" if the base is the corrupted run, "corrupt" if it is the clean one.
        base_values, other_values: [B], the metric of each text.
        model: both runs are of.
        clean, corrupted: as they were given.
    """

    restart: Restart
    other: Run
    bound: Bound
    metric: Metric
    direction: Direction
    base_values: Float[Tensor, " B"]
    other_values: Float[Tensor, " B"]
    model: MoEModel
    clean: Inputs
    corrupted: Inputs

    @property
    def base(self) -> Run:
        """The base run."""
        return self.restart.base

    @property
    def gap(self) -> Float[np.ndarray, " B"]:
        """What would be the effect of putting all of the other run in place."""
        return (self.other_values - self.base_values).numpy()

    def provenance(self) -> dict[str, str | int | float]:
        """For results."""
        inputs = inputs_told(clean=self.clean, corrupted=self.corrupted)
        metric = {"metric": self.metric.name, "metric_told": metric_told(self.metric)}
        return {**self.model.provenance(), **inputs, **metric, "direction": self.direction}

    def variables(self) -> dict[str, Variable]:
        """The metric of both runs, by text."""
        clean, corrupted = (self.other_values, self.base_values)[:: 1 if self.direction == "restore" else -1]
        units = self.metric.units
        return {
            "clean": Variable(("text",), clean.numpy(), units, "the metric of the clean run"),
            "corrupted": Variable(("text",), corrupted.numpy(), units, "the metric of the corrupted run"),
        }


def paired(model: MoEModel, clean: Inputs, corrupted: Inputs, metric: Any, direction: Direction, read: Reads) -> Pair:
    """Both runs, refused where they do not match token by token.

    Raises:
        BadInput: other numbers of texts, pairs of other lengths or padding, an unknown direction or metric.
        UnsupportedModel: a model that does not predict the next token.
    """
    check_writes_text(model)
    bindable = as_metric(metric, model)
    inputs, others = (corrupted, clean) if direction == "restore" else (clean, corrupted)
    other = model.run(others, read=read)
    restart = Restart(model, inputs, read=read)
    runs = (other, restart.base) if direction == "restore" else (restart.base, other)
    _check_match(model, *runs)
    bound = bindable.bind(runs[0])
    values = bound.of(restart.base), bound.of(other)
    return Pair(restart, other, bound, bindable, direction, *values, model, clean, corrupted)


def _check_match(model: MoEModel, clean: Run, corrupted: Run) -> None:
    lengths, others = (run.mask.sum(dim=1).tolist() for run in (clean, corrupted))
    if len(lengths) != len(others):
        raise BadInput(
            "clean and corrupted texts do not pair up",
            expected="as many of one as of the other",
            got=f"{len(lengths)} clean and {len(others)} corrupted",
        )
    for number, (length, of_other) in enumerate(zip(lengths, others, strict=True)):
        if length != of_other:
            raise BadInput(
                f"clean and corrupted text {number} are not of one length",
                expected="as many tokens in both, so that they match one by one",
                got=f"{length} clean and {of_other} corrupted",
                do="Change words into others of as many tokens." + _shown(model, clean, corrupted),
            )
    if clean.mask.shape != corrupted.mask.shape or not torch.equal(clean.mask, corrupted.mask):
        raise BadInput(
            "clean and corrupted texts are padded differently", expected="the same attention mask", got="two"
        )


def _shown(model: MoEModel, clean: Run, corrupted: Run) -> str:
    """The tokens of the texts that differ; nothing where they are embeddings."""
    if clean.token_ids is None or corrupted.token_ids is None:
        return ""
    own, other = real_ids(clean.token_ids, clean.mask), real_ids(corrupted.token_ids, corrupted.mask)
    return " " + side_by_side(own, other, model.tokenizer, ("clean", "corrupted"))


# ---- results -----------------------------------------------------------------------------------------------


def summary(
    found: Found,
    dims: tuple[str, ...],
    units: str,
    *,
    gap: Float[np.ndarray, " B"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Variable]:
    """Effects by text, their mean, and intervals over texts; as shares of ``gap`` too, where that is given."""
    each = found.effects
    there = ~np.isnan(each)
    filled = np.where(there, each, 0.0)

    def over_texts(bottom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = bootstrap_ratio(filled, bottom, resamples=resamples, seed=seed)
        return ratio(filled.sum(axis=0), bottom.sum(axis=0)), np.moveaxis(ends, 0, -1)

    mean, interval = over_texts(there.astype(float))
    ends = "95 % interval over texts, Student's with fewer than five; NaN for one text"
    variables = {
        "effect": Variable(("text", *dims), each, units, "the metric under the change less that of the base run"),
        "effect_mean": Variable(dims, mean, units, "effect, the mean over texts"),
        "effect_interval": Variable((*dims, "bound"), interval, units, f"of effect_mean: {ends}"),
    }
    variables["tokens"] = Variable(
        ("text", *dims), found.tokens, "tokens", "at how many tokens it could change anything"
    )
    if gap is None:
        return variables
    gaps = np.where(there, gap.reshape(-1, *[1] * (each.ndim - 1)), 0.0)
    share, interval = over_texts(gaps)
    meaning = "effect over the difference of the other run from the base run: 0 nothing, 1 all of it"
    return variables | {
        "normalised": Variable(("text", *dims), ratio(each, gaps), "1", f"{meaning}; NaN where they do not differ"),
        "normalised_overall": Variable(dims, share, "1", f"{meaning}, of their sums over texts"),
        "normalised_interval": Variable((*dims, "bound"), interval, "1", f"of normalised_overall: {ends}"),
    }
