"""The vision study: which trials, run one after the other or side by side, one labelled file a trial.

`moe_interp.zoo.vision_trial` makes a trial; `moe_interp.analyses.class_routing` and `moe_interp.analyses.specialists`
make results of them.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from threading import Thread
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from moe_interp.analyses.class_routing import class_routing, matched_trials
from moe_interp.analyses.specialists import Findings, accuracies, depth, probed
from moe_interp.errors import BadData, BadInput, BadOutput
from moe_interp.results import load, provenance_of, save
from moe_interp.zoo.vision import Plan, steps_per_epoch
from moe_interp.zoo.vision_images import Images
from moe_interp.zoo.vision_trial import Identity, Tensors, trial


@dataclass(frozen=True)
class Study:
    """Which trials; the defaults are the paper's study, with the short trunk and the dense controls.

    Attributes:
        name: "full", or what the results must be called.
        experts: expert counts.
        trials: of each kind that `plans` names and each expert count, with seeds 0, 1, ...
        scored: so many, at most, of the kind scored-E, which but shows that one expert takes everything.
        plan: of every trial, but for what differs.
        train, test: so many images (None: all).
    """

    name: str = "full"
    experts: tuple[int, ...] = (2, 3, 5)
    trials: int = 10
    scored: int = 3
    plan: Plan = field(default_factory=Plan)
    train: int | None = None
    test: int | None = None

    def __post_init__(self) -> None:
        if self.trials < 1 or not self.experts or min(self.experts) < 2 or len(set(self.experts)) < len(self.experts):
            raise BadInput(
                "not a study",
                expected="at least one trial, and different counts of two experts or more",
                got=f"{self.trials} trials, {self.experts} experts",
            )

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
                if seed < self.scored:
                    yield f"scored-{count}-{seed:02}", replace(plan, experts=count, renormalise=False)


STUDIES = {
    "full": Study(plan=Plan(precision="bfloat16")),
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
        workers: so many trials at a time, in processes of their own, each with as many threads as torch has here.
        quiet: no progress bar.

    Returns:
        The trials by kind and expert count ("base-3"), in the order of their seeds.

    Raises:
        BadData: the folder holds a trial of another plan or other images, or a file that is none; nothing is trained
            then.
        BadInput: no workers, no such device, or a worker that ended (out of memory, say).
        BadOutput: it cannot be written.
    """
    if workers < 1:
        raise BadInput("no study without workers", expected="at least one", got=str(workers))
    check_device(device)
    _make(folder)
    jobs = [_Job(name, plan, folder / f"{name}.nc", _identity(study, plan, images)) for name, plan in study.plans()]
    there = {job.name: _finished(job, images) for job in jobs if job.path.exists()}
    missing = [job for job in jobs if job.name not in there]
    steps = {job.name: job.plan.epochs * steps_per_epoch(len(images.train), job.plan) for job in jobs}
    done = sum(steps[name] for name in there)
    with tqdm(total=sum(steps.values()), initial=done, unit="step", smoothing=0.01, disable=quiet) as bar:
        if workers > 1 and len(missing) > 1:
            for job in _made_by(workers, images, device, missing):
                bar.update(steps[job.name])
        elif missing:
            tensors = _tensors(images, device)
            for job in missing:
                bar.set_description(job.name)
                save(trial(images, tensors, job.plan, job.identity, bar.update), job.path)
    found: dict[str, list[xr.Dataset]] = {}
    for job in jobs:
        found.setdefault(job.name.rpartition("-")[0], []).append(
            there[job.name] if job.name in there else load(job.path)
        )
    return found


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
        "images_sha256": images.digest,
    }


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadOutput(
            f"cannot make {folder}", expected="a folder, or a place to make one", got=error.strerror or str(error)
        ) from error


def check_device(device: torch.device | str) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        BadInput: it is not there, or torch does not know it.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            "no such device", expected="cpu, or cuda where torch has it", got=f"{device} ({str(error).splitlines()[0]})"
        ) from error


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
    signal(SIGINT, SIG_IGN)  # who started it decides when it ends,
    Thread(target=_end_with_parent, daemon=True).start()  # also by being killed
    torch.set_num_threads(threads)
    images = _unpacked(packed)
    _worker.append((images, _tensors(images, device)))


def _end_with_parent() -> None:
    """Trials are written whole, so that a worker may end at any time; left alone, it would wait for work for ever."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(job: _Job) -> _Job:
    ((images, tensors),) = _worker
    save(trial(images, tensors, job.plan, job.identity), job.path)
    return job


def _finished(job: _Job, images: Images) -> xr.Dataset:
    """The trial in a job's file, if that is what it is."""
    found = _read(job.path)
    there = provenance_of(found)
    if "images_sha256" not in there:  # from before digests were kept: its labels are held to these images all the same
        there["images_sha256"] = job.identity["images_sha256"]
    if other := {key: there.get(key) for key, value in job.identity.items() if there.get(key) != value}:
        expected, got = str({key: job.identity[key] for key in other}), str(other)
    elif not np.array_equal(found["label"].values, images.test_labels):
        expected, got = "the labels of these test images, in this order", "other labels"
    else:
        return found
    raise BadData(
        f"{job.path} is a trial of another study",
        expected=expected,
        got=got,
        do="Name another folder, or remove the file.",
    )


def read_study(folder: Path) -> dict[str, list[xr.Dataset]]:
    """The trials in a folder as `run_study` returns them, with no need of the images they were made from.

    Of a study that was cut short, the seeds that all kinds have; of the kind scored-E, which may have fewer, its own.

    Raises:
        BadData: no whole trial of a study there, a file that is none, or trials of two studies.
    """
    found: dict[str, dict[str, xr.Dataset]] = {}
    for path in sorted(folder.glob("*-*-*.nc")):
        kind, _, seed = path.stem.rpartition("-")
        found.setdefault(kind, {})[seed] = _read(path)
    seeds = [trials.keys() for kind, trials in found.items() if not kind.startswith("scored")]
    whole = set(seeds[0]).intersection(*seeds) if seeds else set()
    if not whole or not _expert_counts(found):
        raise BadData(
            f"no study in {folder}", expected="a file a trial (base-2-00.nc, ...)", got=f"trials of {sorted(found)}"
        )
    _check_one_study(folder, [trial for trials in found.values() for trial in trials.values()])
    return {kind: [trials[seed] for seed in sorted(trials) if seed in whole] for kind, trials in found.items()}


_VARIED = {"experts", "top_k", "depth", "neurons", "random", "renormalise", "seed"}  # by `Study.plans`


def _check_one_study(folder: Path, trials: list[xr.Dataset]) -> None:
    same = {"study", "images", "train_images", "test_images"} | {one.name for one in fields(Plan)} - _VARIED
    settings = {tuple((key, provenance_of(trial).get(key)) for key in sorted(same)) for trial in trials}
    if len(settings) > 1:
        differ = sorted({key for one in settings for other in settings for key, _ in set(one) - set(other)})
        raise BadData(
            f"trials of several studies in {folder}", expected="one study", got=f"different {', '.join(differ)}"
        )


def _read(path: Path) -> xr.Dataset:
    try:
        found = load(path)
        provenance_of(found), found["label"]
    except (BadData, KeyError) as error:
        raise BadData(
            f"{path} is no trial of a study",
            expected="one that was written whole",
            got=str(error),
            do="Remove it: it is made again.",
        ) from error
    return found


def _expert_counts(found: Iterable[str]) -> list[int]:
    return sorted(int(kind.removeprefix("base-")) for kind in found if kind.startswith("base-"))


def findings(found: dict[str, list[xr.Dataset]], images: Images | None = None) -> Findings:
    """All experiments on the trials of a study; with images, test images by the expert they went to in the first trial.

    Raises:
        BadInput: trials of some kind are missing, or there are more of one kind than of another.
    """
    experts = _expert_counts(found)
    kinds = ["dense-1", *(f"{kind}-{count}" for count in experts for kind in ("base", "short", "dense", "random"))]
    if missing := [kind for kind in kinds if kind not in found]:
        raise BadInput("a study lacks trials", expected=f"trials of {', '.join(kinds)}", got=f"none of {missing}")
    base, short = ({count: found[f"{trunk}-{count}"] for count in experts} for trunk in ("base", "short"))
    by_trunk = {count: {"base": base[count], "short": short[count]} for count in experts}
    return Findings(
        name=f"{provenance_of(found['dense-1'][0])['study']} study",
        accuracies=accuracies(
            base,
            trained_random={count: found[f"random-{count}"] for count in experts},
            dense_one=found["dense-1"],
            dense_total={count: found[f"dense-{count}"] for count in experts},
        ),
        routing={count: class_routing(trials) for count, trials in base.items()},
        short_routing={count: class_routing(trials) for count, trials in short.items()},
        depth={count: depth(trials) for count, trials in by_trunk.items()},
        probed={count: probed(trials) for count, trials in by_trunk.items()},
        samples={} if images is None else _samples(images, base),
    )


def _samples(images: Images, base: dict[int, list[xr.Dataset]]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    pictures = images.test.numpy() if images.test.shape[1] == 3 else images.test.numpy().repeat(3, axis=1)
    return {count: (pictures, matched_trials(trials)[1][0, :, 0]) for count, trials in base.items()}
