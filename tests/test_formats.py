"""Experts in every numeric format: what runs, against models that hold the same numbers in full; what is refused."""

import importlib.util
import json

import pytest
import torch

import moe_interp as moe
from moe_interp import errors
from moe_interp.adapters import formats
from moe_interp.adapters.formats import check_weights
from moe_interp.points import POINTS
from tests import fp8, tiny, tiny_types
from tests.reference.model import forward

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
LAYER = 2
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed; it is among the dev extra"
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed; it is among the dev extra"
)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def logits(hf, implementation: str) -> torch.Tensor:
    hf.set_experts_implementation(implementation)
    with torch.no_grad():
        return hf(input_ids=IDS, use_cache=False).logits


def gradient(hf, point: str = "expert_out") -> torch.Tensor:
    with moe.wrap(hf) as model:
        run = model.run(IDS, read=[point], grad=True)
        return torch.autograd.grad(run.logits.float().square().sum(), run.values[point, LAYER])[0]


# float64 and float16


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_float64_runs_expert_by_expert(family):
    hf = tiny.build(family, dtype=torch.float64)
    plain, reference = logits(hf, "eager"), forward(hf, IDS)
    with moe.wrap(hf) as model:
        assert model.plain_experts == {"eager"} and not model.exact
        run = model.run(IDS, read=list(model.points))
    assert torch.equal(run.logits, plain)
    for (point, layer), value in run.values.items():
        expected = reference.points[point, layer]
        # Norms and routers compute in float32, whatever the weights are.
        assert torch.equal(value, expected) if POINTS[point].integer else error(value, expected) < 1e-5


def test_float64_gradients_are_those_of_the_reference():
    hf = tiny.build("gpt_oss", dtype=torch.float64)
    hf.set_experts_implementation("eager")
    with torch.enable_grad():
        reference = forward(hf, IDS)
        (expected,) = torch.autograd.grad(reference.logits.square().sum(), reference.points["expert_out", LAYER])
    assert error(gradient(hf), expected) < 1e-5


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "dbrx", "llama4_text", "jetmoe", "longcat_flash"])
def test_float64_adds_up_on_blocks_of_their_own_too(model_type):
    with moe.wrap(tiny_types.build(model_type, dtype=torch.float64)) as model:
        audit = model.audit()
    assert audit.passed, str(audit)
    assert ("untouched run equal to plain eager" in str(audit)) == (model_type in ("gpt_oss", "nemotron_h"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_float16_is_bit_equal_to_grouped_mm(family):
    hf = tiny.build(family, dtype=torch.float16)
    plain = logits(hf, "grouped_mm")
    with moe.wrap(hf) as model:
        assert model.plain_experts == {"grouped_mm"} and model.exact
        assert torch.equal(model.run(IDS, read=list(model.points)).logits, plain)
        if family == "gpt_oss":
            audit = model.audit()
            assert audit.passed, str(audit)


# FP8


def test_fp8_experts_on_cpu_are_those_of_their_matrices_in_full():
    hf = fp8.build()
    full = fp8.dense(hf)
    with moe.wrap(hf) as model, moe.wrap(full) as expected:
        run = model.run(IDS, read=["expert_out", "moe_out"])
        other = expected.run(IDS, read=["expert_out", "moe_out"])
        rows, ids = run["moe_out", LAYER], torch.full((2, 12, 1), 5)
        assert error(model.experts(LAYER)(rows, ids), expected.experts(LAYER)(rows, ids)) < 1e-6
        for expert in (0, 7):
            mine, theirs = model.weights(LAYER, expert), expected.weights(LAYER, expert)
            for name in ("gate", "up", "down"):
                assert torch.equal(getattr(mine, name), getattr(theirs, name))
    assert error(run.logits, other.logits) < 1e-6
    assert error(run["expert_out", LAYER], other["expert_out", LAYER]) < 1e-6
    assert error(gradient(hf), gradient(full)) < 1e-5
    assert error(gradient(hf, "resid_pre"), gradient(full, "resid_pre")) < 1e-5
    assert error(run.logits, logits(tiny.build("qwen3_moe"), "eager")) > 1e-3  # rounding to 8 bits is no trifle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_experts_with_kernels_are_bit_equal_to_transformers_grouped_mm(dtype, monkeypatch):
    fp8.use_kernels(monkeypatch)
    hf = fp8.build(dtype)
    plain, eager = logits(hf, "grouped_mm"), logits(hf, "eager")
    with moe.wrap(hf) as model:
        assert model.plain_experts == {"grouped_mm"} and model.exact
        assert torch.equal(model.run(IDS, read=list(model.points)).logits, plain)
        edited = model.run(IDS, edit=moe.ablate(layer=LAYER, expert=3)).logits
        audit = model.audit()
    assert error(edited, plain) > 1e-2
    assert audit.passed, str(audit)
    assert "bit-equal to plain grouped_mm" in str(audit)
    assert "down-projection" not in {check.name for check in audit.checks}  # the kernel rounds the neurons first
    assert error(eager, plain) < 0.1
    assert gradient(hf).isfinite().all()
    monkeypatch.setattr(formats, "kernel_runs", lambda weight: False)
    with moe.wrap(hf) as model:
        assert error(model.run(IDS).logits, plain) > 1e-4


def test_fp8_without_kernels_has_no_plain_run_and_the_audit_says_so():
    with moe.wrap(fp8.build()) as model:
        with pytest.raises(errors.UnsupportedModel, match="there is no plain model to run"), model.plain():
            pass
        audit = model.audit()
    assert audit.passed, str(audit)
    assert "untouched run not compared" in str(audit)


def test_two_fp4_numbers_a_byte():
    # 0x3A: 1010 = -1 in the low half (first), 0011 = 1.5 in the high half.
    numbers = torch.tensor([[0x3A] * 32, [0x07] * 32], dtype=torch.int8)
    scale = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    full = formats.fp8_in_full(numbers, scale, None, torch.float32)
    assert full.shape == (2, 64)
    assert torch.equal(full[0, :32], torch.tensor([-1.0, 1.5] * 16))
    assert torch.equal(full[0, 32:], torch.tensor([-2.0, 3.0] * 16))
    assert torch.equal(full[1, 32:], torch.tensor([24.0, 0.0] * 16))


def test_blocks_need_not_fit():
    numbers = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) + 0.5
    expected = fp8.in_full(numbers, scale)
    assert torch.equal(formats.fp8_in_full(numbers, scale, (8, 8), torch.float32), expected)


# Finite weights


@pytest.mark.parametrize("name", ["down_proj", "down_proj_scale_inv"])
def test_a_number_that_is_not_finite_is_found_in_fp8(name):
    hf = fp8.build()
    parameter = getattr(hf.model.layers[LAYER].mlp.experts, name)
    parameter.data.view(torch.uint8).flatten()[:4] = 0xFF  # NaN, as four bytes or one
    with moe.wrap(hf) as model, pytest.raises(errors.BadCheckpoint, match=rf"layers.{LAYER}.mlp.experts.{name}"):
        check_weights(model.hf)


# mxfp4


def packed():
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, Mxfp4GptOssMLP

    hf = tiny.build("gpt_oss")
    for layer in hf.model.layers:
        layer.mlp = Mxfp4GptOssMLP(layer.mlp.router, Mxfp4GptOssExperts(hf.config))
    return hf


def test_mxfp4_is_refused_with_what_to_do():
    message = (
        r"packed gate_up_proj, down_proj\. Load with quantization_config=transformers.Mxfp4Config\(dequantize=True\)"
    )
    with pytest.raises(errors.UnsupportedModel, match=message):
        moe.wrap(packed())


def test_an_mxfp4_checkpoint_opens_dequantised(tmp_path):
    from safetensors.torch import save_file
    from transformers import Mxfp4Config

    hf = tiny.build("gpt_oss", dtype=torch.bfloat16, intermediate_size=32)
    weights, values = {}, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    generator = torch.Generator().manual_seed(0)
    expected = None
    for name, tensor in hf.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weights[name] = tensor.contiguous()
            continue
        shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1] // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 124, shape, dtype=torch.uint8, generator=generator)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        if name == "model.layers.2.mlp.experts.down_proj":
            numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(-2)
            expected = (numbers * 2.0 ** (scales[..., None].float() - 127)).flatten(-2)[5]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = hf.config.to_dict() | {"architectures": ["GptOssForCausalLM"]}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with moe.load(tmp_path, quantization_config=Mxfp4Config(dequantize=True)) as model:
        assert torch.equal(model.weights(LAYER, 5).down.float(), expected)
        assert model.audit().passed


# torchao


def by_torchao(tmp_path, config, dtype, of_experts: bool = True):
    from torchao.quantization import FqnToConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    sizes = dict(hidden_size=128, moe_intermediate_size=64, intermediate_size=128)
    tiny.build("qwen3_moe", dtype=dtype, **sizes).save_pretrained(tmp_path)
    if of_experts:
        names = (r"re:.*\.experts\.gate_up_proj", r"re:.*\.experts\.down_proj")
        config = FqnToConfig(dict.fromkeys(names, config))
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config), dtype=dtype)
    full = tiny.build("qwen3_moe", dtype=dtype, **sizes)
    for path, module in hf.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "dequantize") and type(parameter.data) is not torch.Tensor:
                getattr(full.get_submodule(path), name).data = parameter.dequantize()
    return hf, full


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_experts_quantised_by_torchao(name, dtype, tmp_path):
    import torchao.quantization

    hf, full = by_torchao(tmp_path, getattr(torchao.quantization, name)(), dtype)
    plain, dense = logits(hf, "eager"), logits(full, "eager")
    with moe.wrap(hf) as model, moe.wrap(full) as expected:
        assert model.plain_experts == {"eager"} and not model.exact
        run = model.run(IDS, read=list(model.points))
        mine, theirs = model.weights(LAYER, 5), expected.weights(LAYER, 5)
        assert torch.equal(mine.down, theirs.down) and torch.equal(mine.gate, theirs.gate)
        audit = model.audit()
    assert torch.equal(run.logits, plain)
    assert audit.passed, str(audit)
    if dtype is torch.float32:  # in bfloat16 rounding sends tokens to other experts
        assert error(run.logits, dense) < 1e-5
        assert error(gradient(hf), gradient(full)) < 1e-5
        assert error(gradient(hf, "resid_pre"), gradient(full, "resid_pre")) < 1e-5


@needs_torchao
def test_activations_that_torchao_rounds_have_no_gradient_and_it_is_refused(tmp_path):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    hf, _ = by_torchao(tmp_path, Int8DynamicActivationInt8WeightConfig(), torch.float32)
    plain = logits(hf, "eager")
    with moe.wrap(hf) as model:
        assert torch.equal(model.run(IDS).logits, plain)
        with pytest.raises(errors.BadInput, match="gradients would be wrong.*layers.0.mlp.experts.gate_up_proj, which"):
            model.run(IDS, read="expert_out", grad=True)
        audit = model.audit()
    assert audit.passed, str(audit)


@needs_torchao
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_linear_maps_quantised_by_torchao(name, tmp_path):
    import torchao.quantization

    hf, _ = by_torchao(tmp_path, getattr(torchao.quantization, name)(), torch.bfloat16, of_experts=False)
    plain = logits(hf, "grouped_mm")
    with moe.wrap(hf) as model:
        assert torch.equal(model.run(IDS, read=list(model.points)).logits, plain)
        audit = model.audit()
        assert audit.passed, str(audit)
        hf.model.layers[1].self_attn.q_proj.weight.scale.data.view(-1)[0] = torch.nan
        with pytest.raises(errors.BadCheckpoint, match="in model.layers.1.self_attn.q_proj.weight"):
            check_weights(hf)


# bitsandbytes


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_maps_quantised_by_bitsandbytes(bits, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.build("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    plain = logits(hf, "grouped_mm")
    with moe.wrap(hf) as model:
        assert torch.equal(model.run(IDS, read=list(model.points)).logits, plain)
        audit = model.audit()
    assert audit.passed, str(audit)
    assert error(plain.float(), logits(tiny.build("mixtral"), "grouped_mm")) > 1e-3
