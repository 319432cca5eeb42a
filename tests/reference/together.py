"""Co-activation, transitions, token ids and labels by plain loops over choices, as tests.reference.routing has them.

A *choice* is a dict of document, layer, token, position, ids, weights of one token at one layer.
"""

import math
from itertools import combinations, pairwise, product


def at(choices, layer, documents=None):
    return [c for c in choices if c["layer"] == layer and (documents is None or c["document"] in documents)]


def pairs(choices, layer, one, other):
    """Tokens that chose both."""
    return sum(1 for choice in at(choices, layer) if one in choice["ids"] and other in choice["ids"])


def adjacent(choices, layer, one, other):
    """Tokens in which one stands right before or after the other, by weight."""
    found = 0
    for choice in at(choices, layer):
        ranked = sorted(range(len(choice["ids"])), key=lambda slot: -choice["weights"][slot])
        order = [choice["ids"][slot] for slot in ranked]
        found += sum({a, b} == {one, other} for a, b in pairwise(order))
    return found


def lift(choices, layer, one, other):
    tokens = len(at(choices, layer))
    return (
        pairs(choices, layer, one, other)
        * tokens
        / (pairs(choices, layer, one, one) * pairs(choices, layer, other, other))
    )


def npmi(choices, layer, one, other):
    share = pairs(choices, layer, one, other) / len(at(choices, layer))
    if share == 0:
        return -1.0
    return 1.0 if share == 1 else math.log(lift(choices, layer, one, other)) / -math.log(share)


def pair_chances(inclusion, top_k):
    """Chance of every pair when sets are as likely as the product of their weights; weights found by bisection-free
    fixed point over *enumerated sets*."""
    experts = range(len(inclusion))
    sets = list(combinations(experts, top_k))
    weights = list(inclusion)
    for _ in range(4000):
        chance = [math.prod(weights[e] for e in chosen) for chosen in sets]
        total = sum(chance)
        found = [sum(c for c, chosen in zip(chance, sets, strict=True) if e in chosen) / total for e in experts]
        weights = [w * p / f if f else 0.0 for w, p, f in zip(weights, inclusion, found, strict=True)]
    return {
        (a, b): sum(c for c, chosen in zip(chance, sets, strict=True) if a in chosen and b in chosen) / total
        for a, b in product(experts, experts)
        if a != b
    }


def flow(choices, layer, following, one, other):
    """Slot pairs of one token with expert ``one`` at a layer and ``other`` at the next."""
    later = {(c["document"], c["position"]): c["ids"] for c in at(choices, following)}
    return sum(
        choice["ids"].count(one) * later[choice["document"], choice["position"]].count(other)
        for choice in at(choices, layer)
    )


def mutual_information(table):
    total = sum(map(sum, table))
    found = 0.0
    for row in range(len(table)):
        for column in range(len(table[0])):
            if table[row][column]:
                p = table[row][column] / total
                rows, columns = sum(table[row]) / total, sum(line[column] for line in table) / total
                found += p * math.log(p / (rows * columns))
    return found


def routed(choices, layer, token, expert, documents=None):
    """How often an id went to an expert."""
    return sum(1 for c in at(choices, layer, documents) if c["token"] == token and expert in c["ids"])


def occurs(choices, layer, token, documents=None):
    return sum(1 for c in at(choices, layer, documents) if c["token"] == token)


def vocabulary_specialization(choices, layer, token, experts):
    return max(routed(choices, layer, token, e) for e in range(experts)) / occurs(choices, layer, token)


def predicted(choices, layer, documents, expert, folds, at_least):
    """Choices of some documents' tokens that their ids predict from other folds, the real ones, and the tokens."""
    everyone = {c["document"] for c in choices}
    total = real = tokens = 0.0
    for choice in at(choices, layer, documents):
        others = {d for d in everyone if folds[d] != folds[choice["document"]]}
        seen = occurs(choices, layer, choice["token"], others)
        if seen >= at_least:
            total += routed(choices, layer, choice["token"], expert, others) / seen
            real += expert in choice["ids"]
            tokens += 1
    return total, real, tokens


def block_jackknife(statistic, blocks):
    """theta, the mean of theta without a block, and its delete-a-group standard error; blocks are lists of choices."""
    whole = statistic([c for block in blocks for c in block])
    without = [
        statistic([c for n, block in enumerate(blocks) if n != left for c in block]) for left in range(len(blocks))
    ]
    mean = sum(without) / len(without)
    error = math.sqrt((len(blocks) - 1) / len(blocks) * sum((one - mean) ** 2 for one in without))
    return whole, mean, error
