"""What fewer experts cost: perplexity with only the k heaviest experts of every token, per domain.

1. Every batch runs once as it is, and once for each k with the k heaviest slots kept in every MoE layer (or
   in one at a time), shared experts untouched. Controls on the same tokens: k of the K slots drawn at random,
   and no routed expert at all.
2. The negative log-likelihood of each token given those before it in its document is summed per document.
3. Two aggregates: "token", exp(mean over tokens), and "document", exp(mean over documents of the document's
   mean), which is what MoE-Lens published. Intervals resample documents; those of ratios resample pairs.

MoE-Lens narrows the router (``gate.top_k = k``). On its model, which does not renormalise weights, that is
the same as dropping the lightest slots; on one that does, it is what ``renormalise=True`` does here.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int, Num
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from moe_interp.analyses.collect import top_ks
from moe_interp.analyses.distributions import check_logits
from moe_interp.analyses.exact import told_top_k
from moe_interp.analyses.plain import check_writes_text
from moe_interp.arguments import Count, Draws, Seed, checked, is_whole
from moe_interp.data import Batch, Corpus, batches
from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention, apply, top_k
from moe_interp.interventions.together import check_together
from moe_interp.interventions.widths import keep_slots
from moe_interp.model import MoEModel
from moe_interp.results import Variable, labelled
from moe_interp.stats import bootstrap_by_group, bootstrap_ratio, group_totals, ratio

_CHUNK = 2**22  # logits scored at once: 16 MB in float32, which a cache holds


@checked
def perplexity(
    model: MoEModel,
    corpus: Corpus,
    *,
    ks: int | Iterable[int] | None = None,
    renormalise: bool | Literal["both"] = False,
    per_layer: bool = False,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Perplexity of a corpus with fewer experts (or more), beside its controls.

    Args:
        model: any opened model with a tokenizer, which adds a beginning-of-text token if the model wants one.
        corpus: documents with domains. A document's first token has no context and is not scored.
        ks: one or several numbers of experts, 1 ... E (None: 1 ... K, the largest if layers differ). Above a
            layer's own K the router chooses k by its own recipe.
        renormalise: False, as published: the dropped weight is lost. True: kept weights are rescaled to the
            total that K experts would have. "both": a dim ``renormalise`` ("no", "yes").
        per_layer: one MoE layer at a time, a dim ``layer``; else all at once.
        resamples: of documents, for the intervals.
        seed: of the random slots (which depend on it and the document alone) and of the resamples.
        max_tokens, batch_tokens: as in `moe_interp.data.batches`.

    Returns:
        Dims aggregate ("token", "document"), domain, layer and renormalise if asked for, k, bound.
        ``perplexity``, and ``ratio``, its ratio to that of the model as it is: for the heaviest k; with
        ``_random`` for k of the K slots at random (NaN above K); with ``_none`` without any routed expert.
        ``perplexity_full`` is that of the model as it is, k = K. Each with ``_overall``, over all documents,
        and ``_interval``: 95 %, by bootstrap over documents, NaN where a domain has fewer than two.
        ``normalised``: log perplexity from 0 (best) to 1 (worst) of the ``ks``, as in figure 3 of MoE-Lens;
        NaN where they do not differ; and ``bits_per_byte``, both with ``_overall``. ``tokens``,
        ``documents``, ``bytes`` that were scored.

    Raises:
        BadInput: no tokenizer, ``ks`` out of range, an unknown ``renormalise``, no token with a context, or layers
            that choose different numbers of experts, all at once.
    """
    check_writes_text(model)
    grid = _grid(model, ks, renormalise, per_layer)
    work = batches(model, corpus, max_tokens=max_tokens, batch_tokens=batch_tokens)
    nll, counted = _measure(model, corpus, grid, work, seed)
    provenance = {
        **model.provenance(),
        **corpus.told,
        "max_tokens": max_tokens or "context length",
        "truncated": sum(batch.truncated for batch in work),
        "top_k": told_top_k(tuple(grid.top_k.values())),
        "renormalise": str(renormalise),
        "resamples": resamples,
        "seed": seed,
    }
    estimate = partial(_log_perplexity, counted=counted, resamples=resamples, seed=seed)
    return _dataset(grid, nll, counted, estimate, provenance)


def _measure(
    model: MoEModel, corpus: Corpus, grid: "_Grid", work: list[Batch], seed: int
) -> tuple[dict["Arm", Float[np.ndarray, " N"]], "_Counted"]:
    """Nats of every document under every run, for the documents that have something to score."""
    nll = {arm: np.zeros(len(corpus)) for arm in grid.runs()}
    tokens, size = np.zeros(len(corpus), np.int64), np.zeros(len(corpus), np.int64)
    with tqdm(total=len(work) * len(nll), desc="perplexity", unit="pass") as progress:
        for batch in work:
            ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
            tokens[batch.documents] = mask.sum(dim=1).numpy() - 1
            size[batch.documents] = _scored_bytes(model, ids, mask)
            order = _random_order(model, batch, seed)
            for arm, sums in nll.items():
                sums[batch.documents] = nll_sums(
                    model.run(batch.inputs, edit=_edits(model, arm, order)).logits, ids, mask
                )
                progress.update()
    scored = tokens > 0
    if not scored.any():
        raise BadInput("nothing to score", expected="a document of two or more tokens", got="none")
    counted = _Counted(tokens[scored], size[scored], corpus.labels[scored], corpus.domains)
    return {arm: sums[scored] for arm, sums in nll.items()}, counted


# ---- one forward pass --------------------------------------------------------------------------------------

Kept = Literal["heaviest", "random", "all"]


class Arm(NamedTuple):
    """One way to run the model: which slots are kept, how many, and at which layer (None: at all)."""

    kept: Kept
    k: int = 0
    renormalise: bool = False
    layer: int | None = None


FULL = Arm("all")


def _edits(model: MoEModel, arm: Arm, order: Mapping[int, Int[Tensor, "B S K"]]) -> list[Intervention]:
    layers = model.layers if arm.layer is None else (arm.layer,)
    if arm.kept == "all":
        return []
    if arm.kept == "heaviest":
        return [top_k(arm.k, renormalise=arm.renormalise, layers=layers)]
    drop = partial(keep_slots, k=arm.k, renormalise=arm.renormalise)
    return [apply("gate_weights", partial(drop, order=order[layer]), layers=layer) for layer in layers]


def _random_order(model: MoEModel, batch: Batch, seed: int) -> dict[int, Int[Tensor, "B S K"]]:
    """A random order of every real token's slots at every layer, the same however documents are batched."""
    mask = batch.inputs["attention_mask"].bool()
    own = top_ks(model)
    order = {layer: torch.zeros(*mask.shape, k, dtype=torch.int64) for layer, k in own.items()}
    for row, document in enumerate(batch.documents):
        shape = (int(mask[row].sum()), len(own), max(own.values()))
        drawn = np.random.default_rng([seed, int(document)]).random(shape)
        for index, (layer, k) in enumerate(own.items()):
            order[layer][row, mask[row]] = torch.from_numpy(drawn[:, index, :k].argsort(axis=-1))
    return order


def nll_sums(
    logits: Float[Tensor, "B S V"], ids: Int[Tensor, "B S"], mask: Int[Tensor, "B S"]
) -> Float[np.ndarray, " B"]:
    """Nats of each text's real tokens given those before, summed; the first has none before it.

    ``mask`` is 1 at real tokens; padding may be on either side.
    """
    real = mask.bool()
    texts, positions = (real[:, 1:] & real[:, :-1]).nonzero().T
    sums = torch.zeros(len(ids), dtype=torch.float64)
    rows = max(1, _CHUNK // logits.shape[-1])
    for text, position in zip(texts.split(rows), positions.split(rows), strict=True):
        targets = ids[text, position + 1].to(logits.device)
        check_logits(logits[text, position])
        nll = functional.cross_entropy(logits[text, position].float(), targets, reduction="none")
        sums.index_add_(0, text, nll.cpu().double())
    return sums.numpy()


def _scored_bytes(model: MoEModel, ids: Int[Tensor, "B S"], mask: Int[Tensor, "B S"]) -> list[int]:
    """UTF-8 bytes that the scored tokens of each document stand for; 0, without a tokenizer that would know."""
    if model.tokenizer is None:
        return [0] * len(ids)
    rows = (row[real][1:].tolist() for row, real in zip(ids, mask.bool(), strict=True))
    texts = (model.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    return [len(text.encode("utf-8", "replace")) for text in texts]


# ---- which runs there are ----------------------------------------------------------------------------------

_KINDS = {
    "": "with the k heaviest experts of every token (above K, of the k that the router chooses)",
    "_random": "control: with k random ones of the K experts of every token",
    "_none": "control: without any routed expert",
    "_full": "of the model as it is, k = K",
}


class _Grid(NamedTuple):
    """What is varied; ``top_k`` is the model's own K by layer, a layer of None means all at once."""

    top_k: Mapping[int | None, int]
    ks: tuple[int, ...]
    renormalise: tuple[bool, ...]

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The layers of `top_k`."""
        return tuple(self.top_k)

    def coords(self, kind: str = "") -> dict[str, ArrayLike]:
        """Values along the dims over which a kind of figure varies."""
        found: dict[str, ArrayLike] = {}
        if kind != "_full" and None not in self.layers:
            found["layer"] = np.array(self.layers, dtype=np.int64)
        if kind in ("", "_random"):
            found |= {"renormalise": ["no", "yes"]} if len(self.renormalise) > 1 else {}
            found["k"] = np.array(self.ks)
        return found

    def arms(self, kind: str) -> list[Arm | None]:
        """The runs that give a kind's figures, by layer, renormalise, k; None where there is none."""
        if kind == "_full":
            return [FULL]
        if kind == "_none":
            return [Arm("random", 0, False, layer) for layer in self.layers]
        kept: Kept = "heaviest" if kind == "" else "random"
        return [
            self._arm(Arm(kept, k, renormalise, layer))
            for layer in self.layers
            for renormalise in self.renormalise
            for k in self.ks
        ]

    def _arm(self, arm: Arm) -> Arm | None:
        own = self.top_k[arm.layer]
        if arm.k == own:
            return FULL  # nothing is dropped: the same numbers to the last bit
        return None if arm.kept == "random" and arm.k > own else arm

    def runs(self) -> list[Arm]:
        """All runs, each once."""
        return [arm for arm in dict.fromkeys(arm for kind in _KINDS for arm in self.arms(kind)) if arm]


def _grid(model: MoEModel, ks: int | Iterable[int] | None, renormalise: bool | str, per_layer: bool) -> _Grid:
    own, experts = _own(model, per_layer), min(model.spec.moe(layer).num_experts for layer in model.layers)
    # Of a model that a standing edit widens, those of the model alone and the wider one: others would contradict it.
    every = sorted({*range(1, model.spec.top_k + 1), *own.values()})
    chosen: list[Any] = list(every) if ks is None else list(ks) if isinstance(ks, Iterable) else [ks]
    whole = all(map(is_whole, chosen))
    if not chosen or not whole or not 1 <= min(chosen) <= max(chosen) <= experts:
        raise BadInput("ks cannot be right", expected=f"whole numbers from 1 to {experts}", got=str(chosen))
    settings = (False, True) if renormalise == "both" else (bool(renormalise),)
    distinct = tuple(sorted({int(k) for k in chosen}))
    for k in distinct:
        check_together([*model._standing, top_k(k, layers=model.layers)], model.spec)
    return _Grid(own, distinct, settings)


def _own(model: MoEModel, per_layer: bool) -> dict[int | None, int]:
    own: dict[int | None, int] = dict(top_ks(model).items())
    distinct = set(own.values())
    if not per_layer and len(distinct) > 1:
        raise BadInput(
            "k experts are not the same share in every layer",
            expected="layers that choose as many experts each",
            got=f"K = {told_top_k(tuple(own.values()))}",
            do="Vary one layer at a time: per_layer=True.",
        )
    return own if per_layer else {None: distinct.pop()}


# ---- from sums per document to figures with intervals ------------------------------------------------------


class _Counted(NamedTuple):
    """The documents that have something to score, and how much of it."""

    tokens: Int[np.ndarray, " N"]
    bytes: Int[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]
    domains: tuple[str, ...]

    def by_domain(self, values: Num[np.ndarray, "N *varied"]) -> Num[np.ndarray, "G *varied"]:
        """Sums over the documents of each domain."""
        return group_totals(values, self.labels, len(self.domains))


class _Estimate(NamedTuple):
    """One part of a figure: its name, what is said of it, its leading dims and its values."""

    part: str
    meaning: str
    dims: tuple[str, ...]
    values: Float[np.ndarray, "..."]


Estimate = Callable[[np.ndarray], list[_Estimate]]


def _log_perplexity(
    nll: Float[np.ndarray, "N *varied"], counted: _Counted, resamples: int, seed: int
) -> list[_Estimate]:
    """Nats per token by both aggregates, by domain and over all, with intervals."""
    by_token = nll, counted.tokens
    by_document = ratio(nll, counted.tokens), np.ones(len(nll))
    parts = [_by_domain_and_overall(top, bottom, counted, resamples, seed) for top, bottom in (by_token, by_document)]
    interval = ", 95 % bootstrap interval over documents"
    told = {
        "": ("", ("aggregate", "domain")),
        "_overall": (", over all domains", ("aggregate",)),
        "_interval": (interval, ("bound", "aggregate", "domain")),
        "_overall_interval": (f", over all domains{interval}", ("bound", "aggregate")),
    }
    return [
        _Estimate(part, meaning, dims, np.stack([one[part] for one in parts], axis=dims.index("aggregate")))
        for part, (meaning, dims) in told.items()
    ]


def _by_domain_and_overall(
    top: Float[np.ndarray, "N *varied"],
    bottom: Num[np.ndarray, " N"],
    counted: _Counted,
    resamples: int,
    seed: int,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Ratios of sums over documents, with intervals."""
    pooled = bootstrap_ratio(top, bottom, strata=counted.labels, resamples=resamples, seed=seed)
    return {
        "": ratio(counted.by_domain(top), counted.by_domain(bottom)),
        "_overall": top.sum(axis=0) / bottom.sum(),
        "_interval": bootstrap_by_group(top, bottom, counted.labels, len(counted.domains), resamples, seed),
        "_overall_interval": pooled,
    }


def _dataset(
    grid: _Grid,
    sums: Mapping[Arm, Float[np.ndarray, " N"]],
    counted: _Counted,
    estimate: Estimate,
    provenance: Mapping[str, str | int | float],
) -> xr.Dataset:
    missing = np.full_like(sums[FULL], np.nan)
    variables = _amounts(counted)
    for kind in _KINDS:
        dims = grid.coords(kind)
        per_arm = [missing if arm is None else sums[arm] for arm in grid.arms(kind)]
        nll = np.stack(per_arm, axis=-1).reshape(len(missing), *[np.size(values) for values in dims.values()])
        whole = sums[FULL].reshape(-1, *[1] * len(dims))
        variables |= _figures(kind, tuple(dims), nll, whole, estimate)
        if kind == "":
            variables |= _normalised(tuple(dims), estimate(nll)) | _bits_per_byte(tuple(dims), nll, counted)
    coords = {"aggregate": ["token", "document"], "domain": list(counted.domains), "bound": ["low", "high"]}
    return labelled(variables, {**coords, **grid.coords()}, analysis="perplexity", provenance=provenance)


def _figures(
    kind: str,
    dims: tuple[str, ...],
    nll: Float[np.ndarray, "N *varied"],
    whole: Float[np.ndarray, "N *ones"],
    estimate: Estimate,
) -> dict[str, Variable]:
    """Perplexity and its ratio to the whole model's."""
    found = {}
    told = f"perplexity {_KINDS[kind]}"
    for one in estimate(nll):
        name = f"perplexity{kind}{one.part}"
        found[name] = Variable((*one.dims, *dims), np.exp(one.values), "1", f"{told}{one.meaning}, 1 ...")
    if kind == "_full":
        return found
    for one in estimate(nll - whole):
        name = f"ratio{kind}{one.part}"
        said = f"{told}, over that of the model as it is{one.meaning}; 1 if nothing is lost"
        found[name] = Variable((*one.dims, *dims), np.exp(one.values), "1", said)
    return found


def _normalised(dims: tuple[str, ...], estimates: list[_Estimate]) -> dict[str, Variable]:
    """Log perplexity between its smallest and largest over k."""
    found = {}
    for one in estimates[:2]:
        low, high = (end(one.values, axis=-1, keepdims=True) for end in (np.min, np.max))
        spread = np.where(high > low, high - low, np.nan)
        said = f"log perplexity with k experts, from 0 (best k) to 1 (worst k){one.meaning}"
        found[f"normalised{one.part}"] = Variable((*one.dims, *dims), (one.values - low) / spread, "1", said)
    return found


def _bits_per_byte(
    dims: tuple[str, ...], nll: Float[np.ndarray, "N *varied"], counted: _Counted
) -> dict[str, Variable]:
    bits = nll / np.log(2)
    by_domain = ratio(counted.by_domain(bits), counted.by_domain(counted.bytes))
    overall = ratio(bits.sum(axis=0), counted.bytes.sum())
    said = "negative log-likelihood with the k heaviest experts per UTF-8 byte, whatever the tokenizer"
    return {
        "bits_per_byte": Variable(("domain", *dims), by_domain, "bits/byte", said),
        "bits_per_byte_overall": Variable(dims, overall, "bits/byte", f"{said}, over all domains"),
    }


def _amounts(counted: _Counted) -> dict[str, Variable]:
    documents = np.ones_like(counted.tokens)
    amounts = {
        "tokens": (counted.tokens, "tokens scored: all but the first of each document"),
        "documents": (documents, "documents with a token to score"),
        "bytes": (counted.bytes, "UTF-8 bytes that the scored tokens stand for"),
    }
    return {
        name: Variable(("domain",), counted.by_domain(values), name, said) for name, (values, said) in amounts.items()
    }
