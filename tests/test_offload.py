"""Models whose parameters accelerate keeps on disk: everything is bit-equal to the same model in memory."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload

import moe_interp as moe
from moe_interp import errors
from moe_interp.adapters.formats import check_weights
from moe_interp.audit import audit as audit_of
from tests import tiny, tiny_types

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
LAYER = 2
# Fused with gated shared experts; transposed with biases; blocks and experts whose forward is replaced on the instance;
# experts as modules of their own; parameters on the layer.
TYPES = ("qwen2_moe", "gpt_oss", "step3p7", "dbrx", "llama4_text", "switch_transformers", "doge", "jetmoe")


def inputs(hf) -> dict[str, torch.Tensor]:
    return tiny_types.inputs(hf, length=12)


def offloaded(model_type: str, folder) -> torch.nn.Module:
    hf = tiny_types.build(model_type)
    parts: list[torch.nn.Module] = [hf]
    if model_type == "llama4_text":  # it moves its ids to where the embedding's parameters are
        parts = [hf.model.layers]
    if model_type == "jetmoe":  # its attention reads parameters of a module that it does not call
        parts = [layer.mlp for layer in hf.model.layers]
    for number, part in enumerate(parts):
        disk_offload(part, str(folder / str(number)), execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in part.parameters())
    return hf


@pytest.mark.parametrize("model_type", TYPES)
def test_everything_is_bit_equal_to_the_model_in_memory(model_type, tmp_path):
    hf, there = offloaded(model_type, tmp_path), tiny_types.build(model_type)
    edit = moe.apply("expert_out", lambda value: value * 1.5)
    with moe.wrap(hf) as model, moe.wrap(there) as expected:
        given, layer = inputs(there), expected.layers[-1]
        assert model.device == torch.device("cpu")
        mine, theirs = (one.run(given, read=list(one.points), edit=edit) for one in (model, expected))
        assert torch.equal(mine.output, theirs.output)
        assert set(mine.values) == set(theirs.values)
        for key, value in theirs.values.items():
            assert torch.equal(mine.values[key], value)
        rows, ids = theirs["moe_in", layer], theirs.routing[layer].ids
        assert torch.equal(model.experts(layer)(rows, ids), expected.experts(layer)(rows, ids))
        for one, other in zip(*(vars(m.weights(layer, 1)).values() for m in (model, expected)), strict=True):
            assert one is other is None or torch.equal(one, other)
    assert not torch.equal(mine.output, expected_clean(there, given))
    assert all(parameter.is_meta for parameter in hf.get_submodule(model.spec.moe(layer).experts).parameters())


def expected_clean(hf, given) -> torch.Tensor:
    with moe.wrap(hf) as model:
        return model.run(given).output


@pytest.mark.parametrize("model_type", ["qwen2_moe", "llama4_text", "jetmoe"])
def test_the_audit_of_an_offloaded_model_passes(model_type, tmp_path):
    with moe.wrap(offloaded(model_type, tmp_path)) as model:
        audit = audit_of(model)
    assert audit.passed, str(audit)
    assert ("bit-equal" in audit.checks[1].name) == (model_type == "qwen2_moe")


def test_a_device_map_with_cpu_and_disk(tmp_path):
    source = tiny.build("qwen3_moe")
    source.save_pretrained(tmp_path / "model")
    where = {"model.embed_tokens": "disk", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    where |= {f"model.layers.{index}": "cpu" if index == 0 else "disk" for index in range(4)}
    options = {"device_map": where, "offload_folder": str(tmp_path / "away"), "dtype": torch.float32}
    with moe.load(tmp_path / "model", **options) as model, moe.wrap(source) as expected:
        assert {name for name, one in model.hf.named_parameters() if one.is_meta} > {"model.embed_tokens.weight"}
        edit = moe.ablate(layer=LAYER, expert=3)
        given = {"edit": edit, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(IDS, **given), expected.generate(IDS, **given))
        mine, theirs = (one.run(IDS, read=["expert_out"], grad=True) for one in (model, expected))
        gradients = [
            torch.autograd.grad(run.logits.sum(), run.values["expert_out", LAYER])[0] for run in (mine, theirs)
        ]
        assert torch.equal(mine.logits, theirs.logits)
        assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * gradients[1].abs().max()


def test_an_embedding_kept_in_cpu_memory(tmp_path):
    hf = tiny.build("olmoe")
    with moe.wrap(hf) as model:
        expected = model.run(IDS).logits
    cpu_offload(hf, execution_device=torch.device("cpu"))
    with moe.wrap(hf) as model:
        assert torch.equal(model.run(IDS).logits, expected)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.experts.down_proj", "model.norm.weight"])
def test_weights_on_disk_that_are_not_finite_are_found(name, tmp_path):
    hf = tiny.build("olmoe")
    hf.get_parameter(name).data.view(-1)[3] = torch.nan
    disk_offload(hf, str(tmp_path), execution_device=torch.device("cpu"))
    with moe.wrap(hf) as model, pytest.raises(errors.BadCheckpoint, match=f"1 NaN or infinite values in {name}"):
        check_weights(model.hf)


def test_one_experts_matrices_do_not_keep_the_whole_layer(tmp_path):
    with moe.wrap(offloaded("gpt_oss", tmp_path)) as model:
        down = model.weights(LAYER, 1).down
    assert down.untyped_storage().nbytes() == down.numel() * down.element_size()


def test_a_model_without_weights_is_told_so():
    with pytest.raises(errors.BadInput, match="a model without weights.*on the meta device, such as model.emb"):
        moe.wrap(tiny.build("olmoe").to("meta"))
    with moe.wrap(tiny.build("olmoe")) as model:
        model.hf.to("meta")
        for use in (lambda: model.weights(LAYER, 1), model.audit, lambda: check_weights(model.hf)):
            with pytest.raises(errors.UnsupportedModel, match="parameters are not in memory.*no hook that brings them"):
                use()
