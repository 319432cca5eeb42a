"""How the matrices of experts are stored: multiplying by them, one of them in full, and where they are meanwhile.

- float32, bfloat16, float16: all experts in one tensor, multiplied by one grouped matrix product.
- float64, which that product does not take, and torchao's tensors, which multiply by codes and scales: one expert after
  another, as transformers' own loop over experts does.
- FP8 (and FP4 in bytes) with a scale for every block of a matrix, ``<name>_scale_inv``: on an accelerator the kernel
  that transformers calls, which rounds what it is given to FP8 as well; on CPU, where there is none, the matrices of
  one expert after another in the dtype of its input. No layer is ever written out in full.
- Other whole numbers (mxfp4) are codes that only a kernel of their own can read, and are refused.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.integrations.moe import _grouped_linear

from moe_interp.errors import BadCheckpoint, UnsupportedModel

GROUPED = (torch.float32, torch.bfloat16, torch.float16)
_SCALE = "_scale_inv"
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Matrices:
    """One matrix for every expert, as the checkpoint stores them.

    Attributes:
        weight: [E, out, in], or [E, in, out] where they are transposed.
        transposed: which of both.
        scale: of FP8, [E, blocks of out, blocks of in].
        block: rows and columns that share a scale.
    """

    weight: Tensor
    transposed: bool = False
    scale: Tensor | None = None
    block: tuple[int, int] | None = None

    def times(self, rows: Float[Tensor, "N In"], ends: Int[Tensor, " E"], bias: Tensor | None = None) -> Tensor:
        """Rows sorted by expert, of which those of expert e end before ``ends[e]``, each times its expert's matrix."""
        if self.scale is None and _grouped(self.weight):
            return _grouped_linear(rows, self.weight, ends, bias=bias, is_transposed=self.transposed)
        kernel = self.scale is not None and kernel_runs(self.weight)
        out = self._fp8_kernel(rows, ends) if kernel else self._one_by_one(rows, ends)
        return out if bias is None else out + bias

    def full(self, expert: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "Out In"]:
        """One expert's matrix in numbers; ``dtype`` is for those stored in FP8."""
        weight = self.weight[expert]
        if self.scale is not None:
            weight = fp8_in_full(weight, self.scale[expert], self.block, dtype)
        elif is_traceable_wrapper_subclass(weight):
            weight = weight.dequantize()
        return weight.T if self.transposed else weight

    def _one_by_one(self, rows: Tensor, ends: Tensor) -> Tensor:
        done, start = [], 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                done.append(functional.linear(rows[start:end], self._factor(expert, rows.dtype)))
            start = end
        return torch.cat(done) if done else rows.new_empty(0, self.weight.shape[-1 if self.transposed else -2])

    def _factor(self, expert: int, dtype: torch.dtype) -> Tensor:
        # torchao's tensors multiply by themselves, as they do in the model; what that rounds is theirs to say.
        weight = self.weight[expert]
        itself = is_traceable_wrapper_subclass(weight) and not self.transposed
        return weight if itself else self.full(expert, dtype)

    def _fp8_kernel(self, rows: Tensor, ends: Tensor) -> Tensor:
        from transformers.integrations import finegrained_fp8 as fp8

        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        return fp8._apply_if_grad(
            fp8.FP8GroupedMatmulFunction,
            fp8.fp8_grouped_matmul,
            rows,
            self.weight,
            self.scale,
            ends,
            counts,
            self.block,
        )


def matrices(experts: Any, name: str, *, transposed: bool = False, count: int | None = None) -> Matrices:
    """The matrices called ``name`` of fused experts, of which the first ``count`` are used."""
    path, _, last = name.rpartition(".")
    owner = experts.get_submodule(path)
    weight = getattr(owner, last)
    if count is not None and len(weight) != count:  # some checkpoints hold more than they use
        weight = weight[:count]
    return Matrices(weight, transposed, getattr(owner, last + _SCALE, None), getattr(experts, "block_size", None))


def _grouped(weight: Tensor) -> bool:
    return weight.dtype in GROUPED and not is_traceable_wrapper_subclass(weight)


def kernel_runs(weight: Tensor) -> bool:
    """Whether transformers' FP8 kernels run where this tensor is."""
    return weight.device.type not in ("cpu", "meta")


def is_fp8(experts: nn.Module) -> bool:
    """Whether these are transformers' FP8 experts, which have a registry of their own."""
    return any(name.endswith(_SCALE) for name, _ in experts.named_parameters(recurse=False))


def fp8_in_full(
    weight: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> Float[Tensor, "Out In"]:
    """A matrix of FP8 numbers, or of two FP4 numbers (e2m1) a byte, times the scales of its blocks."""
    if weight.dtype is torch.int8:
        nibbles = torch.stack([weight & 15, (weight >> 4) & 15], dim=-1).flatten(-2).long()
        weight = torch.tensor([*_FP4, *(-x for x in _FP4)], device=weight.device)[nibbles]
        block = (1, 32)  # whatever the config says of FP8
    weight, scale = weight.float(), scale.float()
    if block is not None and scale.dim() == 2:
        rows = scale.repeat_interleave(block[0], dim=0)[: weight.shape[0]]
        scale = rows.repeat_interleave(block[1], dim=1)[:, : weight.shape[1]]
    return (weight * scale).to(dtype)


def plain_function(experts: nn.Module) -> Literal["grouped_mm", "eager"] | None:
    """Which of transformers' own implementations runs these experts, the first that can; None: none can here."""
    if is_fp8(experts):
        return "grouped_mm" if all(kernel_runs(weight) for weight in experts.parameters(recurse=False)) else None
    return "grouped_mm" if all(_grouped(weight) for weight in experts.parameters()) else "eager"


def rounds_activations(module: nn.Module) -> bool:
    """Whether parts of a module round what they are given to 8 bits while they run."""
    return any(_rounds(module) for module in module.modules())


def rounding_without_gradient(module: nn.Module) -> str | None:
    """The first parameter that rounds what it is multiplied by, in a way that gradients do not pass."""
    return next((name for name, one in module.named_parameters() if getattr(one, "act_quant_kwargs", None)), None)


def _rounds(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    if any(getattr(one, "act_quant_kwargs", None) for one in own):
        return True
    return is_fp8(module) and all(kernel_runs(one) for one in own)


def check_format(experts: nn.Module, path: str) -> None:
    """Refuse experts whose matrices cannot be read here.

    Raises:
        UnsupportedModel: codes without scales beside them, or experts split over processes.
    """
    packed = [
        name
        for name, one in experts.named_parameters(recurse=False)
        if _is_code(one) and not name.endswith(_SCALE) and not hasattr(experts, name + _SCALE)
    ]
    if packed:
        raise UnsupportedModel(
            f"cannot open the experts at {path}",
            expected="weights that are numbers, or codes with scales beside them",
            got=f"{type(experts).__name__} with packed {', '.join(packed)}",
            do="Load with quantization_config=transformers.Mxfp4Config(dequantize=True).",
        )
    if getattr(experts, "_is_expert_parallel", False):
        raise UnsupportedModel(
            f"cannot open the experts at {path}",
            expected="all experts of a layer on this process",
            got="expert-parallel experts",
            do="Load without expert parallelism.",
        )


def _is_code(weight: Tensor) -> bool:
    codes = not weight.is_floating_point() or weight.element_size() == 1
    return codes and not is_traceable_wrapper_subclass(weight)


def linear_weight(linear: Any) -> Float[Tensor, "Out In"]:
    """The matrix of a linear map, detached, whatever stores it."""
    weight = linear.weight
    if is_traceable_wrapper_subclass(weight):
        return weight.dequantize().detach()  # type: ignore[attr-defined]
    if type(linear) is nn.Linear:
        return weight.detach()
    with torch.no_grad():  # quantised or adapted: what it does to the unit vectors, one row each
        bias = linear.bias
        unit = torch.eye(linear.in_features, device=weight.device, dtype=_computes_in(linear))
        out = linear(unit)
        return (out if bias is None else out - bias.to(out.dtype)).T


def _computes_in(linear: Any) -> torch.dtype:
    dtypes = (getattr(linear, "compute_dtype", None), getattr(linear.weight, "dtype", None))
    return next((dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point), torch.float32)


def stored(parameter: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a parameter is made of: torchao's are codes and scales behind one tensor."""
    if not is_traceable_wrapper_subclass(parameter):
        yield parameter
        return
    for name in parameter.__tensor_flatten__()[0]:
        yield from stored(getattr(parameter, name))


@contextmanager
def in_memory(module: nn.Module, *, inner: bool = True) -> Iterator[bool]:
    """The parameters of a module where its forward would find them: accelerate may keep them on disk meanwhile.

    Yields whether they had to be brought. ``inner`` says whether those of its submodules are wanted as well. Modules
    that have theirs are left alone, for a running forward would lose them at the end of the ``with``.

    Raises:
        UnsupportedModel: nothing is there that would bring them.
    """
    wanted = module.modules() if inner else (module,)
    away = [one for one in wanted if any(parameter.is_meta for parameter in one.parameters(recurse=False))]
    if not away:
        yield False
        return
    with ExitStack() as stack:
        for one in away:
            hook = _bringing(one)
            hook.pre_forward(one)
            stack.callback(hook.post_forward, one, ())
        yield True


def _bringing(module: nn.Module) -> Any:
    """The hook by which accelerate brings a module's parameters, before its forward."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        raise UnsupportedModel(
            "parameters are not in memory",
            expected="a model that was loaded, or one that accelerate offloads module by module",
            got=f"{type(module).__name__} with parameters on the meta device and no hook that brings them",
        )
    return hook


def check_weights(hf: nn.Module) -> None:
    """Refuse a model with weights that are not finite.

    Raises:
        BadCheckpoint: naming the first such parameter.
    """
    for path, module in hf.named_modules():
        with in_memory(module, inner=False):
            for name, parameter in module.named_parameters(recurse=False):
                bad = sum(_not_finite(part) for part in stored(parameter))
                if bad:
                    raise BadCheckpoint(
                        "weights are not finite",
                        expected="finite values",
                        got=f"{bad} NaN or infinite values in {path + '.' if path else ''}{name}",
                        do="The checkpoint is damaged: fetch it again.",
                    )


def _not_finite(values: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not values.is_floating_point():
        return 0
    values = values.detach()
    values = values.float() if values.element_size() == 1 else values  # torch cannot tell for numbers of one byte
    # A sum that is finite has finite terms, and takes a tenth of the time of looking at each.
    if bool(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).isfinite()):
        return 0
    return int((~values.isfinite()).sum())
