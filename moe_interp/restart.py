"""The rest of a forward pass, again and again: from a cached residual on, under other edits, many variants in a batch.

A sweep that changes one expert at a time runs the model once for each. What comes before the first changed layer is the
same every time, and so are texts that a change does not touch: both are left out here, and several variants go through
the model side by side, each under its own edits. What a restart gives is what a whole run under the same edits gives,
up to rounding; an architecture where it is not (layers that hand more than the residual to later ones) is found out by
a restart without edits, and then every variant is a whole pass. So it is on a server, where no layer is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_interp.encode import Inputs
from moe_interp.errors import BadInput
from moe_interp.hosts import Session
from moe_interp.hosts.program import Block
from moe_interp.interventions import Intervention
from moe_interp.model import Edits, MoEModel, Reads
from moe_interp.run import Read, Tokens


class Variant(NamedTuple):
    """A batch under edits of its own.

    Attributes:
        edits: carried out in order, after those of the base run.
        texts: [n], which texts of the batch; None: all.
        at: [B, S], where its logits are wanted; None: where those of all variants are.
    """

    edits: Sequence[Intervention]
    texts: Int[Tensor, " n"] | None = None
    at: Bool[Tensor, "B S"] | None = None


@dataclass(frozen=True)
class Outcome:
    """What one variant gave.

    Attributes:
        number: of the variant, in the order given.
        texts: [n], the text of each row of logits.
        columns: [n], its column in the batch; the text's last real token where a head gives a row for a whole text.
        logits: [n, V], what the model gives: scores of labels from a classifier, hidden states without a head.
        touched: how many values each of its edits changed.
    """

    number: int
    texts: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    logits: Float[Tensor, "n V"]
    touched: tuple[int, ...]


class Restart:
    """A run, of which the rest can be run again from any layer.

    Attributes:
        model: an opened model.
        inputs: what was run, as the transformers model is given it.
        base: the run, with ``resid_pre`` of every layer that the output goes through.
        exact: whether leaving layers out gives the same; else variants are whole passes.
        separable: whether a text alone gives the same; else each variant is a pass of its own over all texts.

    Raises:
        BadInput: the model takes no tokens, or edits of the base run (or standing ones) change modules.
    """

    def __init__(self, model: MoEModel, inputs: Inputs, *, edit: Edits = (), read: Reads = ()):
        own = [edit] if isinstance(edit, Intervention) else list(edit)
        self.model, self.edits = model, [*model._standing, *own]
        self.inputs = model.encode(inputs)
        if model.spec.kind == "other":
            raise BadInput("a restart needs tokens", expected="a model of tokens", got=model.spec.model_type)
        if modules := [one for one in self.edits if one.widths(model.spec) or one.exchanges(model.spec)]:
            raise BadInput(
                "effects are not measured under edits of modules",
                expected="edits of values and routes: no top_k above the model's own K, no swapped layers",
                got=repr(modules[0]),
            )
        self.layers = [layer.index for layer in model.spec.main_layers]
        wanted = [one for one in read if (one if isinstance(one, str) else one.point) != "resid_pre"]
        self._returned: dict[str, Any] = {}  # what each layer returns besides the residual: None for a tensor alone
        every = [Read("resid_pre", tuple(self.layers)), *wanted]
        if model.here:
            self.base = model._run(self.inputs, every, own, forms=self._returned)
        else:
            self.base = model.run(self.inputs, read=every, edit=own)
        self.separable = self._reproduces([self.layers[0]])
        self.exact = (
            model.here
            and self.separable
            and model.spec.kind == "causal"
            and self._reproduces(self._starts[1::2] + self._starts[-1:])
        )

    @property
    def tokens(self) -> Tokens:
        """Which tokens of the batch are real."""
        return self.base.tokens

    @torch.no_grad()
    def run(
        self, variants: Sequence[Variant], at: Bool[Tensor, "B S"] | None = None, *, batch_tokens: int = 4096
    ) -> Iterator[Outcome]:
        """Every variant's logits at some tokens, in no certain order.

        Args:
            variants: each with edits of points and routes; those that change modules (``top_k`` above the model's own
                K, two layers that swap experts) are refused.
            at: [B, S], where logits of variants that do not say are wanted; None: at all real tokens.
            batch_tokens: the most tokens in one pass, padding included (one variant's at least).

        Raises:
            BadInput: edits that a block of rows cannot have, or that contradict each other.
            UnknownName: they name what the model does not have.
        """
        wanted = self.tokens.mask if at is None else at
        edits = [[edit for one in variant.edits for edit in one.edits(self.model.spec)] for variant in variants]
        firsts = [min((edit.layer or 0 for edit in some), default=self.layers[-1]) for some in edits]
        for first in sorted(set(firsts)):
            numbers = [number for number, one in enumerate(firsts) if one == first]
            for chunk in self._chunks(variants, numbers, batch_tokens):
                yield from self._pass([(number, variants[number]) for number in chunk], self._start(first), wanted)

    def _texts(self, variant: Variant) -> Int[Tensor, " n"]:
        if variant.texts is None or not self.separable:
            return self.tokens.texts
        return variant.texts.to(self.tokens.mask.device)

    def _chunks(self, variants: Sequence[Variant], numbers: list[int], batch_tokens: int) -> Iterator[list[int]]:
        chunk: list[int] = []
        rows, most = 0, max(1, batch_tokens // self.tokens.mask.shape[1]) if self.separable else 1
        for number in numbers:
            count = len(self._texts(variants[number]))
            if chunk and rows + count > most:
                yield chunk
                chunk, rows = [], 0
            if count:
                chunk.append(number)
                rows += count
        if chunk:
            yield chunk

    def _start(self, first: int) -> int:
        """The layer to start at so that this one runs: the first of all for a whole pass."""
        starts = [start for start in self._starts if start <= first and self.exact]
        return max(starts, default=self.layers[0])

    def _pass(self, chunk: Sequence[tuple[int, Variant]], first: int, wanted: Bool[Tensor, "B S"]) -> Iterator[Outcome]:
        texts = [self._texts(variant) for _, variant in chunk]
        rows = torch.cat(texts)
        at = torch.cat(
            [
                (wanted if variant.at is None else variant.at)[some]
                for (_, variant), some in zip(chunk, texts, strict=True)
            ]
        )
        at = self._given(at, rows)
        blocks, begin = [], 0
        for (_, variant), some in zip(chunk, texts, strict=True):
            rows_of = slice(begin, begin + len(some))
            blocks.append(Block([*self.edits, *variant.edits], rows_of, some, base=len(self.edits)))
            begin += len(some)
        logits, touched = self._logits(rows, blocks, first, at)
        found, columns = at.nonzero().T
        ends = torch.searchsorted(found, torch.tensor([block.rows.stop for block in blocks]).to(found)).tolist()
        done = 0
        for (number, variant), block, first_one, end in zip(chunk, blocks, [0, *ends], ends, strict=False):
            texts_of, columns_of, its = rows[found[first_one:end]], columns[first_one:end], logits[first_one:end]
            own = touched[done + len(self.edits) : done + len(block.edits)]
            done += len(block.edits)
            if variant.texts is not None and not self.separable:
                asked = torch.isin(texts_of, variant.texts.to(rows))
                texts_of, columns_of, its = texts_of[asked], columns_of[asked], its[asked]
            yield Outcome(number, texts_of, columns_of, its, tuple(own))

    def _logits(
        self, rows: Int[Tensor, " R"], blocks: Sequence[Block], first: int, at: Bool[Tensor, "R S"]
    ) -> tuple[Float[Tensor, "n V"], list[int]]:
        inputs = {key: _of_rows(value, rows, len(self.tokens.mask)) for key, value in self.inputs.items()}
        if not self.model.here:
            return cast(Any, self.model).run_blocks(inputs, blocks, at)
        gathered: list[bool] = []  # not empty if the unembedding saw the wanted tokens alone

        def gather(hidden: Tensor) -> Tensor:
            # A head that pools takes its token by the number that it has in the whole text.
            if hidden.shape[:2] != at.shape or self._pooled:
                return hidden
            gathered.append(True)
            return hidden[at][None]

        session = Session(self.model._host, blocks, routing=False, unembed=gather, **self._from(first, rows))
        logits = session(lambda: self.model.forward(inputs))
        return (logits.flatten(0, -2) if gathered else self._at(logits, at)), session.program.touched

    @property
    def _pooled(self) -> bool:
        """Whether the model gives one row of logits for a text, not for a token."""
        return self.model.spec.head == "pooled"

    def _given(self, at: Bool[Tensor, "R S"], rows: Int[Tensor, " R"]) -> Bool[Tensor, "R S"]:
        """Where there are logits, of the places where they are wanted: pooled ones stand at the last real token."""
        if not self._pooled:
            return at
        mask = self.tokens.mask[rows]
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        return last & at.any(dim=1, keepdim=True)

    def _at(self, logits: Tensor, at: Bool[Tensor, "R S"]) -> Float[Tensor, "n V"]:
        """Logits at some places of a batch."""
        return logits[at.any(dim=1)] if self._pooled else logits[at]

    def _from(self, first: int, rows: Int[Tensor, " R"]) -> dict[str, Any]:
        """Layers before ``first`` do nothing, and it is given what the base run gave it."""
        if first == self.layers[0]:
            return {}
        spec = self.model.spec
        paths = {spec.layers[layer].path for layer in self.layers if layer < first} - {spec.layers[first].path}
        return {
            "given": {("resid_pre", first): self.base["resid_pre", first][rows]},
            "skipped": {path: self._returned[path] for path in paths},
        }

    @cached_property
    def _starts(self) -> list[int]:
        """Layers that a restart can begin at: the first parts of modules whose cached residual is not edited again."""
        spec = self.model.spec
        edited = {edit.layer for one in self.edits for edit in one.edits(spec) if edit.point == "resid_pre"}
        return [layer for layer in self.layers[1:] if spec.layers[layer].part == 0 and layer not in edited]

    def _reproduces(self, starts: Sequence[int]) -> bool:
        """Whether restarts without edits, of one text in other company (alone, or beside itself), give its logits."""
        tensors = any(isinstance(item, Tensor) for form in self._returned.values() for item in form or ())
        if tensors and any(first > self.layers[0] for first in starts):
            return False
        count = 1 if len(self.tokens.mask) > 1 else 2
        text = torch.zeros(count, dtype=torch.long, device=self.tokens.mask.device)
        at = self._given(self.tokens.mask[text], text)
        expected = self._at(self.base.output[text], at)
        blocks = [Block(self.edits, slice(0, count), text, base=len(self.edits))]
        return all(_alike(self._logits(text, blocks, first, at)[0], expected) for first in starts)


def _alike(got: Float[Tensor, "n V"], expected: Float[Tensor, "n V"]) -> bool:
    """Whether logits are the same but for rounding.

    In 16 bits rounding alone can make single tokens choose other experts, so that half of them must be alike; logits
    that follow from something else differ at most tokens, by about as much as they are large (0.7 and more).
    """
    rounding = 1e3 * torch.finfo(expected.dtype).eps
    if rounding < 0.1:
        return float((got - expected).abs().max()) <= rounding * float(expected.abs().max())
    apart, size = (got.float() - expected.float()).norm(dim=-1), expected.float().norm(dim=-1)
    return float((apart / size.clamp_min(torch.finfo(size.dtype).tiny)).median()) <= 0.1


def _of_rows(value: Any, rows: Tensor, count: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
