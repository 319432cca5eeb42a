"""Causal tracing: where a fact passes through single experts (Meng et al. 2022, arXiv 2202.05262, section 2).

1. A clean run of a prompt gives an answer some probability.
2. In the corrupted run the embeddings of the subject's tokens have Gaussian noise, and the probability falls.
3. The corrupted run with one thing restored, as it was in the clean run: what of the probability comes back? Here an
   expert's contribution, and as a control the whole mixture's (``routed_out``, ``moe_out``) and the whole residual
   (``resid_post``) of the layer.

Noise is drawn several times; samples are the unit of the intervals, which say nothing of other prompts.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from moe_interp.analyses.answers import answer_ids
from moe_interp.analyses.effects import contribution
from moe_interp.analyses.inputs import moe_layers
from moe_interp.analyses.metrics import Bound, Probability
from moe_interp.analyses.patching import experts_that_run
from moe_interp.analyses.plain import check_writes_text
from moe_interp.analyses.trials import BOUNDS, Trial, differs, effects
from moe_interp.arguments import Count, Draws, Positive, Seed, checked
from moe_interp.encode import Inputs, token_text
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.interventions import Intervention, named
from moe_interp.measured import inputs_told
from moe_interp.model import MoEModel
from moe_interp.restart import Restart
from moe_interp.results import Variable, labelled
from moe_interp.run import Indices, Run, positions_of
from moe_interp.stats import student_interval

CONTROLS = ("routed_out", "moe_out", "resid_post")
_VOCABULARY = 4096  # how many ids the spread of embeddings is taken from, at most


@checked
@torch.no_grad()
def causal_trace(
    model: MoEModel,
    prompt: Inputs,
    subject: str | Indices,
    answer: int | str,
    *,
    noise: Positive | None = None,
    samples: Draws = 10,
    seed: Seed = 0,
    at: Literal["all", "each"] = "all",
    layers: Indices = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Restore single experts in a run whose subject is noised, and measure the answer's probability after the prompt.

    Args:
        model: a causal language model with a token embedding.
        prompt: one text, or its token ids.
        subject: the part of the text to noise (it must occur once; every token that holds some of it counts), or
            positions of real tokens, negative ones from the end.
        answer: an id, or the text of exactly one token.
        noise: its standard deviation (None: three times that of the embeddings of the vocabulary).
        samples: how often noise is drawn.
        seed: of the noise.
        at: restore at "all" positions at once, or at "each" alone.
        layers: MoE layers (None: all).
        batch_tokens: the most tokens in one pass.

    Returns:
        Dims sample, layer, expert, point (of the controls: "routed_out", "moe_out", "resid_post"), position (of the
        prompt's tokens), bound (low, high). What is restored has the dim position with ``at="each"`` alone.

        ``clean`` (one number), ``corrupted`` (sample): the answer's probability, 0 ... 1; ``total`` (sample): their
        difference.
        ``effect`` (sample, layer, expert): its probability with the expert restored less that of the corrupted run with
        the same noise, -1 ... 1; 0 exactly where there is nothing to restore. ``control`` (sample, layer, point):
        likewise. Each with ``_mean`` over samples and ``_interval``: 95 %, Student's over samples, NaN for one.
        ``token_id``, ``token``, ``noised`` (1 for tokens of the subject): of the prompt.

    Raises:
        BadInput: several prompts, a subject that does not occur just once, no such position, an answer that is not one
            token, an option out of range.
        UnknownName: a layer that is no MoE layer.
        UnsupportedModel: a model that does not predict the next token, or without a token embedding.
    """
    check_writes_text(model)
    chosen, ids = moe_layers(model, layers), tuple(answer_ids(model, answer).tolist())
    inputs = _one_prompt(model, prompt)
    where, std = _positions(model, prompt, subject, inputs), _std(model, noise)
    trace = _traced(model, inputs, partial(noises, std, where, samples, seed), samples, ids, at)
    points = [point for point in CONTROLS if point in model.points]
    most = max(experts_that_run(model, layer) for layer in chosen)

    def restored(trials: Callable[..., Iterator[Trial]], count: int, dim: str, name: str) -> dict[str, Variable]:
        groups = (trials(trace, number, layer) for number, layer in enumerate(chosen))
        shape = (len(chosen), count, *[trace.length] * (at == "each"))
        found = effects(
            trace.restart, trace.bound, trace.corrupted, groups, shape, batch_tokens=batch_tokens, name=name
        )
        return _over_samples(name, ("layer", dim, *["position"] * (at == "each")), found.effects, f"{dim} restored")

    total = float(trace.clean_value) - trace.corrupted.numpy()
    text = trace.clean.token_ids[trace.clean.mask].tolist()  # type: ignore[index]
    marked = trace.clean.tokens.at(where)[trace.clean.mask].int().cpu().numpy().astype("int8")
    variables = {
        "clean": Variable((), trace.clean_value.numpy(), "1", "probability of the answer in the clean run"),
        "corrupted": Variable(("sample",), trace.corrupted.numpy(), "1", "probability of the answer with the noise"),
        **_over_samples("total", (), total, "clean less corrupted: all that there is to restore"),
        **restored(_experts, most, "expert", "effect"),
        **restored(partial(_controls, points=points), len(points), "point", "control"),
        "token_id": Variable(("position",), text, "id", "the prompt's tokens"),
        "token": Variable(("position",), [token_text(model.tokenizer, one) for one in text], "text", "their texts"),
        "noised": Variable(("position",), marked, "1", "1 for tokens whose embedding is noised, else 0"),
    }
    coords: dict[str, list] = {
        "layer": list(chosen), "expert": list(range(most)), "point": points, "position": list(range(trace.length)),
        "bound": list(BOUNDS),
    }  # fmt: skip
    provenance = {
        **model.provenance(), **inputs_told(prompt=prompt, subject=subject), "answer": ids[0], "noise": std,
        "samples": samples, "seed": seed, "at": at,
    }  # fmt: skip
    return labelled(variables, coords, analysis="causal_trace", provenance=provenance)


class _Trace(NamedTuple):
    """A clean run of the prompt alone, the corrupted run of all samples, and the answer's probability in both.

    Attributes:
        places: where to restore, each alone: positions, or None for all at once.
        length: tokens of the prompt.
    """

    restart: Restart
    clean: Run
    bound: Bound
    clean_value: Float[Tensor, ""]
    corrupted: Float[Tensor, " B"]
    places: tuple[int | None, ...]
    length: int


def noises(std: float, positions: Sequence[int], samples: int, seed: int, length: int) -> list[Intervention]:
    """Noise for each of so many copies of a prompt, of a seed of its own: draws follow the text, which is one."""
    seeds = np.random.default_rng(seed).integers(2**63, size=samples).tolist()
    copies = torch.eye(samples, dtype=torch.bool)[:, :, None].expand(-1, -1, length)
    return [
        named.noise(std, positions=positions, seed=own, tokens=marks) for own, marks in zip(seeds, copies, strict=True)
    ]


def _traced(
    model: MoEModel,
    inputs: Mapping[str, Any],
    noise: Callable[[int], list[Intervention]],
    samples: int,
    answer: tuple[int, ...],
    at: str,
) -> _Trace:
    read = ["expert_out", *(point for point in CONTROLS if point in model.points)]
    clean = model.run(inputs, read=read)
    metric, length = Probability(answer), int(clean.mask.sum())
    copies = {key: _repeated(value, samples) for key, value in inputs.items()}
    restart = Restart(model, copies, edit=noise(length), read=read)
    bound = metric.bind(restart.base)
    places = (None,) if at == "all" else tuple(range(length))
    return _Trace(restart, clean, bound, metric.bind(clean).of(clean)[0], bound.of(restart.base), places, length)


def _repeated(value: Any, samples: int) -> Any:
    one = isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1
    return value.repeat(samples, *[1] * (value.dim() - 1)) if one else value


def _experts(trace: _Trace, number: int, layer: int) -> Iterator[Trial]:
    for expert in range(experts_that_run(trace.restart.model, layer)):
        base, clean = (contribution(run, layer, expert) for run in (trace.restart.base, trace.clean))
        where = differs(base, clean, trace.restart.tokens)
        yield from _restoring(trace, (number, expert), where, partial(named.patch, layer=layer, expert=expert))


def _controls(trace: _Trace, number: int, layer: int, *, points: list[str]) -> Iterator[Trial]:
    for place, point in enumerate(points):
        where = differs(trace.restart.base[point, layer], trace.clean[point, layer], trace.restart.tokens)
        yield from _restoring(trace, (number, place), where, partial(named.patch, layer=layer, point=point))


def _restoring(
    trace: _Trace, place: tuple[int, int], where: Bool[Tensor, "B S"], edit: Callable[[Run], Intervention]
) -> Iterator[Trial]:
    whole: Any = edit(trace.clean) if bool(where.any()) else None
    for position in trace.places:
        if position is None:
            yield Trial(place, where, partial(list, [whole]))
        else:
            here = where & trace.restart.tokens.at((position,))
            yield Trial((*place, position), here, partial(_at, whole, position))


def _at(whole: Any, position: int) -> list[Intervention]:
    return [dataclasses.replace(whole, positions=(position,))]


def _over_samples(name: str, dims: tuple[str, ...], values: np.ndarray, meaning: str) -> dict[str, Variable]:
    ends = np.moveaxis(student_interval(values), 0, -1)
    meaning = f"probability of the answer, -1 ... 1: {meaning}"
    return {
        name: Variable(("sample", *dims), values, "1", meaning),
        f"{name}_mean": Variable(dims, values.mean(axis=0), "1", f"{meaning}; mean over samples of the noise"),
        f"{name}_interval": Variable((*dims, "bound"), ends, "1", f"of {name}_mean: 95 %, Student's over samples"),
    }


# ---- the prompt --------------------------------------------------------------------------------------------


def _one_prompt(model: MoEModel, prompt: Inputs) -> dict[str, Any]:
    inputs = model.encode(prompt)
    rows = len(inputs["input_ids"]) if "input_ids" in inputs else 0
    if rows != 1:
        raise BadInput("not one prompt", expected="one text, or its token ids", got=f"{rows} texts")
    return inputs


def _positions(model: MoEModel, prompt: Inputs, subject: str | Indices, inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """Positions of the tokens to noise."""
    if not isinstance(subject, str):
        found = positions_of(subject)
        if found is None:
            raise BadInput("no subject", expected="a part of the prompt, or positions", got="None")
        return found
    if not isinstance(prompt, str):
        raise BadInput("a subject in no text", expected="a prompt that is text, or positions", got=repr(subject))
    if not subject or prompt.count(subject) != 1:
        raise BadInput(
            f"the subject {subject!r} is not to be found",
            expected="a part of the prompt that occurs once",
            got=f"{prompt.count(subject) if subject else 'no letter'} in {prompt!r}",
            do="Give positions of its tokens.",
        )
    begin = prompt.index(subject)
    return tuple(
        number
        for number, (low, high) in enumerate(_offsets(model, prompt, inputs["input_ids"][0].tolist()))
        if low < begin + len(subject) and high > begin
    )


def _offsets(model: MoEModel, prompt: str, ids: list[int]) -> list[tuple[int, int]]:
    """Where each token's characters begin and end: as a fast tokenizer says, else by decoding more and more tokens.

    Raises:
        BadInput: decoded tokens are not the prompt.
    """
    if getattr(model.tokenizer, "is_fast", False):
        return [tuple(pair) for pair in model.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]]
    ends = [len(model.tokenizer.decode(ids[: count + 1], skip_special_tokens=True)) for count in range(len(ids))]
    if model.tokenizer.decode(ids, skip_special_tokens=True) != prompt:
        raise BadInput(
            "cannot tell which tokens hold the subject",
            expected="a tokenizer that gives offsets, or decodes to the prompt",
            got="neither",
            do="Give positions of its tokens.",
        )
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _std(model: MoEModel, noise: float | None) -> float:
    """The standard deviation of the noise; by default three times that of embeddings, as in the paper."""
    if model.spec.embed is None:
        raise UnsupportedModel("no embedding to noise", expected="a token embedding", got=model.spec.model_type)
    if noise is not None:
        return float(noise)
    ids = torch.arange(0, model.spec.vocab_size, max(1, model.spec.vocab_size // _VOCABULARY), device=model.device)
    return 3 * float(model.hf.get_submodule(model.spec.embed)(ids).float().std())
