"""Routing and perplexity that others recorded, held to the same definitions as what is measured here.

1. `routing_from_counts` makes the Dataset of `routing` from counts alone: what takes documents is NaN.
2. `read_counts`, `read_perplexity`, `read_cosines` read the data files of MoE-Lens (arXiv 2603.05806), from a
   clone of its authors' repository (either branch) or from a folder with the same figures as JSON and CSV. No
   code is unpickled: tensors are loaded with ``weights_only=True``, which refuses a file that holds some.
3. `perplexity_ratios` compares k experts with all of them on the same samples, with paired intervals.
4. `read_denominators` finds what the released notebooks divided by, where that was not the tokens routed.
"""

import csv
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from moe_interp.analyses.exact import Provenance
from moe_interp.analyses.routing_values import dataset, from_counts
from moe_interp.arguments import CheckedLater, Count, checked, is_finite
from moe_interp.errors import BadData, BadInput
from moe_interp.measured import code_version, values_told
from moe_interp.results import Variable, labelled
from moe_interp.stats import bootstrap_mean

# Name, K and first MoE layer of what the authors' file names call these. Their layers are numbered from 1
# among the MoE layers, results are numbered as the checkpoint does.
_RECORDED = {
    "base": ("deepseek-ai/deepseek-moe-16b-base", 6, 1),
    "deepseek-base": ("deepseek-ai/deepseek-moe-16b-base", 6, 1),
    "chat": ("deepseek-ai/deepseek-moe-16b-chat", 6, 1),
    "deepseek-chat": ("deepseek-ai/deepseek-moe-16b-chat", 6, 1),
    "olmoe": ("allenai/OLMoE-1B-7B-0924", 8, 0),
    "qwen": ("Qwen/Qwen1.5-MoE-A2.7B", 4, 0),
}
_FIRST_LAYER = {name: first for name, _, first in _RECORDED.values()}


@checked
def routing_from_counts(
    counts: Annotated[ArrayLike, CheckedLater()],
    *,
    tokens: Annotated[int | ArrayLike, CheckedLater()],
    domains: Sequence[str],
    top_k: Count,
    layers: Sequence[int] | None = None,
    model: str = "recorded counts",
) -> xr.Dataset:
    """The Dataset of `routing` from recorded counts alone.

    Args:
        counts: [D, L, E], tokens of the domain that chose the expert.
        tokens: [D], tokens of each domain; a single number if they all have as many.
        domains: D names.
        top_k: K.
        layers: L layer numbers (None: 0 ... L-1).
        model: what was recorded, for the provenance.

    Returns:
        The same variables. NaN where it takes documents (intervals, debiased estimates, tests) or router
        values; ``attrs["missing"]`` says so.

    Raises:
        BadInput: sizes that do not fit, counts that are not whole numbers from 0, or a domain and layer whose
            counts do not sum to tokens * top_k.
    """
    whole = _whole(counts, 3)
    of_each: ArrayLike = [tokens] * len(whole) if is_finite(tokens) else tokens  # type: ignore[assignment]
    per_domain = _whole(of_each, 1)
    numbers = list(range(whole.shape[1]) if layers is None else layers)
    _check_recorded(whole, per_domain, domains, numbers, top_k)
    values = from_counts(whole, per_domain, [top_k] * whole.shape[1])
    values["documents"] = np.zeros(len(domains), np.int64)
    how: Provenance = {"model": model, "top_k": top_k, "tokens": int(per_domain.sum()), "code": code_version()}
    how = {**how, "counts": values_told(whole, per_domain)}
    return dataset(values, domains, numbers, how).assign_attrs(
        missing="recorded counts have no documents, weights or scores: what takes those is NaN"
    )


def _whole(values: ArrayLike, axes: int) -> Int[np.ndarray, "..."]:
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise BadInput("not counts", expected="numbers, as many in every row", got=str(error)) from error
    whole = (array >= 0) & (array < 2**53) & (array == np.floor(array))
    if array.ndim != axes or not whole.all():
        axis_names = "[domain, layer, expert]" if axes == 3 else "[domain]"
        worst = f", {array[~whole][0]} among them" if not whole.all() else ""
        raise BadInput("not counts", expected=f"whole numbers from 0, {axis_names}", got=f"shape {array.shape}{worst}")
    return array.astype(np.int64)


def _check_recorded(
    counts: np.ndarray, tokens: np.ndarray, domains: Sequence[str], layers: Sequence[int], top_k: int
) -> None:
    named = (len(domains), len(layers))
    distinct = (len(set(domains)), len(set(layers))) == named
    if not distinct or counts.shape[:2] != named or tokens.shape != named[:1]:
        raise BadInput(
            "recorded counts do not fit",
            expected="counts [domain, layer, expert], tokens [domain], different domains and layers",
            got=f"{counts.shape}, {tokens.shape}, domains {list(domains)}, layers {list(layers)}",
        )
    if not 1 <= top_k <= counts.shape[2]:
        raise BadInput("top_k does not fit", expected=f"1 to {counts.shape[2]} experts", got=str(top_k))
    most = tokens[:, None]
    for domain, layer in np.argwhere((counts.sum(axis=2) != most * top_k) | (counts.max(axis=2) > most))[:1]:
        raise BadInput(
            f"counts of {domains[domain]!r} at layer {layers[layer]} do not add up",
            expected=f"{tokens[domain]} tokens * top-{top_k} = {tokens[domain] * top_k}, none counted twice",
            got=f"{counts[domain, layer].sum()}, {counts[domain, layer].max()} for one expert",
        )


# The files of MoE-Lens


def read_counts(folder: str | Path) -> dict[str, xr.Dataset]:
    """Recorded counts as routing Datasets, by model name; layers numbered as the checkpoint does.

    Reads ``*.json`` with model, top_k, tokens and counts, and the authors' ``*_expert_data_*.pt``.

    Raises:
        BadData: there are none, one cannot be read (or not without running code), or counts do not add up.
    """
    found: dict[str, xr.Dataset] = {}
    for model, top_k, counts, tokens in (*_json_counts(Path(folder)), *_tensor_counts(Path(folder))):
        layers = sorted({layer for rows in counts.values() for layer in rows})
        first = _FIRST_LAYER.get(model, 1)
        try:
            found[model] = routing_from_counts(
                [[counts[domain][layer] for layer in layers] for domain in counts],
                tokens=[tokens[domain] for domain in counts],
                domains=list(counts),
                top_k=top_k,
                layers=[layer - 1 + first for layer in layers],
                model=model,
            )
        except (KeyError, ValueError, BadInput) as error:
            raise BadData(
                f"recorded counts of {model}",
                expected="the same layers and experts everywhere",
                got=str(error),
            ) from error
    if not found:
        raise BadData(f"no counts in {folder}", expected="*.json or *_expert_data_*.pt", got="neither")
    return found


Counts = dict[str, dict[int, list[int]]]
"""By domain and layer, the latter numbered from 1: a count per expert."""


def _json_counts(folder: Path) -> Iterator[tuple[str, int, Counts, dict[str, int]]]:
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if "counts" in record:
                counts = {
                    domain: {int(layer): row for layer, row in rows.items()}
                    for domain, rows in record["counts"].items()
                }
                yield record["model"], record["top_k"], counts, record["tokens"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadData(
                f"cannot read {path}",
                expected="model, top_k, tokens, counts by domain and layer",
                got=repr(error),
            ) from error


def _tensor_counts(folder: Path) -> Iterator[tuple[str, int, Counts, dict[str, int]]]:
    found: dict[tuple[str, int], Counts] = {}
    for path in sorted(folder.rglob("*_expert_data_*.pt")):
        domain, tag = path.stem.split("_expert_data_")
        if tag not in _RECORDED:
            raise BadData(f"whose counts are {path}", expected=f"one of {', '.join(_RECORDED)}", got=tag)
        counts = found.setdefault(_RECORDED[tag][:2], {})
        if domain in counts:
            raise BadData(f"{path} is not the only one", expected="one file per domain and model", got="two")
        counts[domain] = _load_counts(path)
    for (model, top_k), counts in found.items():
        tokens = {domain: sum(next(iter(rows.values()))) // top_k for domain, rows in counts.items()}
        yield model, top_k, counts, tokens


def _load_counts(path: Path) -> dict[int, list[int]]:
    try:
        layers = torch.load(path, map_location="cpu", weights_only=True)
        return {int(layer): [int(count) for count in row.tolist()] for layer, row in layers.items()}
    except pickle.UnpicklingError as error:
        raise BadData(
            f"{path} is not opened",
            expected="plain tensors by layer",
            got="a pickle that may run code",
            do="Where it is trusted, save it again as a dict of tensors.",
        ) from error
    except (OSError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        raise BadData(f"cannot read {path}", expected="tensors by layer", got=repr(error)) from error


def read_perplexity(folder: str | Path) -> dict[str, Float[np.ndarray, "N k"]]:
    """Recorded perplexities [samples, k] by domain; column k - 1 has k experts kept, NaN if not recorded.

    Reads ``perplexity_by_top_k.csv``, or the authors' ``<domain>_perplexity_top<k>.csv``.

    Raises:
        BadData: there are none, a line cannot be read, or two k have different samples.
    """
    found: dict[str, dict[int, dict[int, float]]] = {}
    for path in sorted(Path(folder).glob("perplexity_by_top_k.csv")):
        columns = {"domain": str, "top_k": int, "sample": int, "perplexity": float}
        for domain, k, sample, perplexity in _rows(path, columns):
            found.setdefault(domain, {}).setdefault(k, {})[sample] = perplexity
    for path in sorted(Path(folder).rglob("*_perplexity_top*.csv")):
        domain, k = path.stem.split("_perplexity_top")
        perplexities = (perplexity for (perplexity,) in _rows(path, {"perplexity": float}))
        found.setdefault(domain, {})[int(k)] = dict(enumerate(perplexities))
    if not found:
        raise BadData(f"no perplexities in {folder}", expected="*_perplexity_top*.csv", got="none")
    return {domain: _paired(domain, by_k) for domain, by_k in found.items()}


def _paired(domain: str, by_k: Mapping[int, Mapping[int, float]]) -> Float[np.ndarray, "N k"]:
    samples = sorted(next(iter(by_k.values())))
    values = np.full((len(samples), max(by_k)), np.nan)
    for k, perplexities in by_k.items():
        if sorted(perplexities) != samples or not all(value > 0 for value in perplexities.values()):
            raise BadData(
                f"perplexities of {domain} with {k} experts",
                expected=f"positive ones of the same {len(samples)} samples for every k",
                got=f"{len(perplexities)}, the smallest {min(perplexities.values(), default=0)}",
            )
        values[:, k - 1] = [perplexities[sample] for sample in samples]
    return values


def _rows(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> Iterator[list[Any]]:
    """The named columns of a CSV file, row by row."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines), start=2):
                try:
                    yield [convert(row[name]) for name, convert in columns.items()]
                except (KeyError, TypeError, ValueError) as error:
                    raise BadData(
                        f"cannot read line {number} of {path}",
                        expected=f"{', '.join(columns)}",
                        got=repr(error),
                    ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"cannot read {path}", expected="CSV", got=str(error)) from error


def read_cosines(folder: str | Path) -> dict[str, Float[np.ndarray, "N L"]]:
    """Recorded cosines of the heaviest expert with the ensemble [prompts, layers] by domain, as coded there.

    Reads ``<domain>_prompt_<n>_cos-sim.csv``; empty without any (only one branch of a clone has them).
    As coded: unweighted output of row 0 of the expert's own batch (mostly not the last token), plus the
    *normed* MoE input in place of the residual, for every expert; shared experts left out; no control.

    Raises:
        BadData: a file cannot be read.
    """
    found: dict[str, list[list[float]]] = {}
    for path in sorted(Path(folder).rglob("*_prompt_*_cos-sim.csv")):
        domain = path.stem.split("_prompt_")[0].removesuffix("_chunked")
        found.setdefault(domain, []).append([cosine for (cosine,) in _rows(path, {"top1_vs_topk": float})])
    return {domain: np.array(prompts) for domain, prompts in found.items()}


def read_denominators(folder: str | Path) -> dict[tuple[str, int], int]:
    """What the released notebooks divided by: domain and sum of a layer's counts -> "total tokens".

    They tokenized the domain's text file once more and divided by that, whatever text the counts were made
    from. Read from what the notebooks printed, which is data; no code is run. Empty where there are none.
    """
    found = {}
    pattern = re.compile(r"Total tokens in \S*?([\w-]+)\.txt: (\d+)\b.*?routed_tokens: (\d+)", re.DOTALL)
    for path in sorted(Path(folder).rglob("*.ipynb")):
        for printed in _printed(path):
            for domain, tokens, routed in pattern.findall(printed):
                found[domain, int(routed)] = int(tokens)
    return found


def _printed(path: Path) -> Iterator[str]:
    try:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()):
                yield "".join(output.get("text", ()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadData(f"cannot read {path}", expected="a Jupyter notebook", got=repr(error)) from error


def perplexity_ratios(
    samples: Mapping[str, Float[np.ndarray, "N k"]], *, resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """What k experts cost against all of them, on the same samples.

    Args:
        samples: perplexities by domain, as `read_perplexity` gives them.
        resamples: of samples, for the paired intervals.
        seed: of the resampling.

    Returns:
        Dims domain, k, bound: ``perplexity``, exp of the mean over samples of log perplexity (no token counts
        were recorded, so samples weigh the same); ``ratio`` and ``ratio_interval`` to the largest k recorded,
        ``reference`` (1 under the null that experts beyond the k-th do nothing); ``ratio_as_coded``, of plain
        means of perplexity, which the released plotting notebook labels log perplexity; ``samples``.
    """
    ks = np.arange(1, max(values.shape[1] for values in samples.values()) + 1)
    sizes = (len(samples), len(ks))
    perplexity, ratio, plain = (np.full(sizes, np.nan) for _ in range(3))
    interval = np.full((2, *sizes), np.nan)
    for row, values in enumerate(samples.values()):
        logs, columns = np.log(values), slice(0, values.shape[1])
        difference = logs - logs[:, -1:]
        perplexity[row, columns] = np.exp(logs.mean(axis=0))
        ratio[row, columns] = np.exp(difference.mean(axis=0))
        plain[row, columns] = values.mean(axis=0) / values[:, -1].mean()
        interval[:, row, columns] = np.exp(bootstrap_mean(difference, resamples=resamples, seed=seed))
    dims, to = ("domain", "k"), "perplexity with k experts over that with the reference's"
    counts = [(len(values), values.shape[1]) for values in samples.values()]
    variables = {
        "perplexity": Variable(dims, perplexity, "1", "exp of the mean over samples of log perplexity, 1 ..."),
        "ratio": Variable(dims, ratio, "1", f"{to}: exp of the mean difference of logs; 1 under the null"),
        "ratio_interval": Variable(("bound", *dims), interval, "1", "95 % paired interval over samples: ratio"),
        "ratio_as_coded": Variable(dims, plain, "1", f"{to}: plain means of perplexity"),
        "samples": Variable(("domain",), [n for n, _ in counts], "samples", "texts scored with every k"),
        "reference": Variable(("domain",), [k for _, k in counts], "experts", "largest k recorded"),
    }
    coords: dict[str, ArrayLike] = {"bound": ["low", "high"], "domain": list(samples), "k": ks}
    how = {"resamples": resamples, "seed": seed}
    return labelled(variables, coords, analysis="recorded_perplexity", provenance=how)
