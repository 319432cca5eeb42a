"""Routing statistics by plain loops over tokens, slots, experts and documents, straight from definitions.

A *choice* is what one token did at one layer: a dict of document, layer, ids, weights, logits, scores.
"""

import math
from itertools import combinations

from scipy.stats import t as student


def count(choices, document, layer, expert):
    """Tokens of a document that chose the expert at the layer."""
    return sum(
        1
        for choice in choices
        if choice["document"] == document and choice["layer"] == layer and expert in choice["ids"]
    )


def tokens(choices, document, layer):
    """Tokens of a document."""
    return sum(1 for choice in choices if choice["document"] == document and choice["layer"] == layer)


def specialization(choices, documents, layer, expert):
    """Tokens of these documents that chose the expert / tokens of these documents."""
    chose = sum(count(choices, document, layer, expert) for document in documents)
    return chose / sum(tokens(choices, document, layer) for document in documents)


def weight_share(choices, documents, layer, expert):
    """Combine weight that goes to the expert / all combine weight, of these documents."""
    own = total = 0.0
    for choice in choices:
        if choice["document"] in documents and choice["layer"] == layer:
            for slot, weight in zip(choice["ids"], choice["weights"], strict=True):
                own += weight if slot == expert else 0.0
                total += weight
    return own / total


def entropy(choice):
    return -sum(p * math.log(p) for p in choice["scores"] if p > 0)


def margin(choice):
    chosen = [p for expert, p in enumerate(choice["scores"]) if expert in choice["ids"]]
    others = [p for expert, p in enumerate(choice["scores"]) if expert not in choice["ids"]]
    return min(chosen) - max(others, default=0.0)


def heaviest_weight(choice):
    return max(choice["weights"])


def weight_sum(choice):
    return math.fsum(choice["weights"])


def z_loss(choice):
    return math.log(math.fsum(math.exp(logit) for logit in choice["logits"])) ** 2


PER_TOKEN = {
    "entropy": entropy,
    "margin": margin,
    "heaviest_weight": heaviest_weight,
    "weight_sum": weight_sum,
    "z_loss": z_loss,
}


def mean_per_token(name, choices, documents, layer):
    values = [
        PER_TOKEN[name](choice) for choice in choices if choice["document"] in documents and choice["layer"] == layer
    ]
    return math.fsum(values) / len(values)


def load_balance(choices, layer, experts):
    """Switch eq. 4: E sum_e f_e P_e at one layer."""
    here = [choice for choice in choices if choice["layer"] == layer]
    slots = sum(len(choice["ids"]) for choice in here)
    total = 0.0
    for expert in range(experts):
        share = sum(choice["ids"].count(expert) for choice in here) / slots
        score = math.fsum(choice["scores"][expert] for choice in here) / len(here)
        total += share * score
    return experts * total


def load_balance_as_coded(choices, experts, top_k=None):
    """As transformers has it: tokens of all layers in one row, the K largest of a softmax of the logits, means, sum.

    Who was chosen and what the router scores by do not matter.
    """
    top_k = top_k or len(choices[0]["ids"])
    shares, scores = [0.0] * experts, [0.0] * experts
    for choice in choices:
        powers = [math.exp(logit - max(choice["logits"])) for logit in choice["logits"]]
        for expert in range(experts):
            scores[expert] += powers[expert] / sum(powers) / len(choices)
            if sum(other > powers[expert] for other in powers) < top_k:
                shares[expert] += 1 / len(choices)
    return experts * sum(share * score for share, score in zip(shares, scores, strict=True))


def coverage(load, share):
    """Take experts from the busiest on until they have the share."""
    left, taken, used = sorted(load), 0, 0
    while taken < share * sum(load) - 1e-9:
        taken, used = taken + left.pop(), used + 1
    return used


def gini(load):
    """Half of the mean absolute difference over all pairs, relative to the mean."""
    pairs = sum(abs(one - other) for one in load for other in load) / len(load) ** 2
    return pairs / (2 * sum(load) / len(load))


def load_entropy(load):
    shares = [one / sum(load) for one in load]
    return -sum(share * math.log(share) for share in shares if share > 0) / math.log(len(load))


def max_vio(load):
    return max(load) / (sum(load) / len(load)) - 1


def cv2(load):
    mean = sum(load) / len(load)
    return sum((one - mean) ** 2 for one in load) / len(load) / mean**2


def dead_experts(load):
    return sum(1 for one in load if 10 * len(load) * one < sum(load))


LOAD = {
    "n50": lambda load: coverage(load, 0.5),
    "n90": lambda load: coverage(load, 0.9),
    "gini": gini,
    "load_entropy": load_entropy,
    "max_vio": max_vio,
    "cv2": cv2,
    "dead_experts": dead_experts,
}


def jensen_shannon(left, right):
    """Mean Kullback-Leibler divergence of two loads from their middle."""
    p, q = [one / sum(left) for one in left], [one / sum(right) for one in right]
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += sum(one / 2 * math.log(one / middle) for one in (a, b) if one > 0)
    return total


def divergence_from_rest(loads):
    """By group: the divergence of its load from the summed load of the others."""
    found = []
    for group, load in enumerate(loads):
        rest = [sum(column) for column in zip(*(loads[:group] + loads[group + 1 :]), strict=True)]
        found.append(jensen_shannon(load, rest))
    return found


def summed(rows, documents):
    return [sum(rows[document][column] for document in documents) for column in range(len(rows[0]))]


def jackknife(statistic, rows, groups, num_groups):
    """theta - sum over groups of (n - 1) (mean of theta without one of the group - theta)."""

    def theta(kept):
        return statistic([summed(rows, [i for i in kept if groups[i] == g]) for g in range(num_groups)])

    everyone = list(range(len(rows)))
    whole = theta(everyone)
    corrected = list(whole)
    for group in range(num_groups):
        own = [i for i in everyone if groups[i] == group]
        without = [theta([i for i in everyone if i != left_out]) for left_out in own]
        for g in range(num_groups):
            mean = sum(values[g] for values in without) / len(own)
            corrected[g] -= (len(own) - 1) * (mean - whole[g])
    return corrected


def bootstrap_interval(top, bottom, draws, level=0.95, strata=None):
    """Studentised interval of sum/sum over resamples, each given by how often it draws each document."""
    strata = [0] * len(top) if strata is None else list(strata)

    def estimate(documents):
        """The ratio, and its standard error from what documents are above and below it."""
        found = sum(top[d] for d in documents) / sum(bottom[d] for d in documents)
        squares = 0.0
        for stratum in set(strata):
            own = [top[d] - found * bottom[d] for d in documents if strata[d] == stratum]
            mean = sum(own) / len(own)
            squares += len(own) / (len(own) - 1) * sum((value - mean) ** 2 for value in own)
        return found, math.sqrt(squares) / abs(sum(bottom[d] for d in documents))

    whole, error = estimate(range(len(top)))
    having = sum(value != 0 for value in bottom)
    if having < 5:  # Student's
        half = student.ppf((1 + level) / 2, having - len(set(strata))) * error
        return whole - half, whole + half
    distances = []
    for drawn in draws:
        documents = [d for d, times in enumerate(drawn) for _ in range(round(times))]
        if sum(bottom[d] for d in documents) == 0:
            continue
        found, spread = estimate(documents)
        away = found - whole
        distances.append(away / spread if spread > 1e-12 else math.copysign(math.inf, away) if away else 0.0)
    distances.sort()
    rank = max(1, math.floor((len(distances) + 1) * (1 - level) / 2 + 1e-9))
    own = [a / b for a, b in zip(top, bottom, strict=True) if b]
    ends = (whole - distances[-rank] * error, whole - distances[rank - 1] * error)
    if min(bottom) < 0 < max(bottom):
        return ends
    return tuple(min(max(end, min(own)), max(own)) for end in ends)


def max_statistic_p(rows):
    """Single-step p: how often the largest standardised statistic of a row reaches the one of row 0."""
    tests = range(len(rows[0]))
    scaled = [[0.0 for _ in tests] for _ in rows]
    for test in tests:
        column = [row[test] for row in rows]
        mean = sum(column) / len(column)
        spread = math.sqrt(sum((value - mean) ** 2 for value in column) / len(column))
        for number, value in enumerate(column):
            scaled[number][test] = (value - mean) / spread if spread > 0 else 0.0
    largest = [max(row) for row in scaled]
    return [sum(1 for one in largest if one >= scaled[0][test] - 1e-12) / len(rows) for test in tests]


def exhaustive_p(rows, members):
    """p of the share difference for one group, over every choice of as many documents, max statistic."""

    def difference(chosen):
        inside = summed(rows, chosen)
        outside = summed(rows, [i for i in range(len(rows)) if i not in chosen])
        return [a / sum(inside) - b / sum(outside) for a, b in zip(inside, outside, strict=True)]

    splits = [split for split in combinations(range(len(rows)), len(members)) if split != tuple(members)]
    return max_statistic_p([difference(split) for split in (tuple(members), *splits)])


def mean_log_ratio(left, right):
    """exp of the mean difference of logarithms."""
    return math.exp(
        math.fsum(math.log(one) - math.log(other) for one, other in zip(left, right, strict=True)) / len(left)
    )


def sign_flip_p(differences, signs):
    """Single-step p of sums of differences over documents, of which each row of signs flips some; row 0 flips none."""
    tests = range(len(differences[0]))
    size = [math.sqrt(sum(row[t] ** 2 for row in differences)) for t in tests]
    rows = [
        [
            sum(s * row[t] for s, row in zip(flips, differences, strict=True)) / size[t] if size[t] else 0.0
            for t in tests
        ]
        for flips in signs
    ]
    largest = [max(row) for row in rows]
    return [sum(1 for one in largest if one >= rows[0][t] - 1e-9) / len(rows) if size[t] else 1.0 for t in tests]
