"""Steering by experts: find those that a domain prefers, push or forbid them while the model writes, and measure it.

    python examples/steering.py                                  # French, on the bundled model and its sample texts
    python examples/steering.py --domain chinese_poetry
    python examples/steering.py --markdown docs/steering.md      # the page, with these tables in it

1. On every other document of each domain: the experts of each layer whose share in the domain most exceeds that in the
   others.
2. On the rest: continuations of beginnings from all domains, sampled with one seed, under no edit, with these experts
   pushed (a number added to their router logits), with them forbidden; and the same with random experts of the same
   layers, several draws of as many, which is what touching any experts does.
3. Measured: the share of written tokens that are the domain's (by a classifier of single tokens, whose score on real
   texts is printed beside), and the perplexity of held-out texts of the domain and of all others under the same edits.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import moe_interp as moe
from moe_interp.analyses.perplexity import nll_sums
from moe_interp.data import Corpus, Document
from moe_interp.encode import pad
from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention
from moe_interp.stats import bootstrap_mean

MARK = "<!-- tables -->"


@dataclass(frozen=True)
class Setting:
    """What is asked: sizes and seeds."""

    domain: str
    experts: int
    draws: int
    beginning: int
    written: int
    pushes: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class Outcome:
    """One condition. Shares are of written tokens, by text; nats are per token, by held-out text; one text is shown."""

    name: str
    text: str
    share: np.ndarray
    own: np.ndarray
    others: np.ndarray


def halves(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Every other document of each domain."""
    parts: tuple[list[Document], list[Document]] = ([], [])
    for domain in corpus.domains:
        for number, document in enumerate(one for one in corpus.documents if one.domain == domain):
            parts[number % 2].append(document)
    first, second = (Corpus(tuple(part), corpus.source) for part in parts)
    return first, second


def preferred(model: moe.MoEModel, corpus: Corpus, domain: str, count: int) -> dict[int, list[int]]:
    """The experts of each layer with the largest share in the domain less that in the other domains' mean."""
    result = moe.routing(model, corpus, resamples=1)["utilisation"]
    others = [name for name in result["domain"].values if name != domain]
    gain = result.sel(domain=domain) - result.sel(domain=others).mean("domain")
    return {int(layer): np.argsort(-gain.sel(layer=layer).values)[:count].tolist() for layer in result["layer"].values}


def random_experts(model: moe.MoEModel, count: int, seed: int) -> dict[int, list[int]]:
    """As many experts of each layer, drawn at random."""
    rng = np.random.default_rng(seed)
    return {
        layer: rng.choice(model.spec.moe(layer).num_experts, count, replace=False).tolist() for layer in model.layers
    }


def pushed(experts: dict[int, list[int]], by: float) -> list[Intervention]:
    """A number added to their logits, so that they are chosen more often and weigh more."""
    return [moe.bias(layer=layer, expert=some, by=by, on="logits") for layer, some in experts.items()]


def forbidden(experts: dict[int, list[int]]) -> list[Intervention]:
    """None of them can be chosen."""
    return [moe.ablate(layer=layer, expert=some, how="forbid") for layer, some in experts.items()]


class TokenClassifier:
    """Whose a token is: the domain's if it is more frequent there than in the mean of the others, smoothed by one."""

    def __init__(self, model: moe.MoEModel, corpus: Corpus, domain: str):
        counts = {name: np.ones(model.spec.vocab_size) for name in corpus.domains}
        for document in corpus.documents:
            np.add.at(counts[document.domain], model.tokenizer(document.text, verbose=False)["input_ids"], 1)
        shares = {name: count / count.sum() for name, count in counts.items()}
        others = np.mean([share for name, share in shares.items() if name != domain], axis=0)
        self.own = shares[domain] > others

    def share(self, ids: Sequence[int]) -> float:
        """The share of tokens that are the domain's."""
        return float(self.own[np.asarray(ids)].mean())


class Study:
    """The beginnings that are written on, the held-out texts, and how a condition is measured."""

    def __init__(self, model: moe.MoEModel, corpus: Corpus, setting: Setting):
        self.model, self.setting = model, setting
        chosen, held_out = halves(corpus)
        self.experts = preferred(model, chosen, setting.domain, setting.experts)
        self.classifier = TokenClassifier(model, chosen, setting.domain)
        self.ids = [
            (one.domain, model.tokenizer(one.text, verbose=False)["input_ids"][:128]) for one in held_out.documents
        ]
        self.beginnings = [ids[: setting.beginning] for _, ids in self.ids if len(ids) > setting.beginning]

    def calibration(self) -> tuple[float, float]:
        """What the classifier says of real texts: of the domain, and of the others."""
        shares = [(domain == self.setting.domain, self.classifier.share(ids)) for domain, ids in self.ids]
        own, others = (float(np.mean([share for mine, share in shares if mine is which])) for which in (True, False))
        return own, others

    def measure(self, name: str, edits: list[Intervention]) -> Outcome:
        """Texts written under the edits, and the nats of held-out texts."""
        torch.manual_seed(self.setting.seed)
        inputs = pad(self.beginnings, "left")
        options = {"max_new_tokens": self.setting.written, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
        with torch.random.fork_rng():
            torch.manual_seed(self.setting.seed)
            ids = self.model.generate(inputs, edit=edits, **options)
        written = ids[:, -self.setting.written :].tolist()  # type: ignore[call-overload]
        share = np.array([self.classifier.share(one) for one in written])
        nats = [self.nats([ids], edits)[0] for _, ids in self.ids]
        mine = np.array([domain == self.setting.domain for domain, _ in self.ids])
        return Outcome(
            name, self.model.tokenizer.decode(written[0]), share, np.array(nats)[mine], np.array(nats)[~mine]
        )

    def nats(self, ids: list[list[int]], edits: list[Intervention]) -> np.ndarray:
        """Nats per token of texts."""
        inputs = pad(ids)
        sums = nll_sums(self.model.run(inputs, edit=edits).logits, inputs["input_ids"], inputs["attention_mask"])
        return sums / np.array([len(one) - 1 for one in ids])

    def outcomes(self) -> list[Outcome]:
        """All conditions; those of random experts are means over draws."""
        setting = self.setting
        draws = [random_experts(self.model, setting.experts, setting.seed + draw) for draw in range(setting.draws)]
        work: dict[str, list[list[Intervention]]] = {"no edit": [[]]}
        for by in setting.pushes:
            work[f"preferred pushed by {by:g}"] = [pushed(self.experts, by)]
            work[f"random pushed by {by:g}"] = [pushed(some, by) for some in draws]
        work |= {
            "preferred forbidden": [forbidden(self.experts)],
            "random forbidden": [forbidden(some) for some in draws],
        }
        found = []
        with tqdm(total=sum(map(len, work.values())), desc="steering", unit="condition") as progress:
            for name, conditions in work.items():
                some = []
                for edits in conditions:
                    some.append(self.measure(name, edits))
                    progress.update()
                means = (np.mean([getattr(one, part) for one in some], axis=0) for part in ("share", "own", "others"))
                found.append(Outcome(name, some[0].text, *means))
        return found


def interval(values: np.ndarray, scale: float = 1.0) -> str:
    """A mean over texts with its 95 % interval."""
    low, high = bootstrap_mean(values, resamples=1000, seed=0)
    return f"{scale * values.mean():.3g} [{scale * low:.3g}, {scale * high:.3g}]"


def ratio(nats: np.ndarray, base: np.ndarray) -> str:
    """Perplexity over that of the model as it is, over the same texts."""
    low, high = bootstrap_mean(nats - base, resamples=1000, seed=0)
    return f"{np.exp((nats - base).mean()):.3g} [{np.exp(low):.3g}, {np.exp(high):.3g}]"


def rows(outcomes: list[Outcome]) -> list[list[str]]:
    """The table: a condition a row."""
    base = outcomes[0]
    return [
        [one.name, interval(one.share, 100), ratio(one.own, base.own), ratio(one.others, base.others)]
        for one in outcomes
    ]


COLUMNS = ["condition", "written tokens that are the domain's, %", "perplexity of the domain, x", "of the others, x"]


def samples(study: Study, outcomes: list[Outcome]) -> list[str]:
    """How each condition goes on from the first beginning (random experts: the first draw)."""
    beginning = study.model.tokenizer.decode(study.beginnings[0])
    return [f"On {beginning!r}:", *(f"{one.name}: {one.text!r}" for one in outcomes)]


def as_markdown(table: list[list[str]], notes: list[str]) -> str:
    """The table and what is said of it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table), "", *(f"- {note}" for note in notes)])


def main() -> None:
    """Measures, prints, and puts the table into the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a folder (default: the bundled model)")
    parser.add_argument("--data", help="documents with domains (default: the bundled sample)")
    parser.add_argument("--domain", default="french_literature")
    parser.add_argument("--experts", type=int, default=4, help="of each layer")
    parser.add_argument("--draws", type=int, default=5, help="of random experts")
    parser.add_argument("--documents", type=int, default=12, help="of each domain")
    parser.add_argument("--written", type=int, default=32, help="tokens written on each beginning")
    parser.add_argument("--push", type=float, nargs="+", default=[4.0, 8.0], help="logits, one or several")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page to put the table into")
    options = parser.parse_args()
    model = moe.load(options.model) if options.model else moe.load()
    corpus = (moe.read_corpus(options.data) if options.data else moe.sample()).take(options.documents)
    if options.domain not in corpus.domains:
        raise BadInput("no such domain", expected=f"one of {', '.join(corpus.domains)}", got=options.domain)
    setting = Setting(
        options.domain, options.experts, options.draws, 8, options.written, (*options.push,), options.seed
    )
    study = Study(model, corpus, setting)
    own, others = study.calibration()
    outcomes = study.outcomes()
    table = rows(outcomes)
    experts = "; ".join(f"{layer}: {', '.join(map(str, some))}" for layer, some in study.experts.items())
    notes = [
        f"Domain: {setting.domain}. Experts by layer: {experts}.",
        f"{len(study.beginnings)} beginnings of 8 tokens, {setting.written} written on each; pushes in logits; "
        f"{setting.draws} draws of random experts, the mean over them. Intervals: 95 %, over texts.",
        f"The classifier calls {100 * own:.1f} % of the tokens of real texts of the domain the domain's, "
        f"{100 * others:.1f} % of the others'.",
        *samples(study, outcomes),
    ]
    shown = Table(*COLUMNS, title="Steering by experts")
    for row in table:
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    for note in notes:
        console.print(note, markup=False)
    if options.markdown:
        before, _, after = options.markdown.read_text(encoding="utf-8").partition(MARK)
        end = after.partition(MARK)[2]
        text = f"{before}{MARK}\n\n{as_markdown(table, notes)}\n\n{MARK}{end}"
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
