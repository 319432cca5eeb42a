"""Do intervals cover, do tests reject at their level, do they find what is there? On routers with a known answer.

Documents are clustered: each draws its own preferences around its domain's, at every layer, and every token of it draws
K distinct experts by these (Gumbel top-K). Routers:

- none: all domains have the same preferences. Every rejection is false.
- planted: one expert's preference is larger in one domain, by a factor.
- collapse: three experts have most of the preference, in every domain.
- twins: two experts swap and join: a token that draws one takes the other with it.

    python benchmarks/calibration.py                   tables for benchmarks/README.md (some minutes)
    python benchmarks/calibration.py --repeats 40      quicker
"""

import argparse
import time
from functools import partial
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

from moe_interp import stats
from moe_interp.analyses.coactivation import PairCounts
from moe_interp.analyses.labels import differences

EXPERTS, TOP_K, LAYERS, LENGTH, ALIKE = 64, 6, 2, 200, 40.0
DOMAINS, EACH = 4, 24


def preferences(kind: str, factor: float = 3.0) -> np.ndarray:
    """[D, E], what domains prefer; planted: expert 5 in domain 0."""
    share = np.ones((DOMAINS, EXPERTS))
    if kind == "collapse":
        share[:, :3] = 30.0
    if kind == "planted":
        share[0, 5] = factor
    return share / share.sum(axis=1, keepdims=True)


def routes(rng: np.random.Generator, share: np.ndarray, length: int = LENGTH) -> np.ndarray:
    """[N, L, T, E], what the tokens of documents choose; ``share`` [N, E] is what each document's domain prefers."""
    own = rng.gamma(np.broadcast_to(share[:, None] * ALIKE * 8, (len(share), LAYERS, EXPERTS))) + 1e-9
    noise = np.log(own)[:, :, None] + rng.gumbel(size=(len(share), LAYERS, length, EXPERTS))
    kth = np.partition(noise, -TOP_K, axis=-1)[..., -TOP_K, None]
    return noise >= kth


def counted(
    rng: np.random.Generator, kind: str, factor: float = 3.0, each: int = EACH
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [N, L, E] and the domain of every document."""
    groups = np.repeat(np.arange(DOMAINS), each)
    return routes(rng, preferences(kind, factor)[groups]).sum(axis=2), groups


def truth(kind: str, factor: float = 3.0) -> np.ndarray:
    """[D, E], the true specialization, from many documents."""
    rng, total = np.random.default_rng(99), np.zeros((DOMAINS, EXPERTS))
    for _ in range(60):
        for domain in range(DOMAINS):
            share = np.repeat(preferences(kind, factor)[domain : domain + 1], 100, axis=0)
            total[domain] += routes(rng, share, length=20).mean(axis=(0, 1, 2)) / 60
    return total


def coverage(kind: str, repeats: int, each: int) -> dict[str, float]:
    """How often intervals hold the truth: of specialization, over all experts and of the domain's own specialist."""
    known = truth(kind)
    hit, special = [], []
    for seed in tqdm(range(repeats), desc=f"coverage, {kind}"):
        counts, groups = counted(np.random.default_rng(seed), kind, each=each)
        for domain in range(DOMAINS):
            own = counts[groups == domain]
            low, high = stats.bootstrap_ratio(own, np.full(each, LENGTH), resamples=500, seed=seed)
            inside = (low <= known[domain]) & (known[domain] <= high)
            hit.append(inside.mean())
            special += [inside[:, 5].mean()] if domain == 0 else []
    return {"all": float(np.mean(hit)), "expert 5, domain 0": float(np.mean(special))}


def few_documents(each: int, strata: int, repeats: int) -> tuple[float, float]:
    """How often intervals of three shares hold the truth: studentised resamples, and what `bootstrap_ratio` does."""
    truth, held = np.array([0.05, 0.1, 0.3]), {1: [], stats.resampling.FEW: []}
    labels = np.repeat(np.arange(strata), each)
    for few, inside in held.items():
        rng = np.random.default_rng(0)
        with patch.object(stats.resampling, "FEW", few):
            for seed in range(repeats):
                tokens = np.maximum(20, rng.lognormal(4.5, 0.6, size=len(labels))).astype(int)
                counts = rng.binomial(tokens[:, None], rng.beta(25 * truth, 25 * (1 - truth), size=(len(labels), 3)))
                low, high = stats.bootstrap_ratio(counts, tokens, strata=labels, resamples=400, seed=seed)
                inside.append((low <= truth) & (truth <= high))
    always, ours = (float(np.mean(inside)) for inside in held.values())
    return always, ours


def rejections(kind: str, factor: float, repeats: int, each: int = EACH) -> dict[str, float]:
    """Shares of domain-layers with a rejection, of layers that find the planted expert, of domains by divergence."""
    any_found, planted, divergence = [], [], []
    for seed in tqdm(range(repeats), desc=f"tests, {kind} {factor}"):
        counts, groups = counted(np.random.default_rng(1000 + seed), kind, factor, each)
        p, _ = stats.permutation_max(stats.share_difference, counts, groups, DOMAINS, permutations=199, seed=seed)
        q, _ = stats.permutation_max(stats.jensen_shannon, counts, groups, DOMAINS, permutations=199, seed=seed)
        any_found.append((p.min(axis=2) <= 0.05).mean())
        planted.append((p[0, :, 5] <= 0.05).mean())
        divergence.append((q.min(axis=1) <= 0.05).mean())
    return {
        "family-wise": float(np.mean(any_found)),
        "expert found": float(np.mean(planted)),
        "divergence": float(np.mean(divergence)),
    }


def label_rejections(extra: float, repeats: int, documents: int = 48) -> dict[str, float]:
    """Labels of one token in ten, whose tokens choose expert 5 more often by ``extra``; sign flips of documents."""
    any_wrong, found = [], []
    for seed in tqdm(range(repeats), desc=f"labels, {extra}"):
        rng = np.random.default_rng(2000 + seed)
        chosen = routes(rng, np.repeat(preferences("none")[:1], documents, axis=0))
        label = np.zeros((documents, LENGTH), dtype=bool)
        label[:, ::10] = True
        forced = label[:, None] & (rng.random(chosen.shape[:3]) < extra)
        chosen[..., 5] |= forced
        counts = np.stack([(chosen & part[:, None, :, None]).sum(axis=2) for part in (~label, label)], axis=1)
        tokens = np.stack([(~label).sum(axis=1), label.sum(axis=1)], axis=1)
        p = stats.sign_flip_max(
            differences(counts, np.repeat(tokens[..., None], counts.shape[2], axis=2)), flips=199, seed=seed
        )[1]
        found.append((p[:, 5] <= 0.05).mean())
        any_wrong.append((np.delete(p, 5, axis=1).min(axis=1) <= 0.05).mean())
    return {"family-wise": float(np.mean(any_wrong)), "expert found": float(np.mean(found))}


def pair_rejections(twins: float, repeats: int, documents: int = 60) -> dict[str, float]:
    """Pairs by load alone, and two experts of which one takes the other with it in a share of the tokens."""
    any_wrong, found, held = [], [], []
    uneven = np.random.default_rng(5).dirichlet(np.full(EXPERTS, 3.0))
    for seed in tqdm(range(repeats), desc=f"pairs, {twins}"):
        rng = np.random.default_rng(3000 + seed)
        chosen = stats.distinct_draws(uneven * TOP_K, TOP_K, documents * LENGTH, rng)
        moved = chosen[:, 1] & ~chosen[:, 2] & (rng.random(len(chosen)) < twins)
        last = EXPERTS - 1 - chosen[:, ::-1].argmax(axis=1)
        chosen[moved, last[moved]] = False
        chosen[moved, 2] = True
        tables = np.stack([part.astype(int).T @ part for part in np.split(chosen, documents)])
        blocks = np.stack([tables[block::20].sum(axis=0) for block in range(20)])[:, None]
        tokens = np.full(20, len(chosen) // 20)
        sums = PairCounts((0,), (TOP_K,), tokens, blocks, np.zeros((1, EXPERTS, EXPERTS), np.int64))
        result = sums.result(provenance={}, resamples=199, seed=seed)
        p = result.lift_p.values[0]
        found.append(p[1, 2] <= 0.05)
        pairs = np.triu_indices(EXPERTS, 1)
        others = np.ones((EXPERTS, EXPERTS), bool)
        others[1, 2] = False
        any_wrong.append(p[pairs][others[pairs]].min() <= 0.05)
        low, high = result.lift_interval.values[:, 0]
        truth_lift = result.lift_load.values[0]
        if not twins:
            held.append(((low <= truth_lift) & (truth_lift <= high))[pairs].mean())
    return {
        "family-wise": float(np.mean(any_wrong)),
        "pair found": float(np.mean(found)),
        "interval of lift": float(np.mean(held)) if held else float("nan"),
    }


def bias(repeats: int) -> dict[str, tuple[float, float, float]]:
    """Truth, plug-in and debiased estimate of n50, n90 and divergence; planted router, domain 0."""
    known = truth("planted", 6.0)
    exact = {
        "n50": float(stats.coverage(known[0], 0.5)),
        "n90": float(stats.coverage(known[0], 0.9)),
        "divergence": float(stats.divergence_from_rest(known)[0]),
    }
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in exact}
    for seed in tqdm(range(repeats), desc="bias"):
        counts, groups = counted(np.random.default_rng(4000 + seed), "planted", 6.0)
        totals = stats.group_totals(counts, groups, DOMAINS).swapaxes(0, 1)
        for name, share in (("n50", 0.5), ("n90", 0.9)):
            statistic = partial(stats.coverage, share=share)
            debiased = stats.bootstrap_debias(statistic, counts, groups, DOMAINS, resamples=200, seed=seed)
            rows[name].append((statistic(totals)[:, 0].mean(), debiased[0].mean()))
        jackknifed = stats.jackknife(stats.divergence_from_rest, counts, groups, DOMAINS)
        rows["divergence"].append((stats.divergence_from_rest(totals)[:, 0].mean(), jackknifed[0].mean()))
    return {name: (exact[name], *map(float, np.mean(rows[name], axis=0))) for name in exact}


def speed() -> None:
    """1,000 resamples and permutations over 2,000 documents, 27 layers, 64 experts, 8 domains."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 20.0, size=(2000, 27, 64)))
    tokens, groups = counts.sum(axis=(1, 2)), np.arange(2000) % 8
    work = {
        "bootstrap_ratio": partial(stats.bootstrap_ratio, counts, tokens, strata=groups),
        "bootstrap_debias, n50": partial(stats.bootstrap_debias, partial(stats.coverage, share=0.5), counts, groups, 8),
        "jackknife, divergence": partial(stats.jackknife, stats.divergence_from_rest, counts, groups, 8),
        "permutation_max, specialization": partial(stats.permutation_max, stats.share_difference, counts, groups, 8),
        "permutation_max, divergence": partial(stats.permutation_max, stats.jensen_shannon, counts, groups, 8),
        "sign_flip_max": partial(stats.sign_flip_max, counts - counts.mean(axis=0)),
    }
    table("1,000 resamples, 2,000 documents x 27 layers x 64 experts", "seconds")
    for name, call in work.items():
        began = time.perf_counter()
        call()
        print(f"| {name} | {time.perf_counter() - began:.1f} |")


def table(*heads: str) -> None:
    """The head of a markdown table."""
    print("\n| " + " | ".join(heads) + " |\n|---" + "|---:" * (len(heads) - 1) + "|")


def main() -> None:
    """Print every table as markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    repeats = parser.parse_args().repeats
    speed()
    table("router", "documents a domain", "95 % intervals that hold the truth", "those of expert 5, domain 0")
    for kind in ("none", "planted", "collapse"):
        for each in (12, EACH, 60):
            held, special = coverage(kind, repeats // 2, each).values()
            print(f"| {kind} | {each} | {held:.3f} | {special:.3f} |")
    table("documents", "studentised resamples hold the truth", "ours: Student's below five")
    for each, strata in ((2, 1), (3, 1), (4, 1), (5, 1), (2, 11), (3, 11)):
        always, ours = few_documents(each, strata, 6 * repeats)
        print(f"| {each}{f' in each of {strata} domains' if strata > 1 else ''} | {always:.3f} | {ours:.3f} |")
    table("router", "any expert of a domain and layer", "the planted one", "any layer of a domain, by divergence")
    for kind, factor in (("none", 1.0), ("collapse", 1.0), ("planted", 1.5), ("planted", 2.0), ("planted", 3.0)):
        wide, found, divergence = rejections(kind, factor, repeats).values()
        print(f"| {kind} {factor:g}x | {wide:.3f} | {found:.3f} | {divergence:.3f} |")
    table("tokens with the label that take the expert besides", "any other expert", "the planted one")
    for extra in (0.0, 0.05, 0.1):
        wide, found = label_rejections(extra, repeats).values()
        print(f"| {extra:.0%} | {wide:.3f} | {found:.3f} |")
    table(
        "tokens in which one twin takes the other with it", "any other pair", "the twins", "intervals of lift that hold"
    )
    for twins in (0.0, 0.1, 0.3):
        wide, found, held = pair_rejections(twins, repeats).values()
        print(f"| {twins:.0%} | {wide:.3f} | {found:.3f} | {held:.3f} |")
    table("statistic", "truth", "plug-in", "debiased")
    for name, (exact, plain, debiased) in bias(repeats // 2).items():
        print(f"| {name} | {exact:.4g} | {plain:.4g} | {debiased:.4g} |")


if __name__ == "__main__":
    main()
