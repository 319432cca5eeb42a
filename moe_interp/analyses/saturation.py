"""Router saturation: how early in training the experts of a token are those that it has in the end.

1. At checkpoint t, saturation is the mean over tokens of |E_t and E_final| / K, the K experts of a token at a layer
   (Muennighoff et al. 2024, arXiv 2409.02060, section 5.1), on the same tokens at every checkpoint. A token that skips
   all experts in the end has nothing to agree with and does not count; one that skips them at t agrees in none.
2. Two controls: K/E, for a router that draws uniformly; and `independent`, sum_e u_t(e) u_final(e) / K, with u the
   share of tokens that chose e (in the end, of those that take any), for two routers that keep their loads and know
   nothing of each other's tokens.
3. Intervals are over documents.

`router_saturation` runs checkpoints or hub revisions one after the other; `saturation_of_ids` takes what was recorded;
`reference_saturation` is the bundled model's own training.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

import moe_interp.stats as stats
from moe_interp.analyses.collect import Options, Pass, sizes
from moe_interp.analyses.exact import Provenance, one_or_each
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.checkpoint import REFERENCE, load
from moe_interp.data import Corpus
from moe_interp.errors import BadCheckpoint, BadInput
from moe_interp.measured import code_version
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled
from moe_interp.run import Routing

_BUNDLED = REFERENCE / "routing_checkpoints.safetensors"


def saturation_of_ids(
    ids: Int[np.ndarray, "C T L K"],
    documents: Int[np.ndarray, " T"],
    *,
    steps: Sequence[int] | Sequence[str],
    layers: Sequence[int],
    experts: int,
    provenance: Provenance,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Router saturation from the experts of the same tokens at every checkpoint, the final one last.

    Args:
        ids: experts of each token, in any order within it; -1 in slots that hold none, because the token skips all
            experts of the layer, or because the layer has fewer slots than another.
        documents: a number for each token's document.
        steps: a number or a name for each checkpoint.
        layers: indices of the MoE layers.
        experts: E.
        provenance: what was measured on what.
        resamples: of documents, for the intervals.
        seed: of these.

    Returns:
        Dims step, layer, bound: ``saturation``, 0 ... 1 (1 at the last step), with its interval; ``independent``;
        ``saturation_baseline``, K/E.

    Raises:
        BadInput: fewer than two checkpoints, ``options`` for opened models, or sizes that do not fit.
    """
    sizes = (len(steps), len(documents), len(layers))
    if ids.shape[:3] != sizes or len(ids) < 2:
        wanted = f"[C, T, L, K] with C, T, L = {sizes}, C >= 2"
        raise BadInput("experts do not fit", expected=wanted, got=str(ids.shape))
    names, places = np.unique(documents, return_inverse=True)
    tokens = stats.group_totals((ids[-1] >= 0).any(axis=-1).astype(int), places, len(names))
    overlap = np.stack([_overlap(one, ids[-1]) for one in ids], axis=-1)
    sums = stats.group_totals(overlap, places, len(names))
    interval = stats.bootstrap_ratio(sums, tokens, resamples=resamples, seed=seed)
    top_k = (ids >= 0).sum(axis=-1).max(axis=(0, 1))
    values: dict[str, ArrayLike] = {
        "saturation": stats.ratio(sums.sum(axis=0), tokens.sum(axis=0)).T,
        "saturation_interval": interval.swapaxes(1, 2),
        "independent": _independent(ids, experts, tokens.sum(axis=0)) / np.maximum(top_k, 1),
        "saturation_baseline": one_or_each(top_k / experts),
    }
    coords: dict[str, Any] = {"bound": ["low", "high"], "step": list(steps), "layer": np.array(layers)}
    how = {"tokens": len(documents), "documents": len(names), "resamples": resamples, "seed": seed}
    return labelled(
        described(values, _VARIABLES), coords, analysis="router_saturation", provenance={**provenance, **how}
    )


def _overlap(ids: Int[np.ndarray, "T L K"], final: Int[np.ndarray, "T L K"]) -> Float[np.ndarray, "T L"]:
    """Share of the experts that a token has in the end that it has already; 0 if it has none in the end."""
    both = ((ids[..., :, None] == final[..., None, :]) & (ids >= 0)[..., None]).any(axis=-1).sum(axis=-1)
    return np.asarray(both / np.maximum((final >= 0).sum(axis=-1), 1))


def _independent(
    ids: Int[np.ndarray, "C T L K"], experts: int, taken: Int[np.ndarray, " L"]
) -> Float[np.ndarray, "C L"]:
    """How many experts two routers with the loads of each step and of the last share; NaN where the last takes none."""
    counts = np.stack([_counts(one, experts) for one in ids])
    return np.asarray((counts / ids.shape[1] * stats.ratio(counts[-1], taken)).sum(axis=-1))


def _counts(ids: Int[np.ndarray, "T L K"], experts: int) -> Int[np.ndarray, "L E"]:
    return np.stack([np.bincount(layer[layer >= 0], minlength=experts) for layer in ids.swapaxes(0, 1)])


@checked
def router_saturation(
    checkpoints: str | Path | Sequence[str | Path | MoEModel],
    corpus: Corpus,
    *,
    revisions: Sequence[str] | None = None,
    names: Sequence[int] | Sequence[str] | None = None,
    tokens_per_document: Count = 32,
    special_tokens: bool = False,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    **options: Any,
) -> xr.Dataset:
    """Router saturation of checkpoints of one model, loaded one after the other, the final one last.

    Args:
        checkpoints: folders, hub ids or opened models in training order; or a single hub id, with ``revisions``.
        corpus: documents.
        revisions: of the one checkpoint, in training order, such as those of OLMoE's branches.
        names: of the checkpoints in the result (None: of folders the last part, else what was given).
        tokens_per_document: tokens compared, drawn by the seed and the document alone.
        special_tokens: whether the tokenizer's special tokens may be among them.
        resamples, seed: of the intervals; the seed draws the tokens too.
        max_tokens: as `moe_interp.data.batches` has it.
        options: for `moe.load`.

    Raises:
        BadInput: no corpus, fewer than two checkpoints, models of different shapes or tokenizers, or ``names`` that are
            too few, too many or the same.
        UnsupportedModel: layers with different numbers of experts.
        BadCheckpoint: one that cannot be loaded.
    """
    given: list[Any] = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if revisions is not None and len(given) != 1:
        raise BadInput("revisions of what", expected="a single checkpoint", got=f"{len(given)} of them")
    wanted: list[tuple[Any, dict[str, Any]]] = (
        [(one, {}) for one in given] if revisions is None else [(given[0], {"revision": r}) for r in revisions]
    )
    if len(wanted) < 2:
        raise BadInput("too few checkpoints", expected="at least two, the final one last", got=str(len(wanted)))
    if options and all(isinstance(one, MoEModel) for one in given):
        raise BadInput("options for moe.load are not used", expected="checkpoints to load", got="opened models")
    _check_names(names, len(wanted))
    found = []
    for source, more in wanted:
        model = source if isinstance(source, MoEModel) else load(source, **options, **more)
        try:
            found.append(_sampled(model, corpus, Options(special_tokens, max_tokens), tokens_per_document, seed))
        finally:
            if not isinstance(source, MoEModel):
                model.close()
    first, last = found[0], found[-1]
    for one in found:
        if one.shape != first.shape or not np.array_equal(one.token_ids, first.token_ids):
            raise BadInput(
                "checkpoints of different models", expected=f"{first.shape}, same tokens", got=str(one.shape)
            )
    weights = ", ".join(str(one.provenance.get("weights")) for one in found)
    told = (
        names
        if names is not None
        else revisions or _apart([one.name if isinstance(one, MoEModel) else Path(one).name for one in given])
    )
    return saturation_of_ids(
        np.stack([one.ids for one in found]),
        first.documents,
        steps=told,
        layers=last.layers,
        experts=last.experts,
        provenance={
            **last.provenance,
            "checkpoint_weights": weights,
            "checkpoints": ", ".join(map(str, told)),
            "tokens_per_document": tokens_per_document,
        },
        resamples=resamples,
        seed=seed,
    )


def _apart(names: Sequence[str]) -> list[str]:
    """Names of checkpoints, of which those that several have get their place in the order, from 1."""
    return [name if list(names).count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]


def _check_names(names: Sequence[int] | Sequence[str] | None, count: int) -> None:
    if names is None:
        return
    if len(names) != count:
        raise BadInput("not a name for each checkpoint", expected=f"{count} names", got=f"{len(names)}: {names!r}")
    if len(set(names)) < count:
        raise BadInput("checkpoints of one name", expected="names that differ", got=repr(names))


class _Sampled:
    """Experts of sampled tokens of one checkpoint."""

    def __init__(self, model: MoEModel, provenance: Provenance, parts: list[tuple[int, np.ndarray, np.ndarray]]):
        ordered = sorted(parts, key=lambda part: part[0])
        self.documents = np.concatenate([np.full(len(tokens), document) for document, tokens, _ in ordered])
        self.token_ids = np.concatenate([tokens for _, tokens, _ in ordered])
        self.ids = np.concatenate([ids for *_, ids in ordered])
        self.layers, self.experts, top_k = sizes(model)
        self.shape, self.provenance = (self.layers, self.experts, top_k, len(self.token_ids)), provenance


def _sampled(model: MoEModel, corpus: Corpus, options: Options, per_document: int, seed: int) -> _Sampled:
    going, parts, (layers, _, top_k) = Pass(model, corpus, options), [], sizes(model)
    for run, batch in going.runs((), f"routes of {model.name}"):
        for row, document in enumerate(batch.documents.tolist()):
            real = run.mask[row].nonzero().flatten().cpu()
            drawn = np.sort(np.random.default_rng([seed, document]).permutation(len(real))[:per_document])
            at = real[torch.from_numpy(drawn)]
            ids = np.stack([_taken(run.routing[layer], row, at, max(top_k)) for layer in layers], axis=1)
            parts.append((document, run.token_ids[row].cpu()[at].numpy(), ids))  # type: ignore[index]
    return _Sampled(model, going.provenance, parts)


def _taken(routing: Routing, row: int, at: Int[Tensor, " t"], slots: int) -> Int[np.ndarray, "t K"]:
    """Experts of some tokens, in so many slots; -1 where there is none."""
    ids, takes = routing.ids[row].cpu()[at], routing.mask[row].cpu()[at]
    found = torch.full((len(at), slots), -1)
    found[:, : ids.shape[1]] = torch.where(takes[:, None], ids, -1)
    return found.numpy()


@checked
def reference_saturation(*, resamples: Draws = 1000, seed: Seed = 0) -> xr.Dataset:
    """Router saturation of the bundled model's own training, from the choices that were kept of it.

    Six checkpoints, four validation documents of each domain, 24 tokens of each.

    Raises:
        BadCheckpoint: the bundled file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_BUNDLED, "np") as file:
            kept = {name: file.get_tensor(name) for name in ("expert_ids", "steps", "domain", "document")}
            layers = json.loads(file.metadata()["layers"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadCheckpoint(f"cannot read {_BUNDLED}", expected="the file of the package", got=str(error)) from error
    config = json.loads((REFERENCE / "config.json").read_text(encoding="utf-8"))
    documents = kept["domain"].astype(np.int64) * 1000 + kept["document"]
    return saturation_of_ids(
        kept["expert_ids"].astype(np.int64),
        documents,
        steps=kept["steps"].tolist(),
        layers=layers,
        experts=config["n_routed_experts"],
        provenance={"model": "reference", "data": "validation documents of its training", "code": code_version()},
        resamples=resamples,
        seed=seed,
    )


_SL = ("step", "layer")
_VARIABLES: dict[str, Description] = {
    "saturation": (_SL, "1", "mean share of a token's K experts that it has at the last step too, 0 ... 1"),
    "saturation_interval": (("bound", *_SL), "1", "95 % interval over documents: saturation"),
    "independent": (_SL, "1", "control: the same for two routers with these loads that know nothing of each other"),
    "saturation_baseline": (("layer?",), "1", "saturation of a uniform router, K/E"),
}
