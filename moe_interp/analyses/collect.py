"""One pass over a corpus: what each batch routed, and the accumulators that it feeds.

1. `Pass` runs the corpus batch by batch and gives each run with its documents. Padding does not count, nor do
   special tokens (such as the one that begins every text) unless asked: both are outside the run's masks.
2. `collect` feeds any accumulators from one such pass, shows progress, and goes on where an interrupted pass was.
"""

import copy
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from moe_interp.analyses.exact import Exact, told_top_k
from moe_interp.arguments import CheckedLater, Count, checked, checked_fields
from moe_interp.data import Batch, Corpus, batches
from moe_interp.encode import special_token_ids
from moe_interp.errors import BadData, BadInput, UnsupportedModel
from moe_interp.model import MoEModel, Reads
from moe_interp.paths import check_readable, check_writable, write_whole
from moe_interp.run import Read, Run


@checked_fields
@dataclass(frozen=True)
class Options:
    """What decides which tokens of a corpus are looked at.

    Attributes:
        special_tokens: whether the tokenizer's special tokens count.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them; the latter changes no count.
    """

    special_tokens: bool = False
    max_tokens: Count | None = None
    batch_tokens: Count = 4096


class Pass:
    """A corpus in batches, ready to be run; the same batches however often it is gone through.

    Raises:
        BadInput: the model has no tokenizer.
    """

    def __init__(self, model: MoEModel, corpus: Corpus, options: Options | None = None):
        self.model, self.corpus, self.options = model, corpus, options or Options()
        limits = {"max_tokens": self.options.max_tokens, "batch_tokens": self.options.batch_tokens}
        self.batches = batches(model, corpus, **limits)  # type: ignore[arg-type]
        self.special = [] if self.options.special_tokens else special_ids(model)

    def runs(self, read: Reads, title: str, skip: int = 0, output: bool = False) -> Iterator[tuple[Run, Batch]]:
        """Every batch but the first ``skip`` with its run, whose masks leave out what does not count.

        Runs keep no logits unless ``output`` says so.
        """
        with tqdm(total=len(self.corpus), desc=title, unit="document") as progress:
            for number, batch in enumerate(self.batches):
                if number >= skip:
                    yield counted(self.model.run(batch.inputs, read=read, output=output), self.special), batch
                progress.update(len(batch.documents))

    @property
    def provenance(self) -> dict[str, str | int | float]:
        """What a result must say about the pass."""
        return {
            **self.model.provenance(),
            **self.corpus.told,
            "max_tokens": self.options.max_tokens or "context length",
            "truncated": sum(batch.truncated for batch in self.batches),
            "special_tokens": "counted" if self.options.special_tokens else "left out",
        }


def sizes(model: MoEModel) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """What accumulators are made for: the MoE layers that text reaches, E, and each layer's K, as edits widen it.

    Raises:
        UnsupportedModel: layers with different numbers of experts, whose loads have nothing in common.
    """
    return model.layers, experts_of(model, model.layers), tuple(top_ks(model).values())


def experts_of(model: MoEModel, layers: Sequence[int]) -> int:
    """E of these MoE layers.

    Raises:
        UnsupportedModel: it differs.
    """
    counts = {layer: model.spec.moe(layer).num_experts for layer in layers}
    if len(set(counts.values())) > 1:
        raise UnsupportedModel(
            "layers with different numbers of experts",
            expected="as many in every MoE layer",
            got=", ".join(f"{experts} in layer {layer}" for layer, experts in counts.items()),
            do="model.run(...).routing has the choices of each layer.",
        )
    return max(counts.values())


def top_ks(model: MoEModel) -> dict[int, int]:
    """K of each MoE layer that text reaches, as standing edits widen it."""
    standing = {layer: k for one in model._standing for layer, k in one.widths(model.spec).items()}
    return {layer: standing.get(layer, model.spec.moe(layer).top_k) for layer in model.layers}


def over_experts(scores: Float[Tensor, "*rest C"], experts: int) -> Float[Tensor, "*rest E"]:
    """Router scores of the experts, summing to 1 over them, where a router has a class more that is no expert."""
    if scores.shape[-1] == experts:
        return scores
    own = scores[..., :experts]
    return own / own.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)


def special_ids(model: MoEModel) -> list[int]:
    """Ids of the tokenizer's special tokens, but for the one that stands for unknown words of a text."""
    return special_token_ids(model.tokenizer)


def counted(run: Run, special: Sequence[int]) -> Run:
    """The run with masks that leave out the tokens of these ids too."""
    if run.token_ids is None or not special:
        return run
    kept = run.mask & ~torch.isin(run.token_ids, torch.tensor(special, device=run.token_ids.device))
    # A layer may see fewer tokens than the model: not those that skip its experts or are of another modality.
    routing = {layer: replace(one, mask=one.mask & kept.to(one.mask.device)) for layer, one in run.routing.items()}
    return replace(run, tokens=replace(run.tokens, mask=kept), routing=routing)


@checked
def collect(
    model: MoEModel,
    corpus: Corpus,
    sums: Annotated[Mapping[str, Exact], CheckedLater()],
    options: Options | None = None,
    *,
    resume: str | Path | None = None,
    every: Count = 32,
) -> dict[str, str | int | float]:
    """Feed accumulators from one pass over a corpus.

    A pass adds to the accumulators when it has ended. After an interrupted pass they are what they were before, so
    that the same call again counts nothing twice. During a pass the accumulators are held twice.

    Args:
        model: any opened model; a corpus of texts needs its tokenizer.
        corpus: documents with domains.
        sums: accumulators by name, changed in place; `moe_interp.analyses.routing.RoutingCounts` is one.
        options: which tokens count.
        resume: a file (.npz) that their states are written to, whole or not at all, every so many batches and at
            the end; where it is there already, the pass goes on from it.
        every: batches between two such writes.

    Returns:
        The provenance of the pass, for `result`.

    Raises:
        BadInput: the model has no tokenizer, accumulators that are made for another model or corpus, or ``resume``
            under standing edits.
        BadOutput: ``resume`` cannot be written, found out before the pass.
        BadData: ``resume`` holds the states of another pass, or of one that began with other counts.
    """
    _check_sums(sums, model, len(corpus))
    if resume is not None:
        check_writable(resume)
    going = Pass(model, corpus, options)
    path = None if resume is None else Path(resume)
    if path is not None and model._standing:
        raise BadInput(
            "a pass under edits cannot be taken up",
            expected="a model without standing edits, or resume=None",
            got=f"{len(model._standing)} active edits, which a saved state does not record",
        )
    mark = "" if path is None else _mark(going, sums)
    fed = {name: copy.deepcopy(one) for name, one in sums.items()}
    done = 0 if path is None or not path.exists() else _take_up(path, fed, mark)
    read = [Read(point) for point in sorted({point for one in fed.values() for point in one.reads})]
    for number, (run, batch) in enumerate(going.runs(read, "routing", skip=done), start=done + 1):
        for one in fed.values():
            one.update(run, batch.documents)
        if path is not None and (number % every == 0 or number == len(going.batches)):
            _store(path, fed, mark, number)
    for name, one in sums.items():
        vars(one).update(vars(fed[name]))
    return going.provenance


def _check_sums(sums: Any, model: MoEModel, documents: int) -> None:
    if not isinstance(sums, Mapping) or not sums or not all(isinstance(one, Exact) for one in sums.values()):
        raise BadInput(
            "not accumulators",
            expected='a mapping such as {"pairs": PairCounts.empty(*sizes(model))}',
            got=repr(sums)[:80],
        )
    for name, one in sums.items():
        _check_fits(name, one, model, documents)


def _check_fits(name: str, one: Exact, model: MoEModel, documents: int) -> None:
    """Refuse an accumulator that is made for other layers, another K or E, or another number of documents."""
    layers = tuple(getattr(one, "layers", ()))
    if unknown := [layer for layer in layers if layer not in model.layers]:
        raise _misfit(name, f"MoE layers of {model.name}, {list(model.layers)}", f"layers {unknown}")
    top_k, mine = top_ks(model), tuple(getattr(one, "top_k", ()))
    if mine and mine != (wanted := tuple(top_k[layer] for layer in layers)):
        raise _misfit(name, f"K {told_top_k(wanted)}", f"K {told_top_k(mine)}")
    experts = {model.spec.moe(layer).num_experts for layer in layers}
    right = {"N": {documents}, "E": experts, "experts": experts, "vocabulary": {model.spec.vocab_size}}
    for what, size in _sizes_of(one):
        if what in right and layers and {size} != right[what]:
            meaning = {"N": "documents", "E": "experts"}.get(what, what)
            raise _misfit(name, f"{meaning} {', '.join(map(str, sorted(right[what])))}", f"{size}")


def _sizes_of(one: Exact) -> Iterator[tuple[str, int]]:
    """Names of the axes of an accumulator's arrays, as its annotations have them, and of its own numbers; and sizes."""
    for field in fields(one):  # type: ignore[arg-type]
        value = getattr(one, field.name)
        if isinstance(value, np.ndarray):
            yield from zip(getattr(field.type, "dim_str", "").split(), value.shape, strict=False)
        elif isinstance(value, int):
            yield field.name, value


def _misfit(name: str, expected: str, got: str) -> BadInput:
    return BadInput(
        f"the accumulator {name!r} is made for another model or corpus",
        expected=expected,
        got=got,
        do="moe_interp.analyses.collect.sizes(model) gives the sizes to make it of.",
    )


def _mark(going: Pass, sums: Mapping[str, Exact]) -> str:
    """What tells one pass from another: the model's name and routers, the texts and their ids, the options, the
    accumulators and what they hold before the pass."""
    model = going.model
    kinds = {name: [type(one).__name__, repr(one.identity())] for name, one in sums.items()}
    told = [model.name, str(model.dtype), going.corpus.contents, repr(going.options), kinds]
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode("utf-8"))
    for one in sums.values():
        for value in one.state().values():
            found.update(np.ascontiguousarray(value).tobytes())
    for batch in going.batches:
        found.update(batch.inputs["input_ids"].numpy().tobytes())
    for layer in model.layers:  # models of one name, or steps of one training, differ here
        for weights in model.hf.get_submodule(model.spec.moe(layer).router).parameters():
            if not weights.is_meta:
                found.update(weights.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _store(path: Path, sums: Mapping[str, Exact], mark: str, done: int) -> None:
    arrays = {f"{name}/{key}": value for name, one in sums.items() for key, value in one.state().items()}
    file = io.BytesIO()
    np.savez(file, **arrays, done=np.array(done), mark=np.array(mark))  # type: ignore[arg-type]
    write_whole(path, file.getbuffer())


def _take_up(path: Path, sums: Mapping[str, Exact], mark: str) -> int:
    """Put what a file holds in place of the accumulators' values, and say how many batches it is of."""
    check_readable(path, "states that collect wrote")
    try:
        with ZipFile(path) as archive:  # written uncompressed: what unpacks to more is not ours
            if sum(one.file_size for one in archive.infolist()) > os.path.getsize(path):
                raise ValueError("arrays that are larger than the file")
        with np.load(path, allow_pickle=False) as stored:
            same = str(stored["mark"]) == mark
            arrays = {name: stored[name] for name in stored.files} if same else {}
    except (OSError, ValueError, LookupError, EOFError, MemoryError, BadZipFile, zlib.error) as error:
        raise BadData(f"cannot read {path}", expected="states that collect wrote", got=str(error)) from error
    if not same:
        raise BadData(
            f"{path} is of another pass",
            expected="the same model, dtype, tokenizer, texts, options and accumulators, with the same counts at first",
            got="different ones",
            do="Name another file, or delete this one.",
        )
    for name, one in sums.items():
        state = {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}
        taken_up = type(one).from_state(state)
        for field in fields(one):  # type: ignore[arg-type]
            setattr(one, field.name, getattr(taken_up, field.name))
    return int(arrays["done"])
