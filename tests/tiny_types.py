"""Tiny random models of all 90 mixture-of-experts model types, from configs alone: E=8, K=3, D=64, 4 layers.

1. `_SIZES` shrinks every number of that name, in the config and in those inside it; `_OPTIONS` moves scales, caps and
   limits off their defaults wherever they are on; `_TYPES` says what single types need: dense layers among sparse
   ones, both kinds of attention in the hybrids, capacities that overflow, windows shorter than the texts.
2. Every parameter and buffer is drawn anew from one generator, but for tables that are computed (rotary
   frequencies, position tables, decays): a fresh model has zero biases, unit norms and a nearly uniform router.
"""

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny_configs import KEPT, OPTIONS, SIZES, TYPE_FIELDS

TYPES: tuple[str, ...] = (
    "afmoe", "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx",
    "deepseek_ocr2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffusion_gemma", "doge",
    "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "flex_olmo",
    "flint", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm5_next",
    "glm5_next_text", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2", "inkling2_text", "inkling_mm_model",
    "inkling_text", "jamba", "jetmoe", "kimi_k25", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4",
    "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl",
    "minimax_m3_vl_text", "mistral4", "mistral_large4", "mistral_large4_text", "mixtral", "muse_spark",
    "muse_spark_text", "nemo_speechlm", "nemotron_h", "nemotron_h_omni", "nllb-moe", "olmoe",
    "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
    "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen4_exp",
    "qwen4_exp_text", "solar_open", "step3p7", "switch_transformers", "unlimited_ocr", "zaya",
)  # fmt: skip
"""The model types whose text model is a mixture of experts, as transformers 5.23 names them."""

_HEADS = (
    "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM",
    "AutoModelForTokenClassification", "AutoModelForMultimodalLM", "AutoModel",
)  # fmt: skip
_FIRST_HEAD = {"dots3_note": ("AutoModelForImageTextToText",)}  # the causal one has no vision experts
_TEXT_CONFIGS = ("text_config", "thinker_config")


def build(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of `model_type` in eval mode on the CPU; the same seed gives the same weights.

    `overrides` are fields of the type's config or of the text config in it. Parameters are cast to `dtype`, but for
    those that transformers itself keeps in fp32; buffers stay in fp32, as `from_pretrained` leaves them. The global
    random state is left as it was.

    Raises KeyError for an unknown type, TypeError for a field that its config does not have.
    """
    with torch.random.fork_rng(devices=[]):
        model = _auto_class(_config(model_type)).from_config(_config(model_type, overrides))
    _randomise(model, seed)
    _cast(model, dtype)
    return model.eval()


def inputs(model: PreTrainedModel | str, batch: int = 2, length: int = 8, seed: int = 1) -> dict[str, Tensor]:
    """Arguments of a text forward of a model or model type: ids [batch, length], the decoder's too where it has one."""
    model_type = model if isinstance(model, str) else model.config.model_type
    generator = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        return torch.randint(3, 90, (batch, length), generator=generator)

    arguments = {"input_ids": ids(), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
    if model_type in _WITH_DECODER:
        arguments["decoder_input_ids"] = ids()
    return arguments


_WITH_DECODER = ("diffusion_gemma", "nllb-moe", "switch_transformers")


def images(model: PreTrainedModel, seed: int = 1) -> dict[str, Tensor]:
    """Arguments with an image of 4 x 4 patches, four tokens of it, in each text: they reach the vision experts of
    dots3_note (in the vision tower) and of ernie4_5_vl_moe (for image tokens, in the text model)."""
    arguments = inputs(model, batch=2, length=10, seed=seed)
    arguments["input_ids"][:, 3:7] = model.config.image_token_id
    patch = 3 * model.config.vision_config.patch_size**2
    arguments["pixel_values"] = torch.randn(2 * 16, patch, generator=torch.Generator().manual_seed(seed))
    arguments["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
    if model.config.model_type == "ernie4_5_vl_moe":
        kinds = (arguments["input_ids"] == model.config.image_token_id).int()
        arguments |= {"mm_token_type_ids": kinds, "moe_mm_token_type_ids": kinds}
    return arguments


def runner(model: PreTrainedModel) -> Any:
    """What runs a text forward: the model, or its thinker where the model has no forward of its own."""
    return model.thinker if model.config.model_type == "qwen3_omni_moe" else model


def _config(model_type: str, overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    left = dict(overrides or {})
    config_class: Any = CONFIG_MAPPING[model_type]
    config = config_class(**_fields(config_class, config_class(), left))
    if left:
        raise TypeError(f"{config_class.__name__} has no field {', '.join(left)}")
    return config


def _fields(config_class: Any, default: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `config_class`; `overrides` loses those that are fields of it or of a text config in it."""
    declared = {field.name for field in dataclasses.fields(config_class)}
    fields = {name: value for name, value in SIZES.items() if name in declared and _is_number(default, name)}
    fields |= {name: value for name, value in OPTIONS.items() if name in declared and _is_set(default, name)}
    if "num_key_value_heads" in declared and _is_number(default, "num_key_value_heads"):
        ungrouped = _default(default, "num_key_value_heads") == _default(default, "num_attention_heads")
        fields["num_key_value_heads"] = 4 if ungrouped or "kv_lora_rank" in declared else 2
    for name in config_class.sub_configs or {}:
        inner = _default(default, name)
        if dataclasses.is_dataclass(inner):
            passed_on = overrides if name in _TEXT_CONFIGS else {}
            fields[name] = type(inner)(**_fields(type(inner), inner, passed_on))
    fields |= TYPE_FIELDS.get(config_class.model_type, {}) | TYPE_FIELDS.get(config_class.__name__, {})
    for name in KEPT.get(config_class.model_type, ()):
        fields.pop(name, None)
    return fields | {name: overrides.pop(name) for name in list(overrides) if name in declared | set(fields)}


def _is_number(default: Any, name: str) -> bool:
    value = _default(default, name)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_set(default: Any, name: str) -> bool:
    return _default(default, name) is not None


def _default(default: Any, name: str) -> Any:
    """The field's default; where it differs from layer to layer, the one that layers without their own take."""
    return vars(default).get(name, getattr(type(default), name, None))


def _auto_class(config: PreTrainedConfig) -> Any:
    """The first auto class that has a model for `config`: one with a head if there is any."""
    for name in _FIRST_HEAD.get(config.model_type, _HEADS):
        candidate = getattr(modeling_auto, name, None)
        if candidate is not None and type(config) in candidate._model_mapping:
            return candidate
    raise KeyError(type(config).__name__)


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter and every buffer that a checkpoint holds (but for computed tables) from one generator."""
    generator = torch.Generator().manual_seed(seed)
    stored = set(model.state_dict(keep_vars=False))
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    owners = dict(model.named_modules())
    for name, tensor in [*model.named_parameters(), *buffers]:
        leaf = name.rpartition(".")[2]
        if leaf == "tid2eid":
            tensor.copy_(_expert_ids(tensor, model, generator))
        if name.endswith(_COMPUTED) or not tensor.is_floating_point():
            continue
        owner = owners[name.rpartition(".")[0]]
        mean, std = _distribution(name, tensor, owner)
        if isinstance(owner, nn.Embedding) and model.config.model_type in _SCALE_EMBEDDINGS:
            std = model.config.get_text_config().hidden_size ** -0.5
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))


_SCALE_EMBEDDINGS = {"afmoe", "diffusion_gemma", "gemma4", "gemma4_text", "nllb-moe"}
_DECAYS = {"slope_rate", "query_decay", "key_decay", "diagonal_decay"}
_COMPUTED = (*_DECAYS, "rotary_emb.alpha")


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    kept = re.compile("|".join(model._keep_in_fp32_modules_strict or {"(?!)"}))
    for name, parameter in model.named_parameters():
        if not kept.search(name):
            parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in _DECAYS | {"weights"}:  # made in the model's dtype, as parameters are
            buffer.data = buffer.data.to(dtype)


def _expert_ids(table: Tensor, model: PreTrainedModel, generator: torch.Generator) -> Tensor:
    """For each token id, different experts: a random table [V, K] for hash routing."""
    experts = model.config.get_text_config().n_routed_experts
    return torch.rand(len(table), experts, generator=generator).argsort(dim=-1)[:, : table.shape[1]]


def _distribution(name: str, tensor: Tensor, owner: nn.Module) -> tuple[float, float]:
    """Mean and standard deviation of one tensor: what starts as a constant stays near it (a norm's weight is about
    one, or about zero where the norm adds one itself); matrices keep their input's scale, routers double it."""
    leaf = name.rpartition(".")[2]
    if isinstance(owner, nn.Embedding):
        return 0.0, 1.0
    if leaf in _SELECTION_BIASES:
        return 0.0, 0.15
    first = tensor.flatten()[0].item()
    constant = bool((tensor == first).all()) and abs(first) <= 1.0
    matrix = tensor.ndim > 1 and (leaf == "weight" or leaf.endswith("_proj"))  # not always set when a model is fresh
    if constant and not matrix:
        return first, 0.3 if first == 0.0 and "norm" not in name else 0.2
    if tensor.ndim == 1 or leaf.endswith("bias") or leaf == "A_log":
        return 0.0, 0.3
    return 0.0, _gain(name) * _fan_in(tensor, owner, leaf) ** -0.5


_SELECTION_BIASES = {"e_score_correction_bias", "expert_bias", "balancing_biases"}


def _fan_in(tensor: Tensor, owner: nn.Module, leaf: str) -> int:
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return tensor[0].numel()
    if getattr(owner, "is_transposed", False):
        return tensor.shape[-2]
    return 48 if leaf == "w2" and tensor.ndim == 2 and tensor.shape[-1] == 64 else tensor.shape[-1]


def _gain(name: str) -> float:
    if name.endswith(".router_mlp.out_proj.weight"):
        return 4.0  # what it reads is small
    return 2.0 if name.endswith(_ROUTERS) else 1.0


_ROUTERS = (
    ".gate.weight", ".router.weight", ".wg.weight", ".classifier.weight", ".router.proj.weight",
    ".router.layer.weight", ".router.gate.weight", ".router_gate.weight",
)  # fmt: skip
