"""The tuned lens: the logit lens after an affine map for every place of the residual stream.

Streams of early layers are not written in the basis that the final norm and the unembedding read. The tuned lens
(Belrose et al. 2023, arXiv 2303.08112, section 3) gives the stream h into layer l a translator,

    T_l(h) = h + A_l h + b_l,      lens(h) = decode(T_l(h)),

whose A and b minimise KL(final || lens(h)) over a corpus (equation 8 there; `moe_interp.analyses.tuned_training` does).
At zero it is the plain lens. The stream out of the last layer needs none: what decodes it is the model itself.

1. `TunedLens` holds the translators, is written to a file and read back, and refuses a model that it was not made for.
2. `tuned_lens_quality` measures it on texts, beside the plain lens.
3. `tuned_lens` gives the one that is bundled with the reference model.

`TunedLens.into` is the translator of ``resid_pre`` of a layer, `TunedLens.out_of` that of its ``resid_post`` and of
everything on the way there; ``out_of(l)`` is ``into`` the layer after l.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from moe_interp.analyses.collect import Options, Pass
from moe_interp.analyses.distributions import expected_log, log_probabilities
from moe_interp.analyses.plain import check_decodes_stream
from moe_interp.arguments import Count, Draws, Seed, checked, described
from moe_interp.checkpoint import REFERENCE
from moe_interp.data import Batch, Corpus
from moe_interp.errors import BadData, BadInput, UnknownName
from moe_interp.measured import values_told
from moe_interp.model import MoEModel
from moe_interp.paths import check_readable, write_whole
from moe_interp.results import Variable, labelled
from moe_interp.run import Read, Run
from moe_interp.stats import bootstrap_ratio

FORMAT = "moe_interp tuned lens 1"
BUNDLED = {"reference": REFERENCE / "tuned_lens.safetensors"}
# Logits decoded at a time: 8 MB in float32. Larger chunks leave a CPU's caches and take up to twice as long.
CHUNK = 2**21


class Translator(NamedTuple):
    """One affine map of the residual stream, h + A h + b.

    Attributes:
        weight: A, [D, D].
        bias: b, [D], in the units of the stream.
    """

    weight: Float[Tensor, "D D"]
    bias: Float[Tensor, " D"]

    def __call__(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """h + A h + b, computed in 32 bits or more, in the dtype of ``hidden``."""
        return self._moved(hidden, self.bias)

    def linear(self, added: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """x + A x: what adding x to the stream adds to the translated stream."""
        return self._moved(added, torch.zeros_like(self.bias))

    def _moved(self, hidden: Tensor, bias: Tensor) -> Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, self.weight.dtype))
        weight, bias = self.weight.to(exact), bias.to(exact)
        return (exact + exact @ weight.T + bias).to(hidden.dtype)


@described("a tuned lens", lambda given: "Get one: moe.tuned_lens(name) or moe.train_tuned_lens(model, corpus).")
@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators for the residual stream of one model.

    Attributes:
        weight: [L, D, D], the A of the stream into each of ``layers``, in float32.
        bias: [L, D], the b.
        signature: what the model's ``decode`` makes of fixed vectors (`signature`): tells its model from others
            whatever their name and dtype.
        layers: layers of the main stack, dense ones included, as the checkpoint numbers them.
        model, model_type: name and architecture of the model.
        provenance: how it was trained, on what, with which versions.

    Raises:
        BadInput: sizes that do not fit each other, or values that are not finite.
    """

    weight: Float[Tensor, "L D D"]
    bias: Float[Tensor, "L D"]
    signature: Float[Tensor, "P C"]
    layers: tuple[int, ...]
    model: str
    model_type: str
    provenance: Mapping[str, str | int | float]

    def __repr__(self) -> str:
        return (
            f"TunedLens(of {self.model!r}, {self.model_type}, layers {list(self.layers)}, width {self.bias.shape[1]})"
        )

    def __post_init__(self) -> None:
        count, width = self.bias.shape
        if self.weight.shape != (count, width, width) or len(self.layers) != count:
            raise BadInput(
                "translators do not fit each other",
                expected=f"A [L, D, D], b [L, D] and L layers, with L = {count} and D = {width}",
                got=f"A {tuple(self.weight.shape)}, b {tuple(self.bias.shape)}, {len(self.layers)} layers",
            )
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise BadInput("translators cannot be used", expected="finite values", got="some that are not")

    @classmethod
    @checked
    def zeros(cls, model: MoEModel) -> "TunedLens":
        """The plain lens of a model: translators that change nothing.

        Raises:
            UnsupportedModel: a residual stream that cannot be decoded.
        """
        check_decodes_stream(model)
        layers, width = main_layers(model), model.spec.d_model
        return cls(
            weight=torch.zeros(len(layers), width, width),
            bias=torch.zeros(len(layers), width),
            signature=signature(model),
            layers=layers,
            model=model.name,
            model_type=model.spec.model_type,
            provenance=model.provenance(),
        )

    @checked
    def into(self, layer: int) -> Translator:
        """The translator of the stream into a layer, its ``resid_pre``.

        Raises:
            UnknownName: the lens has no such layer.
        """
        number = self._number(layer)
        return Translator(self.weight[number], self.bias[number])

    @checked
    def out_of(self, layer: int) -> Translator:
        """The translator of the stream out of a layer, its ``resid_post``; of the last layer one that changes nothing.

        Raises:
            UnknownName: the lens has no such layer.
        """
        number = self._number(layer) + 1
        if number < len(self.layers):
            return self.into(self.layers[number])
        return Translator(torch.zeros_like(self.weight[0]), torch.zeros_like(self.bias[0]))

    def _number(self, layer: int) -> int:
        if layer not in self.layers:
            raise UnknownName(
                f"the tuned lens has no layer {layer}", expected=f"one of {list(self.layers)}", got=str(layer)
            )
        return self.layers.index(layer)

    @checked
    def check(self, model: MoEModel) -> None:
        """Refuse a model that the lens was not made for.

        Raises:
            UnsupportedModel: a residual stream that cannot be decoded.
            BadInput: another architecture, width or number of layers, or another final norm and unembedding.
        """
        check_decodes_stream(model)
        theirs = (model.spec.model_type, model.spec.d_model, main_layers(model))
        if (self.model_type, self.bias.shape[1], self.layers) != theirs:
            expected, got = _told(self.model_type, self.bias.shape[1], self.layers), _told(*theirs)
        elif not close(self.signature, signature(model)):
            expected, got = f"the final norm and unembedding of {self.model}", "other ones"
        else:
            return
        raise BadInput(
            f"the tuned lens of {self.model} does not fit {model.name}",
            expected=expected,
            got=got,
            do="Open the model that it was trained on, or train one with moe.train_tuned_lens.",
        )

    @checked
    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the lens to one safetensors file, whole or not at all.

        Args:
            path: where.
            dtype: of the translators in the file; 16 bits halve it.

        Raises:
            BadInput: a value is too large for the dtype.
            BadOutput: the folder does not exist or cannot be written.
        """
        stored = {"weight": self.weight.to(dtype).contiguous(), "bias": self.bias.to(dtype).contiguous()}
        if not all(value.isfinite().all() for value in stored.values()):
            raise BadInput("the tuned lens cannot be stored", expected=f"values that fit {dtype}", got="larger ones")
        told = {
            "format": FORMAT,
            "model": self.model,
            "model_type": self.model_type,
            "layers": json.dumps(list(self.layers)),
            "provenance": json.dumps(dict(self.provenance), ensure_ascii=False, sort_keys=True),
        }
        return write_whole(path, serialised({**stored, "signature": self.signature.contiguous()}, told))

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "TunedLens":
        """Read a lens that `save` wrote.

        Raises:
            BadData: nothing there, or no tuned lens.
        """
        check_readable(path, "a file that TunedLens.save wrote")
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                values = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            if told.get("format") != FORMAT:
                raise ValueError(f"format {told.get('format')!r}")
            return cls(
                **values,
                layers=tuple(json.loads(told["layers"])),
                model=told["model"],
                model_type=told["model_type"],
                provenance=json.loads(told["provenance"]),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError, BadInput) as error:
            raise BadData(f"cannot read {path}", expected="a file that TunedLens.save wrote", got=str(error)) from error


def _told(model_type: str, width: int, layers: tuple[int, ...]) -> str:
    return f"{model_type}, {width} wide, layers {layers[0]} to {layers[-1]}"


@checked
def tuned_lens(name: str) -> TunedLens:
    """A bundled lens by name: "reference", of the bundled reference model.

    Raises:
        UnknownName: none has this name.
    """
    if name not in BUNDLED:
        raise UnknownName(
            f"no bundled tuned lens {name!r}",
            expected=f"one of {', '.join(BUNDLED)}",
            got=repr(name),
            do="A file is read with moe.TunedLens.load(path).",
        )
    return TunedLens.load(BUNDLED[name])


def main_layers(model: MoEModel) -> tuple[int, ...]:
    """Indices of the layers whose last residual gives the output."""
    return tuple(layer.index for layer in model.spec.main_layers)


@torch.no_grad()
def signature(model: MoEModel) -> Float[Tensor, "P C"]:
    """Logits of some 64 tokens that the model's ``decode`` gives for four fixed vectors, in float32.

    Those of minus infinity, of tokens that cannot come, are 0.
    """
    waves = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, model.spec.d_model + 1)).sin()
    logits = model.decode(waves[None].to(model.device, model.dtype))[0]
    some = logits[:, :: max(1, logits.shape[1] // 64)].float().cpu()
    return some.masked_fill(some.isneginf(), 0.0).contiguous()


def close(mine: Float[Tensor, "P C"], theirs: Float[Tensor, "Q E"]) -> bool:
    """Whether two signatures are of one model, up to the rounding of 16-bit weights."""
    return mine.shape == theirs.shape and bool((mine - theirs).abs().max() <= 0.05 * mine.abs().max())


# ---- what both training and measuring look at ---------------------------------------------------------------


class Rows(NamedTuple):
    """Some of the tokens that count in a run.

    Attributes:
        hidden: the stream into each of the L layers, [n, D] each.
        final: probabilities of the model's own output, [n, V], in float32.
        negentropy: sum of final times log final, [n], in nats.
        texts: [n], the row of the batch that each is of.
    """

    hidden: tuple[Float[Tensor, "n D"], ...]
    final: Float[Tensor, "n V"]
    negentropy: Float[Tensor, " n"]
    texts: Int[Tensor, " n"]


def stream_reads(layers: tuple[int, ...]) -> list[Read]:
    """What to read of a run for `chunks`."""
    return [Read("resid_pre", layers)]


def chunks(run: Run, layers: tuple[int, ...]) -> Iterator[Rows]:
    """The tokens that count, so many at a time that logits of one layer are at most `CHUNK` values."""
    texts, positions = run.mask.nonzero().T
    size = max(1, CHUNK // run.logits.shape[-1])
    for text, position in zip(texts.split(size), positions.split(size), strict=True):
        values = [run["resid_pre", layer] for layer in layers]
        hidden = tuple(value[text.to(value.device), position.to(value.device)] for value in values)
        logits = run.logits[text.to(run.logits.device), position.to(run.logits.device)]
        log_p = log_probabilities(logits)
        final = log_p.exp()
        yield Rows(hidden, final, expected_log(final, log_p), text.cpu())


def kl_to(rows: Rows, logits: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """KL(final || softmax(logits)) in nats, of each row."""
    own = log_probabilities(logits).to(rows.final.device)
    # Rounding can leave a distribution that equals the final one just below zero.
    return (rows.negentropy - expected_log(rows.final, own)).clamp(min=0.0)


class Sums(NamedTuple):
    """Sums over the tokens of each of N documents, for M lenses.

    Attributes:
        kl: KL(final || lens) in nats, [N, M, L].
        agree: how often the lens's first token is the model's, [N, M, L].
        tokens: [N].
    """

    kl: Float[np.ndarray, "N M L"]
    agree: Float[np.ndarray, "N M L"]
    tokens: Int[np.ndarray, " N"]


@torch.no_grad()
def measure(
    model: MoEModel,
    lenses: Sequence[Sequence[Translator]],
    layers: tuple[int, ...],
    runs: Iterable[tuple[Run, Batch]],
    documents: int,
) -> Sums:
    """How far lenses, a translator a layer each, are from the model's own output on all runs."""
    shape = (documents, len(lenses), len(layers))
    kl, agree, tokens = np.zeros(shape), np.zeros(shape), np.zeros(documents, np.int64)
    for run, batch in runs:
        for rows in chunks(run, layers):
            where = batch.documents[rows.texts.numpy()]
            np.add.at(tokens, where, 1)
            best = rows.final.argmax(-1)
            for number, lens in enumerate(lenses):
                for place, (translator, hidden) in enumerate(zip(lens, rows.hidden, strict=True)):
                    logits = model.decode(translator(hidden))
                    hits = logits.argmax(-1).to(best.device) == best
                    np.add.at(kl[:, number, place], where, kl_to(rows, logits).double().cpu().numpy())
                    np.add.at(agree[:, number, place], where, hits.cpu().numpy())
    return Sums(kl, agree, tokens)


# ---- quality -------------------------------------------------------------------------------------------------


@checked
def tuned_lens_quality(
    model: MoEModel,
    lens: TunedLens,
    corpus: Corpus,
    *,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """How near the tuned lens comes to the model's own prediction, beside the plain lens on the same tokens.

    Args:
        model: the model of the lens, with a tokenizer.
        lens: a trained lens.
        corpus: documents that its training has not seen, or the figures flatter it. Special tokens do not count.
        resamples, seed: of documents within domains, for the intervals.
        max_tokens, batch_tokens: as in `moe_interp.data.batches`.

    Returns:
        Dims lens ("plain", "tuned"), layer, bound. At ``layer`` stands the stream into it, its ``resid_pre``, so that
        0 is the embedding; the stream out of the last layer is the model's own output in both lenses, and left out.
        ``kl``: KL(final || lens) in nats, mean over tokens. ``agreement``: share of tokens whose most probable token
        is the model's, 0 ... 1. ``kl_gain`` (plain less tuned) and ``agreement_gain`` (tuned less plain), above 0
        where tuning helps. Each with ``_interval``: 95 %, bootstrap over documents; the gains' are of pairs.
        ``tokens``, ``documents`` that were measured.

    Raises:
        UnsupportedModel: a residual stream that cannot be decoded.
        BadInput: a lens of another model, no tokenizer, or no token that counts.
    """
    lens.check(model)
    plain = Translator(torch.zeros_like(lens.weight[0]), torch.zeros_like(lens.bias[0]))
    lenses = [[plain] * len(lens.layers), [lens.into(layer) for layer in lens.layers]]
    going = Pass(model, corpus, Options(max_tokens=max_tokens, batch_tokens=batch_tokens))
    runs = going.runs(stream_reads(lens.layers), "tuned lens", output=True)
    sums = measure(model, lenses, lens.layers, runs, len(corpus))
    seen = sums.tokens > 0
    if not seen.any():
        raise BadInput("nothing to measure", expected="a document with a token that is not special", got="none")
    kept = Sums(*(value[seen] for value in sums))
    provenance = {f"lens_{name}": value for name, value in lens.provenance.items()}
    provenance |= {**going.provenance, "resamples": resamples, "seed": seed}
    provenance["lens_weights"] = values_told(lens.weight, lens.bias)
    coords: dict[str, ArrayLike] = {
        "bound": ["low", "high"],
        "lens": ["plain", "tuned"],
        "layer": list(lens.layers),
    }
    variables = _quality(kept, corpus.labels[seen], resamples, seed)
    return labelled(variables, coords, analysis="tuned_lens_quality", provenance=provenance)


def _quality(sums: Sums, strata: Int[np.ndarray, " N"], resamples: int, seed: int) -> dict[str, Variable]:
    better = "above 0 where tuning helps"
    table = {
        "kl": (sums.kl, "nats", "KL(final || lens), mean over tokens; 0 where the lens says what the model says"),
        "kl_gain": (sums.kl[:, 0] - sums.kl[:, 1], "nats", f"KL of the plain lens less that of the tuned, {better}"),
        "agreement": (sums.agree, "1", "share of tokens whose first token is the model's own, 0 ... 1"),
        "agreement_gain": (sums.agree[:, 1] - sums.agree[:, 0], "1", f"agreement tuned less plain, {better}"),
    }
    variables = {}
    for name, (values, units, meaning) in table.items():
        dims = ("lens", "layer") if values.ndim == 3 else ("layer",)
        ends = bootstrap_ratio(values, sums.tokens, strata=strata, resamples=resamples, seed=seed)
        variables[name] = Variable(dims, values.sum(0) / sums.tokens.sum(), units, meaning)
        told = f"{meaning}; 95 % bootstrap interval over documents"
        variables[f"{name}_interval"] = Variable(("bound", *dims), ends, units, told)
    variables["tokens"] = Variable((), np.asarray(sums.tokens.sum()), "tokens", "tokens that were measured")
    variables["documents"] = Variable((), np.asarray(len(sums.tokens)), "documents", "documents that they are of")
    return variables
