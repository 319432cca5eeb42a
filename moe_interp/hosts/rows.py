"""The rows of a trace's block in what modules are given and return.

Texts of several invokes run in one batch. nnsight cuts values [B, S, ...] down to the rows of a block by itself; values
[B * S, ...] it passes on whole, and they are cut here.
"""

from typing import Any

import torch
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from moe_interp.errors import BadInput

_SEVERAL = ("num_beams", "num_return_sequences")


def texts(value: Tensor) -> Tensor:
    """The rows of the block that asks, as [b, S, ...]: a view of what a module was given or returned."""
    if value.dim() > 2:
        return value  # nnsight has cut it already
    mediator = Mediator.current("the rows of a block")
    batcher, group = mediator.interleaver.batcher, mediator.batch_group
    _check_one_each(batcher)
    if group is None or not batcher.batching:
        return value.view(_batch(batcher), -1, value.shape[-1])
    start, size = group
    if len(value) == size:  # one position a text: nnsight took it for [B, ...]
        return value.view(size, 1, value.shape[-1])
    return value.view(batcher.total, -1, value.shape[-1])[start : start + size]


def _batch(batcher: Any) -> int:
    """How many texts run: nnsight counts prompts, but takes any tensors for one."""
    if len(batcher.invokes) == 1:
        args, kwargs = batcher.invokes[0]
        given = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs), [*args, None][0])
        if isinstance(given, Tensor):
            return len(given) if given.dim() > 1 else 1
    return max(1, batcher.total)


def joined(whole: Tensor, new: Tensor) -> Tensor:
    """What a module is to be given or to return, with the rows of this block replaced."""
    changed = whole.clone(memory_format=torch.contiguous_format)
    texts(changed)[...] = new
    return changed


def argument(raw: Any, number: int) -> Tensor:
    """The ``number``-th of what a module is called with, the hidden states if it has that name."""
    args, kwargs = raw
    if len(args) > number:
        return args[number]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else [*kwargs.values()][number - len(args)]


def with_argument(raw: Any, number: int, value: Any) -> Any:
    """The same call with another value there."""
    args, kwargs = raw
    if len(args) > number:
        return (*args[:number], value, *args[number + 1 :]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else [*kwargs][number - len(args)]
    return args, {**kwargs, name: value}


def _check_one_each(batcher: Any) -> None:
    """Refuse generations that run each text several times, whose rows cannot be told from positions."""
    given = [batcher.extra_kwargs, *(kwargs for _, kwargs in batcher.invokes)]
    more = {name: some[name] for some in given for name in _SEVERAL if (some.get(name) or 1) > 1}
    if more:
        raise BadInput(
            "texts cannot be told apart in a generation of several for each",
            expected="one beam and one sequence for each text",
            got=", ".join(f"{name}={value}" for name, value in more.items()),
            do="Repeat the text, or use a model in this process.",
        )
