"""How the parts of a layer add up, as data: steps on the way, and the ways in which a branch joins the residual stream.

In most architectures the residual is the plain sum of what the branches return. In others a norm, a factor, a learned
gate, a short convolution or several parallel streams come between. An adapter says so with the classes of this module;
``model.audit()`` evaluates them and holds them against what the model computed. Module paths are those of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_interp.adapters.formats import in_memory


@dataclass(frozen=True)
class Through:
    """A module applied to the value: a norm, a projection, a short convolution."""

    module: str

    def __call__(self, hf: nn.Module, value: Tensor) -> Tensor:
        """The module's result."""
        return hf.get_submodule(self.module)(value)


@dataclass(frozen=True)
class Times:
    """Multiplied by a number, or elementwise by a parameter or buffer of the model."""

    factor: float | str

    def __call__(self, hf: nn.Module, value: Tensor) -> Tensor:
        """The product."""
        return value * (tensor(hf, self.factor) if isinstance(self.factor, str) else self.factor)


@dataclass(frozen=True)
class Plus:
    """A parameter of the model added."""

    parameter: str

    def __call__(self, hf: nn.Module, value: Tensor) -> Tensor:
        """The sum."""
        return value + tensor(hf, self.parameter)


@dataclass(frozen=True)
class Repeat:
    """One value into R parallel streams: [B, S, D] to [B, S, R, D]."""

    streams: int

    def __call__(self, hf: nn.Module, value: Tensor) -> Tensor:
        """The streams, all equal."""
        return value.unsqueeze(-2).expand(*value.shape[:-1], self.streams, value.shape[-1])


@dataclass(frozen=True)
class Flatten:
    """Parallel streams side by side: [B, S, R, D] to [B, S, R*D], as some modules take them."""

    def __call__(self, hf: nn.Module, value: Tensor) -> Tensor:
        """The flat value."""
        return value.flatten(-2)


Step = Through | Times | Plus | Repeat | Flatten


def follow(hf: nn.Module, steps: Sequence[Step], value: Tensor) -> Tensor:
    """The value after all steps."""
    for step in steps:
        value = step(hf, value)
    return value


def change_nothing(steps: Sequence[Step]) -> bool:
    """Whether these steps leave every value as it is."""
    return all(isinstance(step, Times) and step.factor == 1.0 for step in steps)


def tensor(hf: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    path, _, name = path.rpartition(".")
    owner = hf.get_submodule(path)
    with in_memory(owner, inner=False):
        return getattr(owner, name)


def weighted_sum(
    outputs: Float[Tensor, "TK D"], weights: Float[Tensor, "T K"], dtype: torch.dtype
) -> Float[Tensor, "T D"]:
    """The sum over slots of weight times output, in the order and precision of ``grouped_mm``."""
    weighted = outputs * weights.reshape(-1, 1)
    return weighted.view(*weights.shape, -1).sum(dim=1).to(dtype)


@dataclass(frozen=True)
class Sum:
    """``whole(residual_steps(residual) + branch_steps(branch))``; without steps, the plain sum."""

    branch: tuple[Step, ...] = ()
    residual: tuple[Step, ...] = ()
    whole: tuple[Step, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is the plain sum."""
        return all(map(change_nothing, (self.branch, self.residual, self.whole)))

    def __call__(self, hf: nn.Module, residual: Tensor, branch: Tensor) -> Tensor:
        """The residual stream after the branch."""
        return follow(hf, self.whole, follow(hf, self.residual, residual) + follow(hf, self.branch, branch))


@dataclass(frozen=True)
class Gate:
    """A module of the model that takes residual and branch and returns the residual stream.

    ``steps`` come before it on the branch; ``branch_first`` is the order of its arguments.
    """

    module: str
    branch_first: bool
    steps: tuple[Step, ...] = ()

    def __call__(self, hf: nn.Module, residual: Tensor, branch: Tensor) -> Tensor:
        """The residual stream after the branch."""
        gate: Any = hf.get_submodule(self.module)
        branch = follow(hf, self.steps, branch)
        return gate(branch, residual) if self.branch_first else gate(residual, branch)


@dataclass(frozen=True)
class Streams:
    """Hyper-connections (arXiv 2409.19606; manifold-constrained in DeepSeek-V4): R residual streams [B, S, R, D].

    A module computes from the streams how the branch is spread over them (``post``) and how they are mixed
    (``comb``). ``form``: "mixed" returns (post, comb, input), "spread" (post, input), "flat" (input, streams, post)
    and works on streams side by side.
    """

    module: str
    form: Literal["mixed", "spread", "flat"]

    def __call__(self, hf: nn.Module, residual: Tensor, branch: Tensor) -> Tensor:
        """The streams after the branch."""
        connection: Any = hf.get_submodule(self.module)
        if self.form == "flat":
            post = connection(residual.flatten(-2))[2]
            return residual + post.unsqueeze(-1) * branch.unsqueeze(-2)
        if self.form == "spread":
            post = connection(residual)[0].float()
            return (post.unsqueeze(-1) * branch.unsqueeze(-2).float() + residual.float()).to(residual.dtype)
        post, comb, _ = (part.to(residual.dtype) for part in connection(residual))
        return post.unsqueeze(-1) * branch.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), residual)


@dataclass(frozen=True)
class Join:
    """The residual stream at one point: ``how`` it follows from the one at ``base`` and the sum of ``branches``."""

    base: str
    branches: tuple[str, ...]
    how: Sum | Gate | Streams = Sum()

    @property
    def plain(self) -> bool:
        """Whether base and branches are simply added."""
        return isinstance(self.how, Sum) and self.how.plain
