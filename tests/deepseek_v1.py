"""The layout of DeepSeekMoE-16B v1 (`model_type: deepseek`), which transformers 5 does not have, as a small model.

1. `build` makes a random model whose modules, calls and parameter names are those of the published checkpoint: a dense
   first layer, then blocks with one module for each routed expert, a gate that returns `(ids, weights, aux_loss)`, and
   one ungated MLP for all shared experts together (arXiv 2401.06066, equations 9 to 11).
2. As published, a block in training mode runs the experts under autograd and adds the gradient of the balance loss;
   in eval mode it runs them without gradients (`moe_infer`), so only the shared experts carry any.
3. `write_checkpoint` saves one with the keys and the config of the published checkpoint, and `load_native` loads such
   a folder into transformers' own class of the same architecture.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, UnlimitedOcrTextConfig, UnlimitedOcrTextModel
from transformers.modeling_outputs import CausalLMOutput

_CONFIG: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=2, n_routed_experts=8, num_experts_per_tok=3,
    moe_layer_freq=1, first_k_dense_replace=1, norm_topk_prob=False, scoring_func="softmax", aux_loss_alpha=0.001,
    seq_aux=True, hidden_act="silu", max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=10000.0,
    attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


class DeepseekConfig(PreTrainedConfig):
    """The fields of the published config.json."""

    model_type = "deepseek"


class RMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, config: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.variance_epsilon = config.rms_norm_eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean_square = hidden_states.float().square().mean(-1, keepdim=True)
        return self.weight * (hidden_states.float() * (mean_square + self.variance_epsilon).rsqrt()).to(hidden_states)


class MLP(nn.Module):
    """SwiGLU: a dense layer's branch, one routed expert, or all shared experts side by side."""

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Softmax over all experts, greedy top-k, weights renormalised only if `norm_topk_prob`."""

    def __init__(self, config: Any):
        super().__init__()
        self.top_k, self.n_routed_experts = config.num_experts_per_tok, config.n_routed_experts
        self.norm_topk_prob, self.alpha = config.norm_topk_prob, config.aux_loss_alpha
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids [T, K], weights [T, K] and the balance loss (None in eval mode) of hidden states [B, S, D]."""
        scores = functional.linear(hidden_states.view(-1, hidden_states.shape[-1]), self.weight).softmax(dim=-1)
        weights, ids = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if self.top_k > 1 and self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        loss = self._balance(scores, ids, hidden_states.shape[0]) if self.training and self.alpha > 0 else None
        return ids, weights, loss

    def _balance(self, scores: Tensor, ids: Tensor, batch: int) -> Tensor:
        chosen = functional.one_hot(ids, self.n_routed_experts).view(batch, -1, self.n_routed_experts).float().mean(1)
        mean = scores.view(batch, -1, self.n_routed_experts).mean(1)
        return self.alpha * self.n_routed_experts * (chosen * mean).sum(1).mean()


class _WithLoss(torch.autograd.Function):
    """The value as it is; backward, a gradient of one for the loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.like)


class MoE(nn.Module):
    """The block: routed experts as a ModuleList, and the shared experts beside them."""

    def __init__(self, config: Any):
        super().__init__()
        self.config, self.num_experts_per_tok = config, config.num_experts_per_tok
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(MLP(config, width) for _ in range(config.n_routed_experts))
        self.gate = Gate(config)
        self.shared_experts = MLP(config, width * config.n_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        ids, weights, loss = self.gate(hidden_states)
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        routed = self._train(rows, ids, weights, loss) if self.training else self.moe_infer(rows, ids, weights)
        return routed.view(hidden_states.shape) + self.shared_experts(hidden_states)

    def _train(self, rows: Tensor, ids: Tensor, weights: Tensor, loss: Tensor | None) -> Tensor:
        rows, flat = rows.repeat_interleave(self.num_experts_per_tok, dim=0), ids.view(-1)
        outputs = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            outputs[flat == e] = expert(rows[flat == e])
        routed = (outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
        return routed if loss is None else _WithLoss.apply(routed, loss)

    @torch.no_grad()
    def moe_infer(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        counts = ids.view(-1).bincount(minlength=len(self.experts)).tolist()
        total = torch.zeros_like(rows)
        for e, slots in enumerate(order.split(counts)):
            if len(slots) == 0:
                continue
            tokens = slots // self.num_experts_per_tok
            total.index_add_(0, tokens, self.experts[e](rows[tokens]) * weights.view(-1, 1)[slots])
        return total


class Attention(nn.Module):
    """Multi-head attention with rotary positions (halves rotated against each other)."""

    def __init__(self, config: Any):
        super().__init__()
        self.heads, self.theta = config.num_attention_heads, config.rope_theta
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor, None, None]:
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self._rotate(q, position_ids), self._rotate(k, position_ids)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + attention_mask
        mixed = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None, None

    def _rotate(self, x: Tensor, position_ids: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = position_ids[:, None, :, None] * self.theta ** -(torch.arange(half, device=x.device) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class DecoderLayer(nn.Module):
    """Attention and a branch (the submodule of that name), each after a norm; returns a tuple, as remote code does."""

    def __init__(self, config: Any, block: nn.Module, branch: str = "mlp"):
        super().__init__()
        self.branch = branch
        self.self_attn = Attention(config)
        self.add_module(branch, block)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config), RMSNorm(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor]:
        residual = hidden_states
        hidden_states, _, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, position_ids=position_ids
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        output = getattr(self, self.branch)(self.post_attention_layernorm(hidden_states))
        return (residual + (output[0] if isinstance(output, tuple) else output),)


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Any, layers: list[DecoderLayer]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden_states = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :].bool()
        hidden = torch.zeros(seen.shape, dtype=hidden_states.dtype, device=input_ids.device)
        hidden = hidden.masked_fill(~seen, torch.finfo(hidden_states.dtype).min)
        positions = torch.arange(length, device=input_ids.device)[None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=hidden, position_ids=positions)[0]
        return self.norm(hidden_states)


class CausalLM(nn.Module):
    """A decoder and its unembedding: plain PyTorch, no class of transformers."""

    def __init__(self, config: Any, layers: list[DecoderLayer]):
        super().__init__()
        self.config = config
        self.model = Decoder(config, layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask)))


class DeepseekForCausalLM(CausalLM):
    """The published model's name and layout."""

    def __init__(self, config: DeepseekConfig):
        branches = [_branch(config, index) for index in range(config.num_hidden_layers)]
        super().__init__(config, [DecoderLayer(config, branch) for branch in branches])


def _branch(config: Any, index: int) -> nn.Module:
    sparse = index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0
    return MoE(config) if sparse else MLP(config, config.intermediate_size)


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> DeepseekForCausalLM:
    """A tiny random model in eval mode: E=8, K=3, D=64, 4 layers, the first dense; the seed decides its weights.

    Raises TypeError for a field that the published config does not have.
    """
    return randomised(DeepseekForCausalLM(DeepseekConfig(**fields(_CONFIG, overrides))), seed, dtype)


def fields(defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Defaults and overrides; TypeError for an override without default."""
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        raise TypeError(f"the config has no field {', '.join(unknown)}")
    return defaults | overrides


@torch.no_grad()
def randomised(model: CausalLM, seed: int, dtype: torch.dtype) -> Any:
    """The model in eval mode with every parameter drawn anew; routers twice as wide as other matrices."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            mean, std = 1.0, 0.2
        elif "embed_tokens" in name:
            mean, std = 0.0, 1.0
        else:
            mean, std = 0.0, (2.0 if name.endswith(".gate.weight") else 1.0) * parameter.shape[-1] ** -0.5
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def write_checkpoint(model: DeepseekForCausalLM, folder: Path) -> None:
    """config.json and model.safetensors, with the keys of the published checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: getattr(model.config, name) for name in _CONFIG}
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    config |= {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek"}
    config |= {"torch_dtype": dtype, "rope_scaling": None, "use_cache": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class NativeCausalLM(nn.Module):
    """transformers' own class of this architecture, and the unembedding that it lacks."""

    def __init__(self, model: UnlimitedOcrTextModel, unembedding: Tensor):
        super().__init__()
        self.config, self.model = model.config, model
        self.lm_head = nn.Linear(*unembedding.shape[::-1], bias=False, dtype=unembedding.dtype)
        self.lm_head.weight = nn.Parameter(unembedding)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutput:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        return CausalLMOutput(logits=self.lm_head(output.last_hidden_state))


def load_native(folder: Path) -> tuple[NativeCausalLM, dict[str, Any]]:
    """A checkpoint of this layout in transformers' own class, and what `from_pretrained` reports of the loading.

    The class is the text part of another model: a DeepSeek-V2 block with plain multi-head attention. It computes the
    same, but never renormalises weights, and has no unembedding: `lm_head.weight` is reported as left over.

    Raises ValueError for a checkpoint with `norm_topk_prob`, which the class would compute wrongly.
    """
    published = json.loads((folder / "config.json").read_text())
    if published["norm_topk_prob"]:
        raise ValueError("norm_topk_prob is set: the native class does not renormalise")
    layers, dense = published["num_hidden_layers"], published["first_k_dense_replace"]
    config = UnlimitedOcrTextConfig(
        **{name: published[name] for name in _NATIVE},
        mlp_layer_types=["dense"] * dense + ["sparse"] * (layers - dense),
        layer_types=["full_attention"] * layers,
        rope_parameters={"rope_type": "default", "rope_theta": published["rope_theta"]},
    )
    options: dict[str, Any] = {"dtype": published["torch_dtype"], "output_loading_info": True}
    model, report = UnlimitedOcrTextModel.from_pretrained(folder, config=config, **options)
    return NativeCausalLM(model, load_file(folder / "model.safetensors")["lm_head.weight"]).eval(), report


_NATIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_routed_experts", "num_experts_per_tok",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "bos_token_id", "eos_token_id",
)  # fmt: skip
