"""One expert, one token: x [D] -> neurons [F] (input of the down-projection) -> output [D], for each layout of weights.

SwiGLU as in arXiv 2002.05202; the clamped form with an offset, gpt_oss (2508.10925).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference.types.tape import linear, silu

Gate = Callable[[Any, Tensor, Tensor], Tensor]
"""(experts or MLP, gate [F], up [F]) -> neurons [F]."""


# What becomes of the two halves


def _swiglu(_owner: Any, gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def _geglu(_owner: Any, gate: Tensor, up: Tensor) -> Tensor:
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def _limit(owner: Any) -> float:
    return owner.limit if hasattr(owner, "limit") else owner.swiglu_limit


def _clamped_swiglu(owner: Any, gate: Tensor, up: Tensor) -> Tensor:
    limit = _limit(owner)
    return silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)


def _swiglu_clamped_after(owner: Any, gate: Tensor, up: Tensor) -> Tensor:
    limit = _limit(owner)
    return silu(gate).clamp(max=limit) * up.clamp(min=-limit, max=limit)


def _swiglu_with_offset(owner: Any, gate: Tensor, up: Tensor) -> Tensor:
    limit = _limit(owner)
    alpha = owner.alpha if hasattr(owner, "alpha") else owner.swiglu_alpha
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def _softcapped_swiglu(owner: Any, gate: Tensor, up: Tensor) -> Tensor:
    caps = owner.act_fn.gate_softcap.softcap, owner.act_fn.up_softcap.softcap
    capped, up = caps[0] * torch.tanh(gate / caps[0]), caps[1] * torch.tanh(up / caps[1])
    return capped * torch.sigmoid(gate) * up


_GATES: dict[str, Gate] = {
    **dict.fromkeys(["DeepseekV4", "Glm5Next", "HYV4Experts"], _clamped_swiglu),
    "Step3p7": _swiglu_clamped_after,
    **dict.fromkeys(["GptOss", "OpenAIPrivacyFilter", "MiniMaxM3VL"], _swiglu_with_offset),
    "Inkling2": _softcapped_swiglu,
    **dict.fromkeys(["Gemma4", "DiffusionGemma"], _geglu),
}
_TRANSPOSED = ("Aria", "GptOss", "OpenAIPrivacyFilter", "Llama4")


def _gate_of(owner: Any) -> Gate:
    name = type(owner).__name__
    return next((gate for start, gate in _GATES.items() if name.startswith(start)), _swiglu)


# Experts


def neurons(experts: Any, e: int, x: Tensor) -> Tensor:
    """Expert `e`'s neurons [F] for one token x [D]."""
    special = _SPECIAL_NEURONS.get(type(experts).__name__)
    if special is not None:
        return special(experts, e, x)
    both = _times(experts, experts.gate_up_proj[e], x)
    if hasattr(experts, "gate_up_proj_bias"):
        both = both + experts.gate_up_proj_bias[e]
    interleaved = type(experts).__name__.startswith("GptOss")
    halves = (both[0::2], both[1::2]) if interleaved else both.chunk(2)
    return _gate_of(experts)(experts, *halves)


def written(experts: Any, e: int, act: Tensor) -> Tensor:
    """Expert `e`'s output [D] for its neurons [F]."""
    special = _SPECIAL_WRITTEN.get(type(experts).__name__)
    if special is not None:
        return special(experts, e, act)
    out = _times(experts, experts.down_proj[e], act)
    if hasattr(experts, "down_proj_bias"):
        out = out + experts.down_proj_bias[e]
    return experts.post_expert_norm(out) if hasattr(experts, "post_expert_norm") else out


def _times(experts: Any, matrix: Tensor, x: Tensor) -> Tensor:
    return x @ matrix if type(experts).__name__.startswith(_TRANSPOSED) else matrix @ x


def _squared_relu_neurons(experts: Any, e: int, x: Tensor) -> Tensor:
    return torch.relu(experts.up_proj[e] @ x) ** 2


def _dbrx_neurons(experts: Any, e: int, x: Tensor) -> Tensor:
    return silu(_dbrx_rows(experts, "w1", e) @ x) * (_dbrx_rows(experts, "v1", e) @ x)


def _dbrx_written(experts: Any, e: int, act: Tensor) -> Tensor:
    return act @ _dbrx_rows(experts, "w2", e)


def _dbrx_rows(experts: Any, name: str, e: int) -> Tensor:
    width = experts.ffn_hidden_size
    return getattr(experts.mlp, name)[e * width : (e + 1) * width]


def _jetmoe_neurons(block: Any, e: int, x: Tensor) -> Tensor:
    gate, up = (block.input_linear.weight[e] @ x).chunk(2)
    return silu(gate) * up


def _jetmoe_written(block: Any, e: int, act: Tensor) -> Tensor:
    return block.output_linear.weight[e] @ act


def _longcat_neurons(experts: Any, e: int, x: Tensor) -> Tensor:
    """A zero expert has no neurons: zeros stand in their place."""
    if e >= experts.num_routed_experts:
        return torch.zeros(experts.intermediate_size, dtype=x.dtype)
    gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
    return silu(gate) * up


def _switch_neurons(experts: Any, e: int, x: Tensor) -> Tensor:
    return torch.relu(linear(experts[f"expert_{e}"].wi, x))


def _switch_written(experts: Any, e: int, act: Tensor) -> Tensor:
    return linear(experts[f"expert_{e}"].wo, act)


def _nllb_neurons(experts: Any, e: int, x: Tensor) -> Tensor:
    return torch.relu(linear(experts[f"expert_{e}"].fc1, x))


def _nllb_written(experts: Any, e: int, act: Tensor) -> Tensor:
    return linear(experts[f"expert_{e}"].fc2, act)


def _doge_neurons(block: Any, e: int, x: Tensor) -> Tensor:
    return silu(block.down_embed.weight[e] @ x).reshape(1)


def _doge_written(block: Any, e: int, act: Tensor) -> Tensor:
    return act * block.up_embed.weight[e]


_SPECIAL_NEURONS: dict[str, Callable[[Any, int, Tensor], Tensor]] = {
    "NemotronHExperts": _squared_relu_neurons,
    "DbrxExperts": _dbrx_neurons,
    "JetMoeMoE": _jetmoe_neurons,
    "LongcatFlashExperts": _longcat_neurons,
    "SwitchTransformersExperts": _switch_neurons,
    "NllbMoeExperts": _nllb_neurons,
    "DogeCDMoE": _doge_neurons,
}
_SPECIAL_WRITTEN: dict[str, Callable[[Any, int, Tensor], Tensor]] = {
    "DbrxExperts": _dbrx_written,
    "JetMoeMoE": _jetmoe_written,
    "SwitchTransformersExperts": _switch_written,
    "NllbMoeExperts": _nllb_written,
    "DogeCDMoE": _doge_written,
}


# Shared experts: an MLP of one token


def mlp(module: Any, x: Tensor) -> Tensor:
    """A dense MLP of one token: x [D] -> [D]."""
    if hasattr(module, "input_linear"):
        gate, up = linear(module.input_linear, x).chunk(2)
        return linear(module.output_linear, silu(gate) * up)
    if hasattr(module, "gate_up_proj"):
        gate, up = linear(module.gate_up_proj, x).chunk(2)
    elif hasattr(module, "gate_proj"):
        gate, up = linear(module.gate_proj, x), linear(module.up_proj, x)
    else:
        return linear(module.down_proj, torch.relu(linear(module.up_proj, x)) ** 2)
    return linear(module.down_proj, _gate_of(module)(module, gate, up))


def sinks(module: Any, x: Tensor, weights: Tensor) -> Tensor:
    """inkling's shared experts of one token, each times its own weight."""
    outputs = [
        module.down_proj[i] @ (silu(module.gate_proj[i] @ x) * (module.up_proj[i] @ x) * weights[i])
        for i in range(module.n_shared_experts)
    ]
    return torch.stack(outputs).sum(dim=0)
