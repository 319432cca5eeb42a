"""A small model with transformers' own FP8 experts, on the CPU.

1. `build` gives a tiny model whose experts are `FP8Experts`: 8-bit numbers and one float32 scale for every 8 x 8 block.
2. `in_full` multiplies them out, block by block; `dense` is the same model with experts of these matrices.
3. transformers runs such experts by kernels that exist for accelerators alone. `Kernels` computes what those do, in
   loops: what a matrix is given is rounded to FP8, one scale for every 8 numbers of a row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import FineGrainedFP8Config
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear, replace_with_fp8_linear

from tests import tiny

BLOCK = 8
MATRICES = ("gate_up_proj", "down_proj")


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers [E, out, in] and the scales of their blocks."""
    blocks = weight.float().unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK))
    scale = blocks.abs().amax(dim=(2, 4), keepdim=True) / 448.0
    return (blocks / scale).flatten(3, 4).flatten(1, 2).to(torch.float8_e4m3fn), scale[:, :, 0, :, 0]


def in_full(numbers: Tensor, scale: Tensor) -> Tensor:
    """One matrix [out, in] in float32."""
    full = numbers.float()
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            full[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] *= scale[row, column]
    return full


def build(dtype: torch.dtype = torch.float32, family: str = "qwen3_moe") -> Any:
    """The tiny model of the family with its experts in FP8; all else as it is in `dtype`."""
    hf, source, kept = tiny.build(family, dtype=dtype), tiny.build(family), tiny.build(family, dtype=dtype)
    replace_with_fp8_linear(
        hf,
        modules_to_not_convert=["lm_head"],
        quantization_config=FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK)),
        pre_quantized=True,
    )
    for path in [path for path, module in hf.named_modules() if isinstance(module, FP8Linear)]:
        hf.set_submodule(path, kept.get_submodule(path))
    for path, experts in experts_of(hf):
        for name in MATRICES:
            numbers, scale = quantised(getattr(source.get_submodule(path), name).detach())
            setattr(experts, name, nn.Parameter(numbers, requires_grad=False))
            setattr(experts, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
    return hf.eval()


def experts_of(hf: Any) -> list[tuple[str, Any]]:
    """The FP8 experts of a model, with their paths."""
    return [(path, module) for path, module in hf.named_modules() if isinstance(module, FP8Experts)]


def dense(hf: Any, dtype: torch.dtype = torch.float32, family: str = "qwen3_moe") -> Any:
    """The tiny model with experts as large as those of `hf` are when multiplied out."""
    full = tiny.build(family, dtype=dtype)
    for path, experts in experts_of(hf):
        for name in MATRICES:
            parts = zip(getattr(experts, name), getattr(experts, f"{name}_scale_inv"), strict=True)
            matrices = torch.stack([in_full(numbers, scale) for numbers, scale in parts])
            getattr(full.get_submodule(path), name).data = matrices.to(dtype)
    return full


class Kernels:
    """What the kernels compute, in loops; to be used in their place."""

    @staticmethod
    def matmul(rows: Tensor, numbers: Tensor, scale: Tensor, block: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        """Rows, rounded to FP8 in groups of 8, times one matrix."""
        groups = rows.float().unflatten(-1, (-1, BLOCK))
        size = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 448.0
        rounded = ((groups / size).to(torch.float8_e4m3fn).float() * size).flatten(-2)
        return (rounded @ in_full(numbers, scale).T).to(dtype)

    @staticmethod
    def grouped(rows: Tensor, numbers: Tensor, scale: Tensor, offsets: Tensor, **_: Any) -> Tensor:
        """Rows sorted by expert, each times its expert's matrix."""
        out, start = rows.new_empty(len(rows), numbers.shape[1]), 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                out[start:end] = Kernels.matmul(rows[start:end], numbers[expert], scale[expert], None, rows.dtype)
            start = end
        return out


def use_kernels(monkeypatch: Any) -> None:
    """Let transformers, and moe_interp, find kernels on the CPU."""
    from moe_interp.adapters import formats

    monkeypatch.setattr(
        finegrained_fp8,
        "_FINEGRAINED_FP8",
        finegrained_fp8.FineGrainedFP8(Kernels.matmul, Kernels.grouped, Kernels.grouped),
    )
    monkeypatch.setattr(formats, "kernel_runs", lambda weight: True)
