"""Random numbers that depend on the seed and on whose they are alone: layer, expert, and the text up to the token.

So a token gets the same ones alone or in a batch, whatever else is in it, in a whole pass or step by step with a cache,
and on any device; and other texts get others. They are the output of SplitMix64's finaliser (Steele, Lea and Flood
2014, "Fast splittable pseudorandom number generators").
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # as signed 64-bit integers


def uniform(seed: int, *whose: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Numbers from 0 to below 1 in float64, one for each combination of the given integers, which broadcast."""
    state = torch.as_tensor(seed, dtype=torch.int64)
    for number in whose:
        state = _mixed(state.to(number.device) + _GOLDEN * (number.long() + 1))
    return (_shifted(state, 11)).double() * 2.0**-53


def normal(seed: int, *whose: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard normal numbers in float64 (Box and Muller 1958)."""
    first, second = (uniform(seed, *whose, torch.tensor(half, device=whose[0].device)) for half in (0, 1))
    return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)


def prefixes(ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"], index: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """A number for each token that stands for its text up to it: a sum over ids and their places, modulo 2^64."""
    each = _mixed(_mixed(ids.long() + _GOLDEN) + _GOLDEN * (index.long() + 1))
    return torch.where(mask, each, 0).cumsum(dim=1)


def _mixed(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, by: int) -> Tensor:
    """Shifted right with zeros coming in; torch's own shift repeats the sign."""
    return (state >> by) & ((1 << (64 - by)) - 1)
