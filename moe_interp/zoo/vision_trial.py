"""One trial of the vision mixture: train a model, and measure it on the test images, through the points it opens.

The trunk runs once; every expert's output on every image (``model.experts``) then gives what each routing would have
predicted (``model.decode``):

- *learned*: as the router chose.
- *random*: K distinct experts drawn uniformly, the learned weights' values kept. Not sampled: the mean over all ordered
  draws, or over 120 of them where there are more.
- *permuted*: every expert in the place of another, the mean over the E - 1 cyclic shifts, which with K = 1 give each
  image every wrong expert once; random routing is this in (E - 1) / E of the draws and the learned one in the others.
- *fresh*: experts as before training, the floor. The mean over `FRESH` initialisations.

The other reading of "random router" is a model that was trained with one: trials of their own in a study.

Linear probes (softmax regression, ridge, by L-BFGS) of the mixture's input say how much of the class it tells: their
accuracy, and H(class) minus their cross-entropy on the test images, a lower bound in nats on what the input tells
(Barber & Agakov 2003), and from `PROBED` training images alone. Controls: the same trunk before training (in eval mode:
its batch norms do nothing), and permuted labels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, permutations

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from moe_interp.model import MoEModel
from moe_interp.opening import wrap
from moe_interp.results import Variable, labelled
from moe_interp.zoo.vision import Experts, Mixture, Plan, VisionMoE, seeded, train
from moe_interp.zoo.vision_images import Images

CONDITIONS = ("learned", "random", "permuted", "fresh")
PROBES = ("mixture's input", "untrained trunk", "permuted labels")
DRAWS, FRESH, CHUNK = 120, 5, 1000
PROBED = 10_000  # training images that probes are fitted on
RIDGE = 1e-3
Identity = dict[str, str | int | float]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # training and test images, normalised, and their labels, on one device


def trial(
    images: Images,
    tensors: Tensors,
    plan: Plan,
    identity: Identity,
    step_done: Callable[[], object] = lambda: None,
) -> xr.Dataset:
    """Train one model and measure it.

    Args:
        images: for their classes.
        tensors: training and test images, normalised, and their labels, on one device.
        plan: of the trial.
        identity: goes into the provenance.
        step_done: called after every training step.
    """
    train_images, test_images, train_labels, test_labels = tensors
    channels, size = images.train.shape[1:3]
    hf = VisionMoE(channels, size, len(images.classes), plan).to(train_images.device)
    hf.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = train(hf, train_images, train_labels, plan, step_done)
    with wrap(hf, name="VisionMoE") as model, torch.no_grad(), seeded(plan.seed, train_images.device):
        variables = routes(model, test_images, test_labels, plan)
        before = VisionMoE(channels, size, len(images.classes), plan).to(train_images.device).eval()
        variables |= probes(hf, before, tensors, plan.seed)
        provenance = model.provenance() | identity
    variables["loss"] = Variable((), np.asarray(last["loss"]), "nats", "mean training loss of the last epoch")
    variables["balance"] = Variable(
        (), np.asarray(last["balance"]), "1", "load-balance loss of the last epoch: 1 even ... E"
    )
    coords: dict[str, ArrayLike] = {
        "class": list(images.classes),
        "condition": list(CONDITIONS if plan.experts > 1 else CONDITIONS[:1]),
        "probed": list(PROBES),
        "expert": np.arange(plan.experts),
    }
    variables["group"] = Variable(("class",), list(images.groups), "1", "a split that experts may follow")
    return labelled(variables, coords, analysis="vision trial", provenance=provenance)


# What each routing would have predicted


@dataclass(frozen=True)
class Seen:
    """What the mixture was given and did on N images.

    Attributes:
        hidden: its input; outputs: what every expert makes of it.
        ids, weights: the routing.
    """

    hidden: Float[Tensor, "N D"]
    outputs: Float[Tensor, "N E D"]
    ids: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]


def look(model: MoEModel, images: Float[Tensor, "N C H W"]) -> Seen:
    """One pass over the images, and every expert on each of them."""
    parts = []
    for some in images.split(CHUNK):
        run = model.run({"images": some}, read="moe_in")
        hidden, routing = run["moe_in", 0][:, 0], run.routing[0]
        every = torch.arange(model.spec.num_experts, device=hidden.device).expand(len(hidden), -1)
        outputs = model.experts(0)(hidden, every)
        parts.append((hidden, outputs, routing.ids[:, 0], routing.weights[:, 0]))
    return Seen(*(torch.cat(part) for part in zip(*parts, strict=True)))


def predict(
    model: MoEModel, outputs: Float[Tensor, "N E D"], ids: Int[Tensor, "N K"], weights: Float[Tensor, "N K"]
) -> Int[Tensor, " N"]:
    """The classes under a routing."""
    chosen = outputs.gather(1, ids[..., None].expand(*ids.shape, outputs.shape[-1]))
    return model.decode((weights[..., None] * chosen).sum(dim=1)).argmax(dim=-1)


def routes(
    model: MoEModel, images: Float[Tensor, "N C H W"], labels: Int[Tensor, " N"], plan: Plan
) -> dict[str, Variable]:
    """Accuracy under every condition, alone with each expert, and the routing of every image."""
    seen = look(model, images)
    rights = {name: _right(model, seen, labels, name, plan) for name in CONDITIONS[: None if plan.experts > 1 else 1]}
    total = seen.weights.sum(dim=1, keepdim=True)
    alone = [
        predict(model, seen.outputs, torch.full_like(seen.ids[:, :1], expert), total) == labels
        for expert in range(plan.experts)
    ]
    by_class = functional.one_hot(labels, model.spec.vocab_size).float()
    by_class = by_class / by_class.sum(dim=0)
    accuracy = torch.stack(list(rights.values()))
    chance = f"0 ... 1; chance 1/{model.spec.vocab_size}"
    values = {
        "accuracy": (("condition",), accuracy.mean(dim=1), f"share of test images classified right, {chance}"),
        "class_accuracy": (("condition", "class"), accuracy @ by_class, f"the same by class, {chance}"),
        "alone": (
            ("expert", "class"),
            torch.stack(alone).float() @ by_class,
            f"accuracy on a class if every image goes to this expert alone, {chance}",
        ),
        "label": (("image",), labels, "class of each test image"),
        "predicted": (("image",), predict(model, seen.outputs, seen.ids, seen.weights), "predicted class"),
        "expert_id": (("image", "slot"), seen.ids, "experts of each test image"),
        "weight": (("image", "slot"), seen.weights, "their combine weights, 0 ... 1"),
    }
    return {name: Variable(dims, values.cpu().numpy(), "1", said) for name, (dims, values, said) in values.items()}


def _right(model: MoEModel, seen: Seen, labels: Tensor, condition: str, plan: Plan) -> Float[Tensor, " N"]:
    """How often each image is classified right under a condition."""
    hits = [predict(model, *route) == labels for route in _routings(seen, condition, plan)]
    return torch.stack(hits).float().mean(dim=0)


def _routings(seen: Seen, condition: str, plan: Plan) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Outputs of experts, ids and weights of every equally likely routing of a condition."""
    experts = plan.experts
    if condition == "learned":
        yield seen.outputs, seen.ids, seen.weights
    elif condition == "permuted":
        for shift in range(1, experts):
            yield seen.outputs, (seen.ids + shift) % experts, seen.weights
    elif condition == "fresh":
        for number in range(FRESH):
            yield _fresh_outputs(seen, plan, number), seen.ids, seen.weights
    else:
        for draw in _draws(experts, plan.top_k):
            ids = torch.tensor(draw, device=seen.ids.device).expand_as(seen.ids)
            yield seen.outputs, ids, seen.weights


def _draws(experts: int, top_k: int) -> list[tuple[int, ...]]:
    """All ordered draws of K distinct experts, or a seeded sample of them."""
    draws = list(islice(permutations(range(experts), top_k), DRAWS + 1))
    if len(draws) <= DRAWS:
        return draws
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randperm(experts, generator=generator)[:top_k].tolist()) for _ in range(DRAWS)]


def _fresh_outputs(seen: Seen, plan: Plan, number: int) -> Float[Tensor, "N E D"]:
    with seeded(1000 * (number + 1) + plan.seed):
        experts: Experts = Mixture(seen.hidden.shape[1], plan).experts
    experts.to(seen.hidden.device)
    return torch.stack([expert(seen.hidden) for expert in experts], dim=1)


# Probes


def probes(hf: VisionMoE, before: VisionMoE, tensors: Tensors, seed: int) -> dict[str, Variable]:
    """What linear probes of the mixture's input tell about the class, with controls."""
    train_images, test_images, train_labels, test_labels = tensors
    order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))
    kept = order[:PROBED].sort().values.to(train_images.device)  # files may be in the order of their classes
    shuffled = train_labels[torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed))]
    labels, permuted, tests = train_labels[kept].cpu(), shuffled[kept].cpu(), test_labels.cpu()
    learned, untrained = ((_features(one, train_images[kept]), _features(one, test_images)) for one in (hf, before))
    found = [
        probe(learned[0], labels, learned[1], tests),
        probe(untrained[0], labels, untrained[1], tests),
        probe(learned[0], permuted, learned[1], tests),
    ]
    accuracy, information = zip(*found, strict=True)
    return {
        "probe_accuracy": Variable(
            ("probed",), np.array(accuracy), "1", "accuracy of a linear probe on test images, 0 ... 1"
        ),
        "probe_information": Variable(
            ("probed",),
            np.array(information),
            "nats",
            "H(class) - cross-entropy of the probe: at most the information there",
        ),
    }


def _features(hf: VisionMoE, images: Tensor) -> Tensor:
    """On the CPU, where the small problem of a probe, with its many short steps, is solved as fast as anywhere."""
    return torch.cat([hf.trunk(some).cpu() for some in images.split(CHUNK)])


def probe(
    train_inputs: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    test_inputs: Float[Tensor, "M D"],
    test_labels: Int[Tensor, " M"],
) -> tuple[float, float]:
    """Softmax regression with a ridge, fitted on one set and tested on another.

    Returns:
        Accuracy, 0 ... 1, and H(class) minus cross-entropy on the test set, in nats (below 0 where the probe misleads).
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    mean, std = train_inputs.mean(dim=0), train_inputs.std(dim=0) + 1e-6
    inputs, tests = (train_inputs - mean) / std, (test_inputs - mean) / std
    weights = torch.zeros(inputs.shape[1] + 1, classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weights[:-1] + weights[-1], train_labels)
        loss = loss + RIDGE * weights[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        logits = tests @ weights[:-1] + weights[-1]
        accuracy = (logits.argmax(dim=-1) == test_labels).float().mean()
        shares = test_labels.bincount(minlength=classes) / len(test_labels)
        entropy = torch.special.entr(shares).sum()
        return accuracy.item(), (entropy - functional.cross_entropy(logits, test_labels)).item()
