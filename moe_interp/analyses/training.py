"""Routing while a model trains: what practitioners watch, at an interval, from the training's own forward passes.

1. `routing_health` turns the sums of one or more batches into load, dead experts, MaxVio, router entropy and both
   auxiliary losses of every layer, beside what a uniform router gives on as many tokens: in a batch an expert may be
   idle, and MaxVio above 0, by chance alone.
2. `RoutingWatch` listens to a model's forward passes at the steps that are due, and to nothing at the others. Nothing
   is run twice, no gradient changes. It tells a table, and any function of (step, values): a tracker, TensorBoard.
3. `RoutingCallback` is that for Hugging Face's Trainer. Alarms are ranges that the user sets.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import nn
from transformers import TrainerCallback

from moe_interp import stats
from moe_interp.analyses.collect import sizes
from moe_interp.analyses.exact import UNIT
from moe_interp.analyses.routing import RoutingCounts, balances, loss_as_coded
from moe_interp.analyses.routing_values import LOAD, by_name, from_counts, switch_loss, taken
from moe_interp.arguments import Count, checked, frames_up, shown
from moe_interp.errors import BadInput
from moe_interp.hosts import Standing
from moe_interp.hosts.program import Program, seen_by
from moe_interp.measured import code_version, values_told
from moe_interp.model import MoEModel
from moe_interp.opening import wrap
from moe_interp.results import Description, described, labelled
from moe_interp.run import Read, Routing, Run

Tell = Callable[[int, dict[str, float]], None]
"""Called with the step and the values, by names such as "routing/layer_3/max_vio"."""

Range = tuple[int | float, int | float]
"""Lowest and highest value that are in order."""

_POINTS = {"expert_ids": "ids", "gate_weights": "weights", "router_logits": "logits", "router_scores": "scores"}


@dataclass(frozen=True)
class Alarm:
    """A value out of the range that was set for it."""

    step: int
    layer: int
    name: str
    value: float
    allowed: Range

    def __str__(self) -> str:
        low, high = self.allowed
        return f"step {self.step}: {self.name} of layer {self.layer} is {self.value:.3g}, outside {low:g} ... {high:g}"


class RoutingAlarm(UserWarning):
    """How alarms are told where no function is given."""


@checked
def routing_health(sums: RoutingCounts) -> xr.Dataset:
    """What the router of every layer did with some tokens: one Dataset for a step of training.

    Args:
        sums: of one or more batches; all documents are taken together.

    Returns:
        Dims layer, expert: ``utilisation`` (of all decisions, sums to 1), ``n50`` ... ``dead_experts`` as in
        `moe.routing`, ``max_vio``, ``load_balance``, ``z_loss``, ``entropy``, ``margin``, ``heaviest_weight``,
        ``weight_sum``; ``load_balance_as_coded``, over all layers; controls ``*_uniform`` and ``entropy_baseline``.

    Raises:
        BadInput: no token was counted.
    """
    tokens = sums.tokens.sum()
    if not tokens:
        raise BadInput("nothing was counted", expected="a batch with a real token", got="none")
    counts = sums.counts.sum(axis=0)
    whole = from_counts(counts[None], np.array([tokens]), sums.top_k)
    seen = taken(counts, sums.top_k)
    score = stats.ratio(sums.scores.sum(axis=0) / UNIT, seen)
    values: dict[str, Any] = {
        "tokens": tokens,
        "utilisation": stats.shares(counts),
        "load_balance": switch_loss(stats.shares(counts), score),
        "load_balance_as_coded": loss_as_coded(sums),
        "entropy_baseline": whole["entropy_baseline"],
    }
    for name in LOAD:
        values |= {name: whole[name][0], f"{name}_uniform": whole[f"{name}_uniform"][0]}
    means = stats.ratio(sums.per_token.sum(axis=0) / UNIT, seen)
    values |= by_name(means, sums.top_k, counts.shape[-1])
    coords: dict[str, ArrayLike] = {"layer": np.array(sums.layers), "expert": np.arange(counts.shape[-1])}
    about = {"counts": values_told(*sums.state().values()), "code": code_version()}
    return labelled(described(values, _VARIABLES), coords, analysis="routing_health", provenance=about)


_L = ("layer",)
_VARIABLES: dict[str, Description] = {
    "tokens": ((), "tokens", "real tokens"),
    "utilisation": (("layer", "expert"), "1", "share of decisions that go to the expert; uniform: 1/E"),
    "load_balance": (_L, "1", "Switch load-balance loss, 0 ... E; 1 where loads or scores are even"),
    "load_balance_as_coded": ((), "1", "load-balance loss as transformers codes it; K at balance (doge: 1); NaN: none"),
    "entropy": (_L, "nats", "mean entropy of a token's router scores, 0 (sure) ... ln E"),
    "entropy_baseline": ((), "nats", "entropy of equal scores, ln E"),
    "margin": (_L, "1", "mean of the lowest score chosen minus the highest left out; NaN where K = E"),
    "heaviest_weight": (_L, "1", "mean combine weight of a token's heaviest slot"),
    "weight_sum": (_L, "1", "mean sum of a token's combine weights"),
    "z_loss": (_L, "1", "router z-loss: mean squared logsumexp of the router logits"),
    **{name: (_L, units, meaning) for name, (_, units, meaning) in LOAD.items()},
    **{
        f"{name}_uniform": (("layer?",), units, f"of a uniform router with as many tokens: {meaning}")
        for name, (_, units, meaning) in LOAD.items()
    },
}
_TOLD = ("n50", "gini", "load_entropy", "max_vio", "dead_experts", "entropy", "load_balance", "z_loss")


class RoutingWatch:
    """Listens to a model's own forward passes at the steps that are due.

    In any loop::

        with moe.RoutingWatch(model, every=100, to=lambda step, values: tracker.log(values, step=step)) as watch:
            for step, batch in enumerate(batches):
                with watch.step(step):
                    model(**batch).loss.backward()
                    ...
        watch.table()

    Several forward passes of one step (gradient accumulation) are added up. Under data parallelism every process
    watches its own tokens. Layers that are computed anew in the backward pass are counted once.

    Args:
        model: a transformers model, or one that is already open.
        every: steps between two reports; the others cost nothing.
        to: told every report; see `Tell`.
        alarms: allowed range (low, high) by the name of a value of `routing_health`, for instance
            ``{"dead_experts": (0, 8), "load_entropy": (0.8, 1.0)}``.
        on_alarm: called with every `Alarm` (None: a warning).

    Raises:
        BadInput: ``every`` below 1 or no whole number, or an alarm for a value that there is not, or whose range is not
            (low, high).
        UnsupportedModel: the model cannot be opened.
    """

    @checked
    def __init__(
        self,
        model: nn.Module | MoEModel,
        *,
        every: Count = 100,
        to: Tell | None = None,
        alarms: Mapping[str, Range] | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
    ):
        _check_alarms(alarms)
        self.model = model if isinstance(model, MoEModel) else wrap(model)
        self.every, self.to, self.alarms, self.on_alarm = every, to, dict(alarms or {}), on_alarm
        self.raised: list[Alarm] = []
        self._reports: list[tuple[int, xr.Dataset]] = []
        self._ours = not isinstance(model, MoEModel)
        self._sums: RoutingCounts | None = None
        self._standing: Standing | None = None
        self._held: object = None  # as long as somebody holds this, it listens

    def close(self) -> None:
        """Stop listening, and leave the model as it was found; the table stays."""
        self._stop()
        if self._ours:
            self.model.close()
            self._ours = False

    def __enter__(self) -> "RoutingWatch":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @checked
    def step(self, number: int) -> "_Step":
        """The ``with`` of one step of training; reports at its end if the step is due.

        Raises:
            BadInput: not the number of a step.
        """
        return _Step(self, number)

    @checked
    def begin(self, number: int) -> None:
        """What `step` does first, for loops that cannot use a ``with``."""
        self.drop()  # what a step that was begun and never ended may have left
        if number % self.every == 0:
            self._sums = RoutingCounts.empty(1, *sizes(self.model), balances(self.model))
            reads = [Read(point, self.model.layers) for point in _POINTS]
            self._standing = Standing(reads=reads, hear=self._heard)
            self._held = self._standing.begin(self.model._standings)

    @checked
    def end(self, number: int) -> list[Alarm]:
        """What `step` does last: report, and give the alarms that were raised."""
        return self._finish(number)

    def _finish(self, number: int) -> list[Alarm]:
        sums, self._sums = self._sums, None
        self._stop()
        if sums is None or not sums.tokens.sum():
            return []
        report = routing_health(sums)
        self._reports.append((number, report))
        if self.to is not None:
            self.to(number, told(report))
        raised = list(_alarms(number, report, self.alarms))
        self.raised += raised
        for alarm in raised:
            if self.on_alarm is None:
                warnings.warn(
                    RoutingAlarm(str(alarm)), stacklevel=frames_up(3)
                )  # of who calls `end`, or leaves the `with`
            else:
                self.on_alarm(alarm)
        return raised

    def drop(self) -> None:
        """Forget what was counted in a step that failed."""
        self._sums = None
        self._stop()

    def _stop(self) -> None:
        if self._standing is not None:
            self._standing.end()
        self._standing = self._held = None

    def table(self) -> xr.Dataset:
        """All reports so far, with a dim ``step``.

        Raises:
            BadInput: there is none.
        """
        if not self._reports:
            due = f"a forward pass within `with watch.step(n):`, n a multiple of {self.every}"
            raise BadInput("nothing was reported", expected=due, got="none")
        steps, reports = zip(*self._reports, strict=True)
        joined = xr.concat(reports, xr.DataArray(list(steps), dims="step", name="step"), coords="minimal", join="exact")
        values = {name: joined[name].transpose("step", ...).values for name in joined.data_vars}
        table: dict[str, Description] = {
            str(name): (("step", *_VARIABLES[str(name)][0]), *_VARIABLES[str(name)][1:]) for name in values
        }
        coords: dict[str, ArrayLike] = {
            "step": list(steps),
            "layer": reports[0]["layer"].values,
            "expert": reports[0]["expert"].values,
        }
        named = {str(name): value for name, value in values.items()}
        about = {**self.model.provenance(), "every": self.every}
        return labelled(described(named, table), coords, analysis="routing_watch", provenance=about)

    def _heard(self, program: Program) -> None:
        """Count a pass, if all layers ran in it."""
        layers, values, spec = self.model.layers, program.values, self.model.spec
        if self._sums is None or not all((point, layer) in values for point in _POINTS for layer in layers):
            return
        routing = {}
        for layer in layers:
            seen = {name: values[point, layer].detach() for point, name in _POINTS.items()}
            context = program.contexts[layer]
            mask = seen_by(spec.moe(layer), context.tokens.mask, context.rows, seen["weights"])
            routing[layer] = Routing(mask=mask, **seen)  # type: ignore[arg-type]
        # The last layer is of the stack that gives the output, whose tokens are those of the run.
        tokens = program.contexts[layers[-1]].tokens
        run = Run(torch.zeros(*tokens.mask.shape, 1), None, tokens, routing, {})
        self._sums.update(run, np.zeros(len(tokens.mask), np.int64))


def told(report: xr.Dataset) -> dict[str, float]:
    """A report as numbers by name, for trackers: "routing/layer_3/max_vio", "routing/load_balance_as_coded"."""
    layers = report["layer"].values.tolist()
    values = {
        f"routing/layer_{layer}/{name}": float(report[name].values[place])
        for place, layer in enumerate(layers)
        for name in _TOLD
    }
    return values | {"routing/load_balance_as_coded": float(report["load_balance_as_coded"])}


def _alarms(step: int, report: xr.Dataset, allowed: Mapping[str, Range]) -> list[Alarm]:
    found = []
    for name, (low, high) in allowed.items():
        values: Float[np.ndarray, " L"] = report[name].values
        for layer, value in zip(report["layer"].values.tolist(), values.tolist(), strict=True):
            if not low <= value <= high:
                found.append(Alarm(step, layer, name, value, (low, high)))
    return found


def _check_alarms(alarms: Mapping[str, Any] | None) -> None:
    """Before a training begins: refuse what would fail, or always alarm, in the middle of it."""
    unknown = set(alarms or {}) - set(_TOLD)
    if unknown:
        raise BadInput("unknown alarms", expected=f"some of {', '.join(_TOLD)}", got=", ".join(sorted(unknown)))
    for name, allowed in (alarms or {}).items():
        if not _is_range(allowed):
            raise BadInput(f"not a range of {name}", expected="(low, high), low <= high", got=repr(allowed))


def _is_range(given: Any) -> bool:
    pair = isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(one, Real) for one in given)
    return pair and bool(given[0] <= given[1])


class _Step:
    """The ``with`` of `RoutingWatch.step`."""

    def __init__(self, watch: RoutingWatch, number: int):
        self.watch, self.number = watch, number

    def __enter__(self) -> RoutingWatch:
        self.watch.begin(self.number)
        return self.watch

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.watch._finish(self.number)
        else:
            self.watch.drop()


class RoutingCallback(TrainerCallback):
    """`RoutingWatch` for Hugging Face's Trainer: ``Trainer(..., callbacks=[moe.RoutingCallback(every=100)])``.

    Args:
        every, to, alarms, on_alarm: as `RoutingWatch` has them. For TensorBoard, give ``moe.to_tensorboard(writer)``.
        stop: end the training at the first alarm.

    Attributes:
        watch: the watch, once training has begun; its ``table()`` stays after the end.

    Raises:
        BadInput: as `RoutingWatch`.
    """

    @checked
    def __init__(
        self,
        *,
        every: Count = 100,
        to: Tell | None = None,
        alarms: Mapping[str, Range] | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
        stop: bool = False,
    ):
        _check_alarms(alarms)
        self._options: dict[str, Any] = {"every": every, "to": to, "alarms": alarms, "on_alarm": on_alarm}
        self.stop = stop
        self.watch: RoutingWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Opens the model."""
        self.watch = RoutingWatch(model, **self._options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listens if the step is due; steps are counted from 0."""
        if self.watch is not None:
            self.watch.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports."""
        if self.watch is not None and self.watch.end(state.global_step - 1) and self.stop:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the model as it was found."""
        if self.watch is not None:
            self.watch.close()


@checked
def to_tensorboard(writer: Any) -> Tell:
    """Tells a ``SummaryWriter``, or whatever else has ``add_scalar(name, value, step)``.

    Raises:
        BadInput: it has no ``add_scalar``.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise BadInput("not a writer", expected="a SummaryWriter, or what else has add_scalar", got=shown(writer))

    def tell(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return tell
