"""What a change of a model is measured by: one number for each text, from logits at some of its tokens.

A metric is bound to a base run, which says which tokens it looks at and what it compares with. Where it looks at
several, a text's number is the mean over them. Answers that are given as text become ids before that, when `as_metric`
is told the model: its tokenizer says which.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from moe_interp.analyses.answers import Answers, answer_ids, as_answers
from moe_interp.analyses.distributions import check_logits, divergence, log_probabilities
from moe_interp.analyses.functions import check_arguments, kind, number_of
from moe_interp.analyses.plain import check_writes_text
from moe_interp.arguments import CheckedLater, checked_fields
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.model import MoEModel
from moe_interp.run import Run

Values = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits [n, V] of tokens, their texts [n] and columns [n], to a number for each [n]."""


@dataclass(frozen=True)
class Bound:
    """A metric of one batch.

    Attributes:
        at: [B, S], the tokens whose logits it looks at.
        values: a number for each of them.
        by_token: whether a token's number follows from its own logits alone.
    """

    at: Bool[Tensor, "B S"]
    values: Values
    by_token: bool = True

    def per_text(
        self, logits: Float[Tensor, "n V"], texts: Int[Tensor, " n"], columns: Int[Tensor, " n"]
    ) -> dict[int, float]:
        """The number of each text: the mean over its tokens."""
        values = self.values(logits, texts, columns).double()
        return {int(text): float(values[texts == text].mean()) for text in texts.unique()}

    def total(self, logits: Float[Tensor, "B S V"]) -> Float[Tensor, ""]:
        """The sum of the texts' numbers, which can be differentiated."""
        texts, columns = self.at.nonzero().T
        values = self.values(logits[texts, columns], texts, columns)
        return (values / self.at.sum(dim=1)[texts]).sum()

    def of(self, run: Run) -> Float[Tensor, " B"]:
        """The number of each text in a run of the same batch."""
        texts, columns = self.at.nonzero().T
        found = self.per_text(run.logits[texts, columns], texts, columns)
        return torch.tensor([found[text] for text in range(len(self.at))], dtype=torch.float64)


@runtime_checkable
class Metric(Protocol):
    """What can be bound to a run."""

    @property
    def name(self) -> str:
        """For results."""

    @property
    def units(self) -> str:
        """Of its numbers."""

    def bind(self, base: Run) -> Bound:
        """The metric of the batch that ``base`` ran."""


@checked_fields
@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood of a text's tokens given those before, the mean over all but the first."""

    name: str = "nll"
    units: str = "nats/token"

    def bind(self, base: Run) -> Bound:
        """Targets are the batch's own tokens.

        Raises:
            BadInput: a text of one token, or inputs without ids.
        """
        if base.token_ids is None:
            raise BadInput("nothing to predict", expected="token ids", got="embeddings")
        real, ids = base.mask, base.token_ids
        at = torch.zeros_like(real)
        at[:, :-1] = real[:, :-1] & real[:, 1:]
        if not bool(at.any(dim=1).all()):
            raise BadInput("nothing to predict", expected="texts of two tokens or more", got="a shorter one")

        def values(logits: Tensor, texts: Tensor, columns: Tensor) -> Tensor:
            check_logits(logits)
            return functional.cross_entropy(logits.float(), ids[texts, columns + 1], reduction="none")

        return Bound(at, values)


@checked_fields
@dataclass(frozen=True)
class LogitDifference:
    """Logit of an answer less that of a wrong one, at one token (Wang et al. 2022, arXiv 2211.00593).

    ``LogitDifference(" he", " she")``, or ``LogitDifference((" he", " it"), (" she", " they"))`` for two texts.

    Attributes:
        answers, wrong: one token for all texts, or a tuple of one a text: texts of exactly one token, or ids.
        position: of a real token, negative ones from the end; the logits are those that follow it.
        given: answers and wrong ones as they were given, once texts among them have become ids.

    Raises:
        BadInput: something else than tokens, or no wrong ones.
    """

    answers: Answers = ()
    wrong: Answers = ()
    position: int = -1
    name: str = "logit_difference"
    units: str = "logits"
    given: tuple[Answers, ...] = ()

    def __post_init__(self) -> None:
        form = 'Write moe.LogitDifference(" he", " she"): the answer, then the wrong one.'
        object.__setattr__(self, "answers", as_answers(self.answers, "the answer of a logit difference", form))
        object.__setattr__(self, "wrong", as_answers(self.wrong, "the wrong answer of a logit difference", form))

    def bind(self, base: Run) -> Bound:
        """The difference for the batch's texts.

        Raises:
            BadInput: another number of answers, ids out of the vocabulary, or a text without the position.
        """
        count, size = len(base.mask), base.logits.shape[-1]
        ids = [
            torch.tensor(_for_each(some, count, size), device=base.mask.device) for some in (self.answers, self.wrong)
        ]
        at = _at(base, self.position)
        for one in ids:
            _check_possible(base, at, one)

        def values(logits: Tensor, texts: Tensor, columns: Tensor) -> Tensor:
            check_logits(logits)
            right, wrong = (logits.float().gather(1, one[texts, None])[:, 0] for one in ids)
            return right - wrong

        return Bound(at, values)


def _check_possible(base: Run, at: Bool[Tensor, "B S"], ids: Int[Tensor, " B"]) -> None:
    """Refuse answers whose logit is minus infinity, of which no difference or effect is a number."""
    texts, columns = at.nonzero().T
    logits = base.logits[texts, columns].gather(1, ids[texts, None])[:, 0]
    if bool(logits.isneginf().any()):
        raise BadInput(
            "an answer that the model cannot give",
            expected="ids of tokens with a finite logit",
            got=f"id {int(ids[texts][logits.isneginf()][0])}, whose logit is minus infinity",
            do="It may be one of those that pad the vocabulary.",
        )


def _at(base: Run, position: int) -> Bool[Tensor, "B S"]:
    """The token at this position of every text.

    Raises:
        BadInput: a text is too short to have it.
    """
    base.tokens.columns((position,))
    return base.tokens.at((position,))


def _for_each(answers: Answers, count: int, size: int) -> list[int]:
    given: Any = answers
    if any(isinstance(one, str) for one in given):
        raise BadInput(
            "answers are text",
            expected="ids, where a metric is bound to a run by hand",
            got=repr(given),
            do="moe_interp.analyses.metrics.as_metric(metric, model) looks them up; analyses do so themselves.",
        )
    listed = list(given) * count if len(given) == 1 else list(given)
    if len(listed) != count or min(listed) < 0 or max(listed) >= size:
        raise BadInput(
            "answers do not fit the texts", expected=f"1 or {count} ids from 0 to {size - 1}", got=str(list(given))
        )
    return listed


@checked_fields
@dataclass(frozen=True)
class LogProbability:
    """Log-probability of an answer at one token: as `LogitDifference`.

    Raises:
        BadInput: something else than tokens.
    """

    answers: Answers = ()
    position: int = -1
    name: str = "log_probability"
    units: str = "nats"
    given: tuple[Answers, ...] = ()

    def __post_init__(self) -> None:
        form = 'Write moe.LogProbability(" he").'
        object.__setattr__(self, "answers", as_answers(self.answers, "a log-probability", form))

    def bind(self, base: Run) -> Bound:
        """The log-probability for the batch's texts.

        Raises:
            BadInput: another number of answers, ids out of the vocabulary, or a text without the position.
        """
        ids = torch.tensor(_for_each(self.answers, len(base.mask), base.logits.shape[-1]), device=base.mask.device)
        at = _at(base, self.position)
        _check_possible(base, at, ids)

        def values(logits: Tensor, texts: Tensor, columns: Tensor) -> Tensor:
            return log_probabilities(logits).gather(1, ids[texts, None])[:, 0]

        return Bound(at, values)


@checked_fields
@dataclass(frozen=True)
class Probability:
    """Probability of an answer at one token: as `LogitDifference`.

    Raises:
        BadInput: something else than tokens.
    """

    answers: Answers = ()
    position: int = -1
    name: str = "probability"
    units: str = "1"
    given: tuple[Answers, ...] = ()

    def __post_init__(self) -> None:
        form = 'Write moe.Probability(" he").'
        object.__setattr__(self, "answers", as_answers(self.answers, "a probability", form))

    def bind(self, base: Run) -> Bound:
        """The probability for the batch's texts.

        Raises:
            BadInput: another number of answers, ids out of the vocabulary, or a text without the position.
        """
        log = LogProbability(self.answers, self.position).bind(base)
        return Bound(log.at, lambda logits, texts, columns: log.values(logits, texts, columns).exp())


@checked_fields
@dataclass(frozen=True)
class KL:
    """Divergence from the base run's next-token distribution, KL(base || changed), the mean over a text's tokens.

    Attributes:
        position: at this token alone; None: at all real tokens.
    """

    position: int | None = None
    name: str = "kl"
    units: str = "nats"

    def bind(self, base: Run) -> Bound:
        """The divergence from the logits of this run, whose log-probabilities are kept: [B, S, V].

        Raises:
            BadInput: a text without the position.
        """
        at = base.mask if self.position is None else _at(base, self.position)
        check_logits(base.logits, at)
        log_base = base.logits.detach().float().log_softmax(dim=-1)

        def values(logits: Tensor, texts: Tensor, columns: Tensor) -> Tensor:
            return divergence(log_base[texts, columns], log_probabilities(logits))

        return Bound(at, values)


@dataclass(frozen=True)
class OfLogits:
    """Any function from the logits [s, V] of all real tokens of one text to a number."""

    fn: Callable[[Tensor], Tensor | float]
    name: str = "metric"
    units: str = "1"

    def bind(self, base: Run) -> Bound:
        """The function for the batch's texts."""

        def values(logits: Tensor, texts: Tensor, columns: Tensor) -> Tensor:
            found = logits.new_zeros(len(texts), dtype=torch.float64)
            for text in texts.unique():
                found = torch.where(texts == text, number_of(self.fn, logits[texts == text]), found)
            return found

        return Bound(base.mask, values, by_token=False)


AnyMetric = Annotated[Metric | str | Callable[[Tensor], Tensor | float], CheckedLater()]
"""A metric, its name, or a function from the logits [s, V] of a text's real tokens to a number."""


def _check_head(metric: Any, model: MoEModel) -> None:
    """Refuse a metric that the model has no logits for.

    A divergence and functions of logits also fit a head that classifies tokens; ids of tokens fit none but a
    language-model head.
    """
    if isinstance(metric, NLL):
        check_writes_text(model)
    spec = model.spec
    of_tokens = isinstance(metric, LogitDifference | LogProbability | Probability)
    if spec.unembed is None or spec.head == "pooled" or (of_tokens and not spec.predicts_tokens):
        raise UnsupportedModel(
            f"{spec.model_type} has no logits that the metric could measure",
            expected="logits of the vocabulary at each token" if of_tokens else "logits at each token",
            got=spec.gives,
            do="Open the checkpoint with its language-model head.",
        )


def _of_ids(metric: Any, model: MoEModel) -> Any:
    """A metric with ids in place of texts.

    Raises:
        BadInput: a text that is not exactly one token of the model's.
    """
    if not isinstance(metric, LogitDifference | LogProbability | Probability):
        return metric
    given = {name: getattr(metric, name) for name in ("answers", "wrong") if hasattr(metric, name)}
    if not any(isinstance(one, str) for some in given.values() for one in some):
        return metric
    ids: dict[str, Any] = {name: tuple(answer_ids(model, some).tolist()) for name, some in given.items()}
    return replace(metric, **ids, given=tuple(given.values()))


_FORMS = (
    "'nll', 'kl', a metric such as moe.LogitDifference(\" he\", \" she\"), or a function from the logits [pos, vocab] "
    "of one text to a number"
)


def as_metric(given: AnyMetric, model: MoEModel | None = None) -> Metric:
    """A metric by name ("nll", "kl"), as it is, or of a function of a text's logits.

    With a model, texts of answers become its ids.

    Raises:
        BadInput: neither, or an answer that is not one token.
        UnsupportedModel: ``model`` has no logits for it.
    """
    named: dict[Any, Metric] = {"nll": NLL(), "kl": KL()}
    metric: Any = named.get(given, given) if isinstance(given, str) else given
    _check_form(metric)
    if model is not None:
        _check_head(metric, model)
        metric = _of_ids(metric, model)
    return metric if hasattr(metric, "bind") else OfLogits(metric)


def _check_form(given: Any) -> None:
    """Refuse what is no metric.

    Raises:
        BadInput: it is none.
    """
    if isinstance(given, str):
        raise BadInput("unknown metric", expected=_FORMS, got=repr(given))
    if isinstance(given, type):
        do = f"Make one: moe.{given.__name__}(...)." if hasattr(given, "bind") else None
        raise BadInput("not a metric", expected="a metric, not its class", got=f"the class {given.__name__}", do=do)
    if hasattr(given, "bind"):
        lacking = [name for name in ("name", "units") if not hasattr(given, name)]
        if lacking:
            raise BadInput(
                "not a metric", expected="bind, name and units", got=f"a {type(given).__name__} without {lacking[0]}"
            )
    elif callable(given):
        check_arguments(given)
    else:
        raise BadInput("not a metric", expected=_FORMS, got=kind(given))
