"""Trials of the vision mixture: train, measure, keep one labelled file a trial.

`moe_interp.analyses.class_routing` and `moe_interp.analyses.specialists` make results of them.

A trial is measured on the test images, through the points of the opened model. The trunk runs once; every expert's
output on every image (``model.experts``) then gives what each routing would have predicted (``model.decode``):

- *learned*: as the router chose.
- *random*: K distinct experts drawn uniformly, the learned weights' values kept. Not sampled: the mean over all ordered
  draws, or over 120 of them where there are more.
- *permuted*: every expert in the place of another, the mean over the E - 1 cyclic shifts, which with K = 1 give each
  image every wrong expert once; random routing is this in (E - 1) / E of the draws and the learned one in the others.
- *fresh*: experts as before training, the floor. The mean over `FRESH` initialisations.

The other reading of "random router" is a model that was trained with one: trials of their own, random-E below.

Linear probes (softmax regression, ridge, by L-BFGS) of the mixture's input say how much of the class it tells: their
accuracy, and H(class) minus their cross-entropy on the test images, a lower bound in nats on what the input tells
(Barber & Agakov 2003). Controls: the same trunk before training (in eval mode: its batch norms do nothing), and
permuted labels.
"""

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice, permutations
from multiprocessing import active_children, get_context
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from moe_interp.analyses.class_routing import class_routing, matched_trials
from moe_interp.analyses.specialists import accuracies, depth, probed
from moe_interp.errors import BadData, BadInput
from moe_interp.model import MoEModel
from moe_interp.opening import wrap
from moe_interp.results import Variable, labelled, load, provenance_of, save
from moe_interp.views.specialists import Findings
from moe_interp.zoo.vision import Experts, Mixture, Plan, VisionMoE, seeded, steps_per_epoch, train
from moe_interp.zoo.vision_images import Images

CONDITIONS = ("learned", "random", "permuted", "fresh")
PROBES = ("mixture's input", "untrained trunk", "permuted labels")
DRAWS, FRESH, CHUNK = 120, 5, 1000
PROBED = 10_000  # training images that probes are fitted on
RIDGE = 1e-3


@dataclass(frozen=True)
class Study:
    """Which trials; the defaults are the paper's study, with the short trunk and the dense controls.

    Attributes:
        name: "full", or what the results must be called.
        experts: expert counts.
        trials: of each kind that `plans` names and each expert count, with seeds 0, 1, ...
        plan: of every trial, but for what differs.
        train, test: so many images (None: all).
    """

    name: str = "full"
    experts: tuple[int, ...] = (2, 3, 5)
    trials: int = 10
    plan: Plan = field(default_factory=Plan)
    train: int | None = None
    test: int | None = None

    def plans(self) -> Iterator[tuple[str, Plan]]:
        """Every trial by name, a seed after the other, so that a study cut short has all kinds.

        base-E and short-E are mixtures of E experts, random-E is base-E with random routing in training too, scored-E
        base-E with scores for weights, as in Switch, dense-E a dense model as large as E experts together.
        """
        for seed in range(self.trials):
            plan = replace(self.plan, seed=seed)
            yield f"dense-1-{seed:02}", replace(plan, experts=1, top_k=1)
            for count in self.experts:
                yield f"base-{count}-{seed:02}", replace(plan, experts=count)
                yield f"short-{count}-{seed:02}", replace(plan, experts=count, depth="short")
                yield f"dense-{count}-{seed:02}", replace(plan, experts=1, top_k=1, neurons=count * plan.neurons)
                yield f"random-{count}-{seed:02}", replace(plan, experts=count, random=True)
                yield f"scored-{count}-{seed:02}", replace(plan, experts=count, renormalise=False)


STUDIES = {
    "full": Study(),
    "medium": Study("medium", trials=5, plan=Plan(width=16, neurons=64, epochs=8), train=10_000, test=5_000),
    "small": Study("small", trials=3, plan=Plan(width=16, neurons=64, epochs=4), train=8_000, test=5_000),
    "digits": Study("digits", trials=3, plan=Plan(width=12, neurons=48, epochs=4)),
}


def run_study(
    study: Study,
    images: Images,
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    workers: int = 1,
    quiet: bool = False,
) -> dict[str, list[xr.Dataset]]:
    """Train and measure every trial that the folder does not hold yet.

    Args:
        images: what to train on; see `read_images`, which is to be given the study's counts.
        folder: one netCDF file a trial, written whole; made if missing.
        workers: so many trials at a time, in processes of their own.
        quiet: no progress bar.

    Returns:
        The trials by kind and expert count ("base-3"), in the order of their seeds.

    Raises:
        BadData: the folder holds a trial of another plan or other images; nothing is trained then.
        BadInput: no workers, or a worker that ended (out of memory, say).
        BadOutput: it cannot be written.
    """
    if workers < 1:
        raise BadInput("no study without workers", expected="at least one", got=str(workers))
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [_Job(name, plan, folder / f"{name}.nc", _identity(study, plan, images)) for name, plan in study.plans()]
    there = {job.name: _same(load(job.path), job.identity, job.path) for job in jobs if job.path.exists()}
    missing = [job for job in jobs if job.name not in there]
    steps = {job.name: job.plan.epochs * steps_per_epoch(len(images.train), job.plan) for job in jobs}
    with tqdm(total=sum(steps.values()), unit="step", smoothing=0.01, disable=quiet) as bar:
        bar.update(sum(steps[name] for name in there))
        if workers > 1 and len(missing) > 1:
            for job in _made_by(workers, images, device, missing):
                bar.update(steps[job.name])
        elif missing:
            tensors = _tensors(images, device)
            for job in missing:
                bar.set_description(job.name)
                save(trial(images, tensors, job.plan, job.identity, bar), job.path)
    found: dict[str, list[xr.Dataset]] = {}
    for job in jobs:
        found.setdefault(job.name.rpartition("-")[0], []).append(
            there[job.name] if job.name in there else load(job.path)
        )
    return found


Identity = dict[str, str | int | float]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Job:
    name: str
    plan: Plan
    path: Path
    identity: Identity


def _identity(study: Study, plan: Plan, images: Images) -> Identity:
    return asdict(plan) | {
        "study": study.name,
        "images": images.name,
        "train_images": len(images.train),
        "test_images": len(images.test),
    }


def _tensors(images: Images, device: torch.device | str) -> Tensors:
    return (*images.normalised(device), images.train_labels.to(device), images.test_labels.to(device))


# Trials side by side, each process with the images of its own


def _made_by(workers: int, images: Images, device: torch.device | str, jobs: list[_Job]) -> Iterator[_Job]:
    """Jobs as they are done, in processes that start afresh, as CUDA asks. An error or interrupt ends them at once."""
    before, waiting = set(active_children()), iter(jobs)
    given = (_packed(images), device, torch.get_num_threads())
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), _start_worker, given)
    try:
        running = {pool.submit(_work, job) for job in islice(waiting, workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from [one.result() for one in done]
            running |= {pool.submit(_work, job) for job in islice(waiting, len(done))}
    except BrokenProcessPool as error:
        raise BadInput(
            "a process of the study ended",
            expected=f"memory for {workers} trials at a time, on the device too",
            got=str(error),
            do="Use fewer workers; the trials that are done are kept.",
        ) from error
    finally:
        for process in set(active_children()) - before:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _packed(images: Images) -> dict[str, Any]:
    """As arrays: tensors would be handed over in shared memory, of which containers have little."""
    values = {one.name: getattr(images, one.name) for one in fields(images)}
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in values.items()}


def _unpacked(packed: dict[str, Any]) -> Images:
    arrays = {name: torch.from_numpy(value) for name, value in packed.items() if isinstance(value, np.ndarray)}
    return Images(**packed | arrays)


_worker: list[tuple[Images, Tensors]] = []


def _start_worker(packed: dict[str, Any], device: torch.device | str, threads: int) -> None:
    signal(SIGINT, SIG_IGN)  # who started it decides when it ends
    torch.set_num_threads(threads)
    images = _unpacked(packed)
    _worker.append((images, _tensors(images, device)))


def _work(job: _Job) -> _Job:
    ((images, tensors),) = _worker
    save(trial(images, tensors, job.plan, job.identity), job.path)
    return job


def _same(found: xr.Dataset, identity: Identity, path: Path) -> xr.Dataset:
    there = provenance_of(found)
    if other := {key: there.get(key) for key, value in identity.items() if there.get(key) != value}:
        raise BadData(
            f"{path} is a trial of another study",
            expected=str({key: identity[key] for key in other}),
            got=str(other),
            do="Name another folder, or remove the file.",
        )
    return found


def trial(images: Images, tensors: Tensors, plan: Plan, identity: Identity, bar: tqdm | None = None) -> xr.Dataset:
    """Train one model and measure it.

    Args:
        images: for their classes.
        tensors: training and test images, normalised, and their labels, on one device.
        plan: of the trial.
        identity: goes into the provenance.
        bar: is moved on by every step.
    """
    train_images, test_images, train_labels, test_labels = tensors
    channels, size = images.train.shape[1:3]
    hf = VisionMoE(channels, size, len(images.classes), plan).to(train_images.device)
    hf.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = train(hf, train_images, train_labels, plan, bar.update if bar is not None else lambda: None)
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
    }
    variables["group"] = Variable(("class",), list(images.groups), "1", "a split that experts may follow")
    return labelled(variables, coords, analysis="vision trial", provenance=provenance)


def findings(study: Study, found: dict[str, list[xr.Dataset]], images: Images) -> Findings:
    """All experiments on the trials of a study, and test images by the expert that took them in the first trial."""
    base, short = ({count: found[f"{trunk}-{count}"] for count in study.experts} for trunk in ("base", "short"))
    pictures = images.test.numpy() if images.test.shape[1] == 3 else images.test.numpy().repeat(3, axis=1)
    by_trunk = {count: {"base": base[count], "short": short[count]} for count in study.experts}
    return Findings(
        name=f"{study.name} study",
        accuracies=accuracies(
            base,
            trained_random={count: found[f"random-{count}"] for count in study.experts},
            dense_one=found["dense-1"],
            dense_total={count: found[f"dense-{count}"] for count in study.experts},
        ),
        routing={count: class_routing(trials) for count, trials in base.items()},
        short_routing={count: class_routing(trials) for count, trials in short.items()},
        depth={count: depth(trials) for count, trials in by_trunk.items()},
        probed={count: probed(trials) for count, trials in by_trunk.items()},
        samples={count: (pictures, matched_trials(trials)[1][0, :, 0]) for count, trials in base.items()},
    )


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
    inputs = [_features(hf, train_images[kept]), _features(hf, test_images)]
    untrained = [_features(before, train_images[kept]), _features(before, test_images)]
    found = [
        probe(inputs[0], train_labels[kept], inputs[1], test_labels),
        probe(untrained[0], train_labels[kept], untrained[1], test_labels),
        probe(inputs[0], shuffled.to(train_labels.device)[kept], inputs[1], test_labels),
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
    return torch.cat([hf.trunk(some) for some in images.split(CHUNK)])


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
