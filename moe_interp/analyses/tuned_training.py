"""Training a tuned lens: translators that bring every place of the residual stream near to the model's own output.

1. Translators start at zero, where the lens is the plain one (Belrose et al. 2023, arXiv 2303.08112, section 3).
2. A step runs the model on some documents in random order and takes one step of Adam on the mean over tokens of
   KL(final || lens), with a learning rate that falls linearly to zero. Layers share nothing but the forward pass.
   Biases are learned in units of the stream's root mean square, so that one learning rate does for all layers.
3. Every so many steps the same is measured on held-out documents, and each layer keeps the translator that was best
   there; training ends when no layer has improved for some such checks.

The model is run as it is and never changed. Logits of one layer and some tokens are held at a time, beside those that
the run itself gives. The order of documents follows from the seed, so that a resumed training is the unbroken one.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from moe_interp.adapters.formats import rounding_without_gradient
from moe_interp.analyses.collect import Options, Pass, counted, special_ids
from moe_interp.analyses.tuned_lens import Translator, TunedLens, chunks, close, kl_to, measure, stream_reads
from moe_interp.arguments import Count, Positive, Seed, checked
from moe_interp.data import Corpus, batches
from moe_interp.encode import pad, padding_of
from moe_interp.errors import BadData, BadInput
from moe_interp.model import MoEModel
from moe_interp.paths import check_readable, write_whole
from moe_interp.run import Run


@dataclass(frozen=True)
class _Plan:
    """What, with the model and the documents, decides the translators."""

    steps: int
    learning_rate: float
    every: int
    patience: int
    seed: int
    max_tokens: int | None
    batch_tokens: int

    @property
    def options(self) -> Options:
        return Options(max_tokens=self.max_tokens, batch_tokens=self.batch_tokens)


@checked
def train_tuned_lens(
    model: MoEModel,
    corpus: Corpus,
    *,
    held_out: Corpus | None = None,
    steps: Count = 1000,
    learning_rate: Positive = 1e-3,
    every: Count = 50,
    patience: Count = 4,
    state: str | Path | None = None,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> TunedLens:
    """Train a tuned lens for a model.

    Args:
        model: any opened model that writes text, with a tokenizer. Special tokens do not count.
        corpus: documents to train on.
        held_out: documents that decide when to stop; none of them may be in ``corpus``. None: every tenth document of
            ``corpus``, which is then not trained on.
        steps: at most so many; the learning rate reaches zero at the last.
        learning_rate: of Adam. Wide models want less: a step changes the stream by up to D times this share of it.
        every, patience: steps between checks on ``held_out``, and checks without a better layer that end the training.
        state: a file that all that is needed to go on is written to, whole or not at all, at every check; what came
            after the last check is done again. Where the file is there already, training goes on from it, to the same
            bits. Of a training that ended it gives the result.
        seed: of the order of documents.
        max_tokens, batch_tokens: as in `moe_interp.data.batches`; a step takes one batch.

    Raises:
        UnsupportedModel: a residual stream that cannot be decoded.
        BadInput: no tokenizer, options out of range, too few documents, one that is on both sides, an unembedding that
            rounds its input, so that gradients would be wrong, or ``state`` is asked for under standing edits.
        BadData: ``state`` is of another training, or no whole state.
        BadOutput: it cannot be written.
    """
    plan = _Plan(steps, learning_rate, every, patience, seed, max_tokens, batch_tokens)
    if state is not None and model._standing:
        raise BadInput(
            "a training under edits cannot be taken up",
            expected="a model without standing edits, or state=None",
            got=f"{len(model._standing)} active edits, which a saved state does not record",
        )
    start = TunedLens.zeros(model)
    rounding = rounding_without_gradient(model.hf.get_submodule(str(model.spec.unembed)))
    if rounding is not None:
        raise BadInput(
            "gradients would be wrong", expected="an unembedding that takes its input as it is", got=rounding
        )
    corpus, held_out = _apart(corpus, held_out)
    training = _Training(model, start, corpus, held_out, plan)
    path = None if state is None else Path(state)
    with torch.enable_grad(), tqdm(total=steps, desc="tuned lens", unit="step") as bar:
        if path is not None and path.exists():
            training.resume(path)
        else:
            training.check()
            training.save(path)  # now, so that a file that cannot be written is told before the work is done
        bar.update(training.step)
        for documents in islice(training.groups(), training.step, None):
            if training.ended:
                break
            training.update(documents)
            if training.step % every == 0 or training.step == steps:
                training.check()
                training.save(path)
            bar.update()
            bar.set_postfix(held_out=f"{training.best_kl.mean():.4f}", refresh=False)
    return training.result()


def _apart(corpus: Corpus, held_out: Corpus | None) -> tuple[Corpus, Corpus]:
    """Documents to train on and documents held out, with no text on both sides."""
    if held_out is None:
        held_out = replace(corpus, documents=corpus.documents[::10])
        held = set(held_out.contents)
        each = zip(corpus.documents, corpus.contents, strict=True)
        rest = tuple(document for document, content in each if content not in held)
        if not rest:
            raise BadInput("too few documents", expected="two different texts or more", got=str(len(corpus)))
        return replace(corpus, documents=rest), held_out
    if both := set(corpus.contents) & set(held_out.contents):
        raise BadInput(
            "documents on both sides",
            expected="held-out documents that are not trained on",
            got=f"{len(both)} that are, such as {min(map(str, both))[:40]!r}",
        )
    return corpus, held_out


@dataclass
class _Training:
    """Translators on their way: those of now, those that were best on held-out documents, and how far it is.

    Attributes:
        weights, biases: A [D, D] and b [D] of every layer; b in units of ``scales``.
        best: by layer, the A and b that were best so far.
        best_kl: [L], their KL in nats on the held-out documents.
        plain_kl: [L], that of the plain lens.
        stale: checks since a layer last improved.
        tokens: that were trained on.
    """

    model: MoEModel
    start: TunedLens
    corpus: Corpus
    held_out: Corpus
    plan: _Plan
    step: int = 0
    stale: int = 0
    tokens: int = 0
    best_kl: Float[np.ndarray, " L"] = field(default_factory=lambda: np.zeros(0))
    plain_kl: Float[np.ndarray, " L"] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        model, plan = self.model, self.plan
        self.layers = self.start.layers
        self.special = special_ids(model)
        self.held = Pass(model, self.held_out, plan.options)
        # One document at a time: which come together is drawn anew in every epoch.
        alone = batches(model, self.corpus, max_tokens=plan.max_tokens, batch_tokens=1)
        by_number = sorted((int(one.documents[0]), one.inputs["input_ids"][0].tolist()) for one in alone)
        self.documents = [ids for _, ids in by_number]
        self.scales = self._scales()
        self.weights = [one.clone().to(model.device).requires_grad_() for one in self.start.weight]
        self.biases = [one.clone().to(model.device).requires_grad_() for one in self.start.bias]
        self.optimizer = torch.optim.Adam([*self.weights, *self.biases], lr=plan.learning_rate)
        self.best = self._copies()

    @property
    def ended(self) -> bool:
        return self.step >= self.plan.steps or self.stale >= self.plan.patience

    def groups(self) -> Iterator[list[int]]:
        """Endless batches of documents, every epoch in another order."""
        for epoch in count():
            group: list[int] = []
            longest = 0
            for number in np.random.default_rng([self.plan.seed, epoch]).permutation(len(self.documents)).tolist():
                longest = max(longest, len(self.documents[number]))
                if group and longest * (len(group) + 1) > self.plan.batch_tokens:
                    yield group
                    group, longest = [], len(self.documents[number])
                group.append(number)
            yield group

    def update(self, documents: list[int]) -> None:
        """One step of Adam on the mean KL over the tokens of some documents."""
        padding = padding_of(self.model.tokenizer, self.model.spec)
        inputs = pad([self.documents[number] for number in documents], padding=padding)
        run = self._run(inputs)
        total = int(run.mask.sum())
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * (1 - self.step / self.plan.steps)
        self.optimizer.zero_grad()
        for rows in chunks(run, self.layers):
            for place, hidden in enumerate(rows.hidden):
                loss = kl_to(rows, self.model.decode(self._translator(place)(hidden))).sum() / total
                # Of the translator alone: the model's own parameters gather no gradient.
                loss.backward(inputs=[self.weights[place], self.biases[place]])
        self.optimizer.step()
        self.step += 1
        self.tokens += total

    def check(self) -> None:
        """Measure on the held-out documents; every layer keeps its best translator."""
        runs = ((self._run(batch.inputs), batch) for batch in self.held.batches)
        here = [self._translator(place) for place in range(len(self.layers))]
        sums = measure(self.model, [here], self.layers, runs, len(self.held_out))
        if not sums.tokens.any():
            raise BadInput("nothing held out", expected="a document with a token that is not special", got="none")
        kl = sums.kl[:, 0].sum(0) / sums.tokens.sum()
        if self.step == 0 and not np.isfinite(kl).all():
            raise BadInput(
                "the plain lens cannot be improved",
                expected="a finite KL from the model's own output",
                got=f"{kl.round(3).tolist()}, by layer",
                do="Logits of minus infinity, or weights that overflow in this dtype, do so.",
            )
        if self.step == 0:
            self.best_kl = self.plain_kl = kl
            return
        better = kl < self.best_kl
        self.stale = 0 if better.any() else self.stale + 1
        self.best_kl = np.where(better, kl, self.best_kl)
        copies = self._copies()
        self.best = [new if won else old for new, old, won in zip(copies, self.best, better, strict=True)]

    def result(self) -> TunedLens:
        """The lens of the best translators."""
        provenance: dict[str, str | int | float] = {
            **self.start.provenance,
            **{
                f"held_out_{name}": value
                for name, value in self.held.provenance.items()
                if name in ("data", "documents", "texts")
            },
            **self.corpus.told,
            "steps_taken": self.step,
            "tokens": self.tokens,
            "held_out_kl": json.dumps(self.best_kl.round(6).tolist()),
            "held_out_kl_plain": json.dumps(self.plain_kl.round(6).tolist()),
            **{name: "context length" if value is None else value for name, value in asdict(self.plan).items()},
        }
        weight, bias = (torch.stack([one[part] for one in self.best]).cpu() for part in (0, 1))
        return replace(self.start, weight=weight, bias=bias, provenance=provenance)

    def save(self, path: Path | None) -> None:
        """Write all that is needed to go on, whole or not at all."""
        if path is None:
            return
        state = io.BytesIO()
        torch.save(self._state(), state)
        write_whole(path, state.getbuffer())

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        check_readable(path, "the state of a training")
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
            same = state["mark"] == self._mark() and close(state["signature"].cpu(), self.start.signature)
            if same:
                self._take(state)
        except (
            OSError, EOFError, RuntimeError, UnpicklingError, LookupError, TypeError, ValueError, AttributeError
        ) as error:  # fmt: skip
            got = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadData(f"cannot read {path}", expected="the state of a training", got=got) from error
        if not same:
            raise BadData(
                f"{path} is of another training",
                expected="the same model, documents and options",
                got="different ones",
                do="Name another file, or delete this one.",
            )

    def _take(self, state: dict[str, Any]) -> None:
        """Put what `_state` gave in place of what is here; ValueError and the like of what does not fit."""
        with torch.no_grad():
            for own, stored in zip(self.weights + self.biases, state["translators"], strict=True):
                own.copy_(_fitting(stored, own))
        self.step, self.stale, self.tokens = (int(state[name]) for name in ("step", "stale", "tokens"))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.tokens and len(self.optimizer.state) != len(self.weights + self.biases):
            raise ValueError("moments of other translators")
        self.best = [
            (_fitting(weight, own[0]), _fitting(bias, own[1]))
            for (weight, bias), own in zip(state["best"], self.best, strict=True)
        ]
        layers = torch.zeros(len(self.layers))
        self.best_kl, self.plain_kl = (_fitting(state[name], layers).cpu().numpy() for name in ("best_kl", "plain_kl"))

    def _state(self) -> dict[str, Any]:
        return {
            "mark": self._mark(),
            "signature": self.start.signature,
            "translators": [one.detach() for one in self.weights + self.biases],
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_kl": torch.from_numpy(self.best_kl),
            "plain_kl": torch.from_numpy(self.plain_kl),
            "step": self.step,
            "stale": self.stale,
            "tokens": self.tokens,
        }

    def _mark(self) -> str:
        """Tells one training from another: the model, the documents, the options."""
        told = [self.model.name, str(self.model.dtype), self.corpus.contents, self.held_out.contents, asdict(self.plan)]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode("utf-8")).hexdigest()

    def _run(self, inputs: dict[str, Tensor]) -> Run:
        return counted(self.model.run(inputs, read=stream_reads(self.layers)), self.special)

    def _scales(self) -> Float[Tensor, " L"]:
        """[L], root mean square of the stream into each layer, over the first held-out documents."""
        run = self._run(self.held.batches[0].inputs)
        values = (run["resid_pre", layer].float() for layer in self.layers)
        means = [value[run.mask.to(value.device)].square().mean().cpu() for value in values]
        return torch.stack(means).sqrt().nan_to_num(1.0).to(self.model.device)

    def _translator(self, place: int) -> Translator:
        return Translator(self.weights[place], self.biases[place] * self.scales[place])

    @torch.no_grad()
    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        found = (self._translator(place) for place in range(len(self.layers)))
        return [(one.weight.detach().clone(), one.bias.clone()) for one in found]


def _fitting(stored: Tensor, own: Tensor) -> Tensor:
    if stored.shape != own.shape:
        raise ValueError(f"shape {tuple(stored.shape)} in place of {tuple(own.shape)}")
    return stored
