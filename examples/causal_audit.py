"""Do frequency, weight, norm, saliency and specialization say what an expert is worth? Held to exact ablation.

    python examples/causal_audit.py                                   # the bundled sample: some minutes on one core
    python examples/causal_audit.py --data DIR --documents 8          # other documents, so many of each domain
    python examples/causal_audit.py --result FILE.nc                  # written there, and read where it is there

Every expert of the reference model is taken out in turn; the page shows which scores put experts in that order. With
--markdown the tables are written below the mark in that file.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import moe_interp as moe
from moe_interp.data import Corpus
from moe_interp.results import load, save
from moe_interp.views.score_audit import NAMES, page

MARK = "<!-- tables -->"


def between(value: float, ends: np.ndarray, digits: int = 2) -> str:
    """A value with its interval."""
    low, high = ends
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def score_rows(result: xr.Dataset) -> list[list[str]]:
    """Each score: over all layers, held out, and by layer."""
    rows = [["score", "all layers", "held out", *(f"layer {layer}" for layer in result["layer"].values)]]
    for score in map(str, result["score"].values):
        at = result.sel(score=score)
        whole = between(float(at["rank_correlation_overall"]), at["rank_correlation_overall_interval"].values)
        layers = [f"{value:.2f}" for value in at["rank_correlation"].values]
        rows.append([NAMES[score], whole, f"{float(at['held_out_overall']):.2f}", *layers])
    halves = [f"{value:.2f}" for value in result["reliability"].values]
    return [*rows, ["the exact effect itself", "–", f"{float(result['reliability_overall']):.2f}", *halves]]


def domain_rows(result: xr.Dataset) -> list[list[str]]:
    """Each domain: how much was scored, and every score's correlation on it."""
    rows = [["domain", "documents", "tokens", "nats/token", *(NAMES[str(score)] for score in result["score"].values)]]
    for domain in result["domain"].values:
        at = result.sel(domain=domain)
        counts = [f"{int(at['documents'])}", f"{int(at['tokens']):,}", f"{float(at['nll']):.2f}"]
        rows.append([str(domain), *counts, *(f"{value:.2f}" for value in at["rank_correlation_domain"].values)])
    return rows


def layer_rows(result: xr.Dataset) -> list[list[str]]:
    """Each layer: its random router, its most important expert, and the middle of its experts."""
    rows = [["layer", "all routing at random", "most important expert", "its effect", "median effect", "below 0"]]
    for layer in result["layer"].values:
        at = result.sel(layer=layer)
        best = int(at["effect"].values.argmax())
        rows.append(
            [
                str(layer),
                between(float(at["random_router"]), at["random_router_interval"].values, 3),
                str(best),
                between(float(at["effect"][best]), at["effect_interval"].values[:, best], 3),
                f"{float(at['effect'].median()):.4f}",
                f"{float((at['effect'] < 0).mean()):.0%}",
            ]
        )
    return rows


TABLES = {
    "Rank correlation of each score with the exact effect": (
        score_rows,
        "95 % intervals over documents (jackknife). Held out: the score of one half of the documents with the effect "
        "in the other, mean over halves; all else on the same documents. In the last row layers are held out too.",
    ),
    "By domain": (domain_rows, "Over the experts of all layers, score and effect on the domain's documents alone."),
    "What routing and experts are worth": (
        layer_rows,
        "Nats per token added; 95 % intervals over documents, which do not know that the expert was picked for it.",
    ),
}


def show(console: Console, title: str, rows: list[list[str]], note: str) -> None:
    """A table for the terminal."""
    table = Table(*rows[0], title=title, caption=note)
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    console.print(table)


def markdown(title: str, rows: list[list[str]], note: str) -> str:
    """The same for a page."""
    cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"## {title}", "", note, "", cells[0], "|---" * len(rows[0]) + "|", *cells[1:], ""])


def measured(options: argparse.Namespace) -> xr.Dataset:
    """The audit; from the file where it is there."""
    if options.result and options.result.exists():
        return load(options.result)
    corpus = moe.sample() if options.data is None else moe.read_corpus(options.data)
    source = corpus.source if options.data is None else options.data.name
    some = Corpus(corpus.take(options.documents).documents, source)
    result = moe.score_audit(moe.load(), some, max_tokens=options.max_tokens)
    if options.result:
        save(result, options.result)
    return result


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="documents with domains (default: the bundled sample)")
    parser.add_argument("--documents", type=int, default=8, metavar="N", help="at most so many of each domain")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="documents are cut to so many tokens")
    parser.add_argument("--result", type=Path, metavar="FILE", help="netCDF: read where it is there, else written")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page whose tables are written anew")
    parser.add_argument("-o", "--output", type=Path, default=Path("causal_audit.html"), help="the page of figures")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 180)
    try:
        result = measured(options)
        found = [(title, make(result), note) for title, (make, note) in TABLES.items()]
        for one in found:
            show(console, *one)
        if options.markdown:
            text = options.markdown.read_text(encoding="utf-8") if options.markdown.exists() else ""
            tables = "\n".join(markdown(*one) for one in found)
            options.markdown.write_text(f"{text.partition(MARK)[0]}{MARK}\n\n{tables}", encoding="utf-8")
        console.print(f"{page(result, options.output)} written", markup=False)
    except moe.MoEError as error:
        sys.exit(f"causal_audit.py: {error}")


if __name__ == "__main__":
    main()
