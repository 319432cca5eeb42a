"""What a vision mixture computes and what is measured of it, image by image and pair by pair.

Tables are lists of trials, each [class][expert]; ids are [image][slot].
"""

import math
from itertools import combinations, permutations, product

import torch
from torch import Tensor
from torch.nn import functional

# Student's t, 97.5 %, by degrees of freedom
T_975 = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}


@torch.no_grad()
def forward(model, images: Tensor) -> dict[str, Tensor]:
    """Every point [B, 1, ...] and the logits [B, V] of a model in eval mode, an image at a time."""
    found: dict[str, list[Tensor]] = {}
    for image in images:
        for name, value in _one(model, image).items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def _one(model, image: Tensor) -> dict[str, Tensor]:
    state = model.state_dict()
    hidden = _trunk(state, image[None], short="trunk.4.weight" not in state)
    count = len([name for name in state if name.endswith("up.weight")])
    logits = state["moe.router.weight"] @ hidden + state["moe.router.bias"]
    exponentials = [math.exp(value) for value in logits.tolist()]
    scores = [value / sum(exponentials) for value in exponentials]
    ids = sorted(range(count), key=lambda expert: -scores[expert])[: model.moe.top_k]
    whole = sum(scores[expert] for expert in ids) if model.moe.renormalise else 1.0
    weights = [scores[expert] / whole for expert in ids]
    acts, outs, total = [], [], torch.zeros_like(hidden)
    for expert, weight in zip(ids, weights, strict=True):
        up, down = f"moe.experts.{expert}.up", f"moe.experts.{expert}.down"
        z = state[f"{up}.weight"] @ hidden + state[f"{up}.bias"]
        acts.append(z * 0.5 * (1 + torch.erf(z / math.sqrt(2))))
        outs.append(state[f"{down}.weight"] @ acts[-1] + state[f"{down}.bias"])
        total = total + weight * outs[-1]
    points = {
        "moe_in": hidden,
        "router_logits": logits,
        "router_scores": torch.tensor(scores),
        "expert_ids": torch.tensor(ids),
        "gate_weights": torch.tensor(weights),
        "expert_act": torch.stack(acts),
        "expert_out": torch.stack(outs),
        "routed_out": total,
        "moe_out": total,
    }
    return {name: value[None] for name, value in points.items()} | {
        "logits": state["head.weight"] @ total + state["head.bias"]
    }


def _trunk(state: dict[str, Tensor], image: Tensor, short: bool) -> Tensor:
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("trunk.")})
    convolutions = numbers[::2]
    for position, number in enumerate(convolutions):
        image = functional.conv2d(image, state[f"trunk.{number}.weight"], padding=1)
        norm = {key: state[f"trunk.{number + 1}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        mean, var, weight, bias = (norm[key].view(1, -1, 1, 1) for key in norm)
        image = (image - mean) / torch.sqrt(var + 1e-5) * weight + bias
        image = image * 0.5 * (1 + torch.erf(image / math.sqrt(2)))
        if short:
            return _pooled(image, image.shape[-1] // 4).flatten()
        if position in (0, 1, 3):
            image = _pooled(image, 2)
    return image.amax(dim=(2, 3)).flatten()


def _pooled(image: Tensor, size: int) -> Tensor:
    cells = image.shape[-1] // size
    out = torch.empty(1, image.shape[1], cells, cells)
    for row in range(cells):
        for column in range(cells):
            cell = image[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            out[:, :, row, column] = cell.amax(dim=(2, 3))
    return out


def balance(scores: Tensor, top_k: int) -> float:
    """The Switch load-balance loss, a decision at a time."""
    images, experts = scores.shape
    decisions, mass = [0] * experts, [0.0] * experts
    for row in scores.tolist():
        for expert in sorted(range(experts), key=lambda e: -row[e])[:top_k]:
            decisions[expert] += 1
        for expert in range(experts):
            mass[expert] += row[expert]
    return experts * sum(d / (images * top_k) * m / images for d, m in zip(decisions, mass, strict=True))


def table(labels, ids, classes: int, experts: int) -> list[list[float]]:
    """Share of each class's decisions that each expert gets."""
    rows = []
    for number in range(classes):
        own = [expert for label, row in zip(labels, ids, strict=True) if label == number for expert in row]
        rows.append([own.count(expert) / len(own) for expert in range(experts)])
    return rows


def closest(one: list[list[float]], other: list[list[float]]) -> list[list[float]]:
    """``one`` with its columns in the order that comes closest to ``other``: all orders tried."""
    best = min(
        permutations(range(len(one[0]))),
        key=lambda order: sum(
            (one[c][order[e]] - other[c][e]) ** 2 for c in range(len(one)) for e in range(len(order))
        ),
    )
    return [[row[expert] for expert in best] for row in one]


def least_scatter(tables) -> float:
    """Sum of squared distances to the mean table, experts numbered as brings it lowest: all joint orders tried."""
    experts, best = range(len(tables[0][0])), math.inf
    for orders in product(permutations(experts), repeat=len(tables) - 1):
        named = [tables[0], *([[r[e] for e in o] for r in t] for t, o in zip(tables[1:], orders, strict=True))]
        total = 0.0
        for c in range(len(tables[0])):
            for e in experts:
                values = [t[c][e] for t in named]
                mean = sum(values) / len(values)
                total += sum((value - mean) ** 2 for value in values)
        best = min(best, total)
    return best


def merged_information(labels, predicted, classes: int, groups: int) -> float:
    """The most that predicted classes in so many groups tell of the class, in nats: all ways of grouping tried."""
    ways = (way for way in product(range(groups), repeat=classes) if way[0] == 0)
    return max(plug_in_information(labels, [[way[one]] for one in predicted], classes, groups) for way in ways)


def covariance(tables, a: int, b: int) -> float:
    """Of two classes' shares about 1/E, over experts, mean over trials."""
    terms = [(x - 1 / len(t[a])) * (y - 1 / len(t[a])) for t in tables for x, y in zip(t[a], t[b], strict=True)]
    return sum(terms) / len(terms)


def correlation(tables, a: int, b: int) -> float:
    """The same over the root of both variances."""
    return covariance(tables, a, b) / math.sqrt(covariance(tables, a, a) * covariance(tables, b, b))


def silhouette(tables, inside: set[int]) -> float:
    """Mean silhouette of the classes inside against the others."""
    classes = range(len(tables[0]))

    def distance(a: int, b: int) -> float:
        return math.sqrt(sum((x - y) ** 2 for t in tables for x, y in zip(t[a], t[b], strict=True)))

    widths = []
    for a in classes:
        own = [distance(a, b) for b in classes if (b in inside) == (a in inside) and b != a]
        rest = [distance(a, b) for b in classes if (b in inside) != (a in inside)]
        if not own:
            widths.append(0.0)
            continue
        near, far = sum(own) / len(own), sum(rest) / len(rest)
        widths.append((far - near) / max(near, far))
    return sum(widths) / len(widths)


def consistency(tables) -> float:
    """Correlation of excess shares at the best of all assignments, mean over pairs of trials."""
    values = []
    for one, other in combinations([_excess(t) for t in tables], 2):
        matched = closest(other, one)
        flat = [(x, y) for a, b in zip(one, matched, strict=True) for x, y in zip(a, b, strict=True)]
        top = sum(x * y for x, y in flat)
        values.append(top / math.sqrt(sum(x * x for x, _ in flat) * sum(y * y for _, y in flat)))
    return sum(values) / len(values)


def _excess(one) -> list[list[float]]:
    means = [sum(row[e] for row in one) / len(one) for e in range(len(one[0]))]
    return [[value - mean for value, mean in zip(row, means, strict=True)] for row in one]


def plug_in_information(labels, ids, classes: int, experts: int) -> float:
    """Mutual information of class and expert in nats, biased."""
    decisions = [(label, expert) for label, row in zip(labels, ids, strict=True) for expert in row]
    total, value = len(decisions), 0.0
    for c in range(classes):
        for e in range(experts):
            both = decisions.count((c, e)) / total
            alone = sum(d[0] == c for d in decisions) * sum(d[1] == e for d in decisions) / total**2
            value += both * math.log(both / alone) if both else 0.0
    return value


def interval(values: list[float]) -> tuple[float, float]:
    """Student's interval of a mean."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = T_975[count - 1] * math.sqrt(variance / count)
    return mean - half, mean + half
