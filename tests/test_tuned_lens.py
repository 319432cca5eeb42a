"""The tuned lens: against the slow reference, where the best map is known, resumed, stopped, stored and refused."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import moe_interp as moe
from moe_interp.analyses import tuned_lens as tuned_module
from moe_interp.analyses import tuned_training
from moe_interp.analyses.collect import Options, Pass
from moe_interp.analyses.tuned_lens import Translator, TunedLens, tuned_lens_quality
from moe_interp.analyses.tuned_training import train_tuned_lens
from moe_interp.data import Corpus
from moe_interp.errors import BadData, BadInput, BadOutput, UnknownName, UnsupportedModel
from moe_interp.results import load, save
from moe_interp.zoo import tuned_lens as zoo
from moe_interp.zoo.corpus_tokens import DOMAINS
from tests.reference import tuned_lens as reference
from tests.reference.model import forward
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import FAMILIES, build
from tests.tiny_types import build as build_type

TOLERANCE = 1e-5


def texts(count: int, seed: int) -> list[str]:
    """Random texts of the stub tokenizer's alphabet, 5 to 20 characters each."""
    rng = np.random.default_rng(seed)
    return ["".join(chr(33 + code) for code in rng.integers(0, 80, rng.integers(5, 21))) for _ in range(count)]


CORPUS = Corpus.from_texts({"a": texts(12, 0), "b": texts(12, 1)})
HELD_OUT = Corpus.from_texts({"a": texts(4, 2), "b": texts(4, 3)})
QUICK = dict(held_out=HELD_OUT, steps=12, every=4, batch_tokens=100, learning_rate=0.01)


def opened(family: str = "olmoe", **overrides):
    return moe.wrap(build(family, **overrides), StubTokenizer())


def random_lens(model, seed: int = 0, size: float = 0.05) -> TunedLens:
    zeros, generator = TunedLens.zeros(model), torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(one.shape, generator=generator) * size for one in (zeros.weight, zeros.bias))
    return replace(zeros, weight=weight, bias=bias)


# ---- what the lens says --------------------------------------------------------------------------------------


def test_a_translator_by_hand():
    translator = Translator(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([10.0, 20.0]))
    assert translator(torch.tensor([[1.0, 3.0]])).tolist() == [[17.0, 24.0]]
    assert translator.linear(torch.tensor([1.0, 3.0])).tolist() == [7.0, 4.0]
    assert translator(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    third = torch.tensor([1.0, 1.0], dtype=torch.float64) / 3
    assert translator(third).tolist() == [third[0] + 2 * third[0] + 10, third[0] + third[0] + 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_translators_at_zero_are_the_plain_lens_to_the_last_bit(dtype):
    with moe.wrap(build("deepseek_v3", dtype=dtype), StubTokenizer()) as model:
        zeros = TunedLens.zeros(model)
        plain, tuned = moe.expert_lens(model, "abcdefg"), moe.expert_lens(model, "abcdefg", lens=zeros)
        quality = tuned_lens_quality(model, zeros, HELD_OUT, resamples=10)
    for name in plain.data_vars:
        np.testing.assert_array_equal(plain[name], tuned[name])
    for name in ("kl", "agreement"):
        np.testing.assert_array_equal(quality[name].sel(lens="plain"), quality[name].sel(lens="tuned"))
        assert (quality[f"{name}_gain"] == 0).all() and (quality[f"{name}_gain_interval"] == 0).all()


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_parts_are_decoded_through_the_translators_that_the_reference_takes(family):
    hf = build(family)
    ids = torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(1))
    with moe.wrap(hf) as model:
        lens = random_lens(model)
        result = moe.expert_lens(model, ids, lens=lens)
    affines = [*zip(lens.weight, lens.bias, strict=True), (torch.zeros(64, 64), torch.zeros(64))]
    expected = reference.expert_lens(hf, ids, forward(hf, ids), affines)
    coords = [result[dim].values.tolist() for dim in ("layer", "part", "pos")]
    got = dict(zip(product(*coords), result["kl"].transpose("layer", "part", "pos").values.flat, strict=True))
    assert set(got) == set(expected)
    largest = max(expected.values())
    for key, value in expected.items():
        assert abs(got[key] - value) < TOLERANCE * largest, key
    assert result.attrs["provenance"].count('"lens": "tuned, ') == 1


def test_all_experts_together_are_the_layer_through_a_tuned_lens_too():
    with opened("qwen2_moe") as model:
        result = moe.expert_lens(model, "abcdef", lens=random_lens(model))
    whole, post = (result["kl"].sel(part=name) for name in ("resid_mid+c1..3+shared", "resid_post"))
    np.testing.assert_allclose(whole, post, atol=TOLERANCE)
    assert float(post.isel(layer=-1).max()) < TOLERANCE < float(post.isel(layer=0).min())


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_quality_equals_the_reference(family, monkeypatch):
    hf = build(family)
    tokenizer = StubTokenizer()
    monkeypatch.setattr(tuned_module, "CHUNK", 96 * 3)  # three tokens at a time
    with moe.wrap(hf, tokenizer) as model:
        lens = random_lens(model)
        result = tuned_lens_quality(model, lens, HELD_OUT, resamples=200, batch_tokens=50)
    zero = (torch.zeros(64, 64), torch.zeros(64))
    lenses = {"plain": [zero] * 4, "tuned": list(zip(lens.weight, lens.bias, strict=True))}
    kl, agree = ({name: np.zeros((8, 4)) for name in lenses} for _ in range(2))
    tokens = np.zeros(8)
    for number, text in enumerate(HELD_OUT.texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        run, tokens[number] = forward(hf, ids), ids.shape[1]
        for name, layer, position in product(lenses, range(4), range(ids.shape[1])):
            at = (hf, run, layer, position, lenses[name][layer])
            kl[name][number, layer] += reference.kl(*at)
            agree[name][number, layer] += reference.agrees(*at)
    for name in lenses:
        np.testing.assert_allclose(result["kl"].sel(lens=name), kl[name].sum(0) / tokens.sum(), rtol=1e-4)
        np.testing.assert_allclose(result["agreement"].sel(lens=name), agree[name].sum(0) / tokens.sum(), rtol=1e-6)
    gain = (kl["plain"] - kl["tuned"]).sum(0) / tokens.sum()
    np.testing.assert_allclose(result["kl_gain"], gain, rtol=1e-3, atol=1e-4)
    assert int(result["tokens"]) == tokens.sum() and int(result["documents"]) == 8
    low, high = result["kl_gain_interval"].values
    assert (low < gain).all() and (gain < high).all()
    # Pairs of one document: narrower than two intervals apart.
    apart = sum(np.diff(result["kl_interval"].sel(lens=name).values, axis=0)[0] for name in lenses)
    assert (high - low < apart).all()


def test_special_tokens_do_not_count():
    class Special(StubTokenizer):
        all_special_ids = (3 + ord("!") - 32,)

    with moe.wrap(build("olmoe"), Special()) as model:
        lens = random_lens(model)
        with_them = Corpus.from_texts({"a": ["ab!cd", "!efg"]})
        assert int(tuned_lens_quality(model, lens, with_them, resamples=5)["tokens"]) == 7
        only = Corpus.from_texts({"a": ["!!!!"]})
        with pytest.raises(BadInput, match="nothing to measure"):
            tuned_lens_quality(model, lens, only)
        with pytest.raises(BadInput, match="nothing held out"):
            train_tuned_lens(model, CORPUS, held_out=only)


# ---- training ------------------------------------------------------------------------------------------------


def training_of(model, **changes):
    plan = tuned_training._Plan(**{**dict(
        steps=10, learning_rate=0.01, every=5, patience=2, seed=0, max_tokens=None, batch_tokens=60,
    ), **changes})  # fmt: skip
    return tuned_training._Training(model, TunedLens.zeros(model), CORPUS, HELD_OUT, plan)


@pytest.mark.parametrize("chunk", [96 * 4, 2**21])
def test_the_gradient_is_that_of_the_reference(chunk, monkeypatch):
    hf = build("deepseek_v3")
    monkeypatch.setattr(tuned_module, "CHUNK", chunk)
    with moe.wrap(hf, StubTokenizer()) as model:
        training = training_of(model)
        lens = random_lens(model)
        with torch.no_grad():
            for own, given in zip(training.weights + training.biases, [*lens.weight, *lens.bias], strict=True):
                own.copy_(given)
        scales = training.scales.clone()
        training.update([0, 5, 7])
    documents = [torch.tensor([training.documents[number]]) for number in (0, 5, 7)]
    runs = [forward(hf, ids) for ids in documents]
    total = sum(ids.shape[1] for ids in documents)

    def loss(layer: int, weight: torch.Tensor, bias: torch.Tensor) -> float:
        affine = (weight.double(), bias.double() * scales[layer].double())
        positions = ((run, at) for run in runs for at in range(run.logits.shape[1]))
        return sum(reference.kl(hf, run, layer, at, affine) for run, at in positions) / total

    step = 1e-4
    for layer, (row, column) in product((0, 3), [(0, 0), (5, 60)]):
        for given, got in (
            (lens.weight[layer], training.weights[layer].grad[row, column]),
            (lens.bias[layer], training.biases[layer].grad[row]),
        ):
            ends = []
            for sign in (1, -1):
                moved = given.double().clone()
                moved[(row, column)[: moved.dim()]] += sign * step
                pair = (moved, lens.bias[layer]) if given.dim() == 2 else (lens.weight[layer], moved)
                ends.append(loss(layer, *pair))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert abs(slope) > 1e-5 and abs(got.item() - slope) < 1e-3 * abs(slope) + 1e-6
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_the_first_step_of_adam_is_the_learning_rate_and_the_last_is_small():
    with opened() as model:
        training = training_of(model)
        training.update([0, 1, 2])
        first = training.weights[2].detach().clone()
        for _ in range(8):
            training.update([0, 1, 2])
        before = training.weights[2].detach().clone()
        training.update([0, 1, 2])
        last = (training.weights[2].detach() - before).abs().max()
    torch.testing.assert_close(first.abs().median(), torch.tensor(0.01), rtol=1e-3, atol=0)
    assert 0 < last < 0.0012 and training.ended


def test_biases_are_in_units_of_the_stream():
    with opened() as model:
        training = training_of(model)
        run = model.run(training.held.batches[0].inputs, read=["resid_pre"])
        rms = [run["resid_pre", layer][run.mask].square().mean().sqrt() for layer in range(4)]
        torch.testing.assert_close(training.scales, torch.stack(rms))
        training.update([0, 1, 2])
        translator = training._translator(1)
    torch.testing.assert_close(translator.bias.abs().median(), 0.01 * rms[1], rtol=1e-2, atol=0)


def test_training_reaches_a_map_that_is_known():
    """All blocks write nothing, and a map between layers 0 and 1 turns the stream: the map is the best translator."""
    hf = build("olmoe", hidden_size=16, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    shift = 0.5 * torch.randn(16, generator=generator)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()

    def after(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        turned = hidden @ turn.T + shift
        return (turned, *output[1:]) if isinstance(output, tuple) else turned

    handle = hf.model.layers[0].register_forward_hook(after)
    with moe.wrap(hf, StubTokenizer()) as model:
        lens = train_tuned_lens(model, CORPUS, held_out=HELD_OUT, steps=150, every=25, learning_rate=0.05)
        quality = tuned_lens_quality(model, lens, HELD_OUT, resamples=20)
    handle.remove()
    plain, tuned = (quality["kl"].sel(lens=name).values for name in ("plain", "tuned"))
    assert plain[0] > 1 and tuned[0] < 0.02
    assert plain[1] < 1e-6 and tuned[1] < 1e-6
    # The final norm undoes the length, so that the direction is what is known.
    hidden = hf.model.embed_tokens.weight.detach()[3:90]
    best = hidden @ turn.T + shift
    assert torch.cosine_similarity(lens.into(0)(hidden), best, dim=-1).mean() > 0.97
    assert torch.cosine_similarity(hidden, best, dim=-1).mean() < 0.5


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("olmoe", torch.bfloat16)]
)
def test_every_family_gains_at_every_layer(family, dtype):
    hf = build(family, dtype=dtype)
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    with moe.wrap(hf, StubTokenizer()) as model:
        lens = train_tuned_lens(model, CORPUS, **QUICK)
        quality = tuned_lens_quality(model, lens, CORPUS, resamples=20)
    assert lens.layers == (0, 1, 2, 3) and lens.model_type == hf.config.model_type
    assert (quality["kl_gain"] > 0).all()
    assert quality["kl"].dims == ("lens", "layer")
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_the_seed_decides():
    with opened() as model:
        first, again = (train_tuned_lens(model, CORPUS, **QUICK) for _ in range(2))
        other = train_tuned_lens(model, CORPUS, **QUICK, seed=1)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_it_trains_where_gradients_are_off_too():
    with opened() as model, torch.no_grad():
        assert (train_tuned_lens(model, CORPUS, **QUICK).weight != 0).any()


def test_every_epoch_has_every_document_once_in_another_order():
    with opened() as model:
        training = training_of(model)
        lengths = [len(ids) for ids in training.documents]
        epochs, taken = [[]], training.groups()
        while len(epochs) < 3:
            group = next(taken)
            assert len(group) == 1 or max(lengths[number] for number in group) * len(group) <= 60
            epochs[-1] += group
            if len(epochs[-1]) == len(lengths):
                epochs.append([])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24)) and epochs[0] != epochs[1]
    stub = StubTokenizer()
    assert training.documents == [stub(text)["input_ids"] for text in CORPUS.texts]


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    monkeypatch.setattr(tuned_module, "CHUNK", 96 * 5)
    hf = build("olmoe")
    sizes: list[int] = []
    with moe.wrap(hf, StubTokenizer()) as model:
        training = training_of(model)
        handle = hf.model.norm.register_forward_pre_hook(lambda _, args: sizes.append(args[0][..., 0].numel()))
        training.update([0, 1, 2])
        handle.remove()
    total = sum(len(training.documents[number]) for number in (0, 1, 2))
    assert max(sizes[1:]) == 5 and sum(sizes[1:]) == 4 * total  # after the forward pass itself


# ---- held-out documents, stopping, resuming ------------------------------------------------------------------


def test_every_tenth_document_is_held_out_and_never_trained_on():
    repeated = replace(CORPUS, documents=(*CORPUS.documents, CORPUS.documents[10]))
    rest, held = tuned_training._apart(repeated, None)
    assert held.texts == [CORPUS.texts[number] for number in (0, 10, 20)]
    assert rest.texts == [text for number, text in enumerate(CORPUS.texts) if number not in (0, 10, 20)]
    with opened() as model:
        lens = train_tuned_lens(model, CORPUS, steps=1)
    assert (lens.provenance["documents"], lens.provenance["held_out_documents"]) == (21, 3)


def test_what_is_held_out_decides_and_each_layer_keeps_its_best(monkeypatch):
    seen: list[np.ndarray] = []
    real = tuned_training.measure

    def recording(*args):
        sums = real(*args)
        seen.append(sums.kl[:, 0].sum(0) / sums.tokens.sum())
        return sums

    monkeypatch.setattr(tuned_training, "measure", recording)
    options = {**QUICK, "steps": 24, "learning_rate": 0.2}
    with opened() as model:
        lens = train_tuned_lens(model, CORPUS, **options)
        kept = [lens.into(layer) for layer in lens.layers]
        going = Pass(model, HELD_OUT, Options(batch_tokens=100))
        runs = going.runs(tuned_module.stream_reads(lens.layers), "again", output=True)
        again = real(model, [kept], lens.layers, runs, len(HELD_OUT))
    best = np.min(seen, axis=0)
    assert (np.argmin(seen, axis=0) < len(seen) - 1).any()  # some layer was better before the end
    np.testing.assert_allclose(again.kl[:, 0].sum(0) / again.tokens.sum(), best, rtol=1e-4)


def test_it_stops_when_no_layer_improves():
    with opened() as model:
        lens = train_tuned_lens(model, CORPUS, **{**QUICK, "steps": 40, "learning_rate": 100.0}, patience=2)
    assert lens.provenance["steps_taken"] == 8  # two checks, four steps apart
    assert (lens.weight == 0).all() and (lens.bias == 0).all()  # the plain lens was best
    assert lens.provenance["held_out_kl"] == lens.provenance["held_out_kl_plain"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [2, 6, 11])
def test_a_killed_training_goes_on_to_the_same_bits(at, tmp_path, monkeypatch):
    path = tmp_path / "state"
    real = tuned_training._Training.update
    steps: list[int] = []

    def counting(self, documents):
        steps.append(self.step)
        real(self, documents)

    def dying(self, documents):
        if self.step == at:
            raise Killed
        real(self, documents)

    with opened("deepseek_v3") as model:
        whole = train_tuned_lens(model, CORPUS, **QUICK)
        monkeypatch.setattr(tuned_training._Training, "update", dying)
        with pytest.raises(Killed):
            train_tuned_lens(model, CORPUS, **QUICK, state=path)
        assert [one.name for one in tmp_path.iterdir()] == ["state"]
        monkeypatch.setattr(tuned_training._Training, "update", counting)
        resumed = train_tuned_lens(model, CORPUS, **QUICK, state=path)
        assert steps == list(range(at - at % 4, 12))
        ended = train_tuned_lens(model, CORPUS, **QUICK, state=path)
        assert steps[-1] == 11 and len(steps) == 12 - (at - at % 4)
    for lens in (resumed, ended):
        assert torch.equal(lens.weight, whole.weight) and torch.equal(lens.bias, whole.bias)
        assert lens.provenance == whole.provenance


def test_a_state_of_another_training_is_refused(tmp_path):
    path, broken = tmp_path / "state", tmp_path / "broken"
    broken.write_bytes(b"not a state")
    torch.save({"step": 3}, tmp_path / "other")
    with opened() as model:
        train_tuned_lens(model, CORPUS, **QUICK, state=path)
        for change in (dict(seed=1), dict(held_out=Corpus.from_texts({"a": texts(4, 9)})), dict(learning_rate=0.02)):
            with pytest.raises(BadData, match="state is of another training.*Name another file"):
                train_tuned_lens(model, CORPUS, **{**QUICK, **change}, state=path)
        for file in (broken, tmp_path / "other"):
            with pytest.raises(BadData, match="cannot read .*expected the state of a training"):
                train_tuned_lens(model, CORPUS, **QUICK, state=file)
        with pytest.raises(BadOutput, match="cannot write"):
            train_tuned_lens(model, CORPUS, **QUICK, state=tmp_path / "nowhere" / "state")
    with moe.wrap(build("olmoe", seed=1), StubTokenizer()) as model, pytest.raises(BadData, match="another training"):
        train_tuned_lens(model, CORPUS, **QUICK, state=path)


def test_a_state_that_lacks_something_is_refused(tmp_path):
    path = tmp_path / "state"
    with opened() as model:
        lens = train_tuned_lens(model, CORPUS, **QUICK, state=path)
        whole = torch.load(path, weights_only=True)
        broken = [{name: value for name, value in whole.items() if name != left} for left in whole]
        broken += [{**whole, name: None} for name in whole if name != "mark"]
        broken += [{**whole, name: whole[name][:-1]} for name in ("translators", "best", "best_kl", "plain_kl")]
        broken += [{**whole, "translators": [one[..., :1] for one in whole["translators"]]}]
        broken += [{**whole, "best": [(weight[:1], bias) for weight, bias in whole["best"]]}]
        broken += [{**whole, "optimizer": {**whole["optimizer"], "state": {}}}, [whole], None]
        for state in broken:
            torch.save(state, path)
            with pytest.raises(BadData, match="cannot read .*expected the state of a training"):
                train_tuned_lens(model, CORPUS, **QUICK, state=path)
        torch.save(whole, path)
        assert torch.equal(train_tuned_lens(model, CORPUS, **QUICK, state=path).weight, lens.weight)


def test_a_training_under_standing_edits_is_not_taken_up(tmp_path):
    path = tmp_path / "state"
    with opened() as model:
        with model.edit(moe.ablate(layer=model.layers[0], expert=1)):
            with pytest.raises(BadInput, match="a training under edits cannot be taken up.*got 1 active edits"):
                train_tuned_lens(model, CORPUS, **QUICK, state=path)
            edited = train_tuned_lens(model, CORPUS, **QUICK)
        assert not path.exists()
        assert not torch.equal(edited.weight, train_tuned_lens(model, CORPUS, **QUICK, state=path).weight)


# ---- files and models that do not fit ------------------------------------------------------------------------


def test_a_lens_survives_its_file(tmp_path):
    with opened("qwen2_moe") as model:
        lens = replace(random_lens(model), provenance={**model.provenance(), "steps": 3, "note": "é"})
        again = TunedLens.load(lens.save(tmp_path / "lens.safetensors"))
        halved = TunedLens.load(lens.save(tmp_path / "half.safetensors", torch.float16))
        assert all(torch.equal(getattr(again, name), getattr(lens, name)) for name in ("weight", "bias", "signature"))
        for name in ("layers", "model", "model_type", "provenance"):
            assert getattr(again, name) == getattr(lens, name) == getattr(halved, name)
        assert not torch.equal(halved.weight, lens.weight)
        torch.testing.assert_close(halved.weight, lens.weight, rtol=1e-3, atol=1e-6)
        result = moe.expert_lens(model, "abc", lens=again)
        assert result.identical(moe.expert_lens(model, "abc", lens=lens))
        quality = tuned_lens_quality(model, lens, HELD_OUT, resamples=5)
        assert quality.identical(load(save(quality, tmp_path / "quality.nc")))
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "lens.safetensors").stat().st_size


def test_what_cannot_be_stored_or_read_is_told(tmp_path):
    with opened() as model:
        lens = random_lens(model)
    with pytest.raises(BadOutput, match="cannot write"):
        lens.save(tmp_path / "nowhere" / "lens.safetensors")
    with pytest.raises(BadInput, match="cannot be stored.*float16"):
        replace(lens, weight=lens.weight * 1e7).save(tmp_path / "lens.safetensors", torch.float16)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "noise").write_bytes(b"noise" * 100)
    save_file({"weight": torch.zeros(1)}, tmp_path / "tensors")
    for name in ("nothing", "noise", "tensors"):
        with pytest.raises(BadData, match=f"cannot read .*{name}.*expected a file that TunedLens.save wrote"):
            TunedLens.load(tmp_path / name)
    with pytest.raises(BadInput, match="do not fit each other.*L = 4 and D = 64.*got .*3 layers"):
        replace(lens, layers=(0, 1, 2))
    with pytest.raises(BadInput, match="finite"):
        replace(lens, bias=lens.bias / 0.0)


OTHERS = [
    (("qwen3_moe", {}), "expected olmoe, 64 wide, layers 0 to 3, got qwen3_moe, 64 wide"),
    (("olmoe", {"hidden_size": 32}), "got olmoe, 32 wide"),
    (("olmoe", {"num_hidden_layers": 3}), "got olmoe, 64 wide, layers 0 to 2"),
    (("olmoe", {"seed": 1}), "expected the final norm and unembedding of mine, got other ones"),
    (("olmoe", {"vocab_size": 97}), "got other ones"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_another_model_is_refused(other, message):
    with moe.wrap(build("olmoe"), StubTokenizer(), name="mine") as model:
        lens = TunedLens.zeros(model)
    family, overrides = other
    with moe.wrap(build(family, **overrides), StubTokenizer(), name="theirs") as model:
        says = f"the tuned lens of mine does not fit theirs: .*{message}.*moe.train_tuned_lens"
        for use in (lambda: moe.expert_lens(model, "abc", lens=lens), lambda: tuned_lens_quality(model, lens, CORPUS)):
            with pytest.raises(BadInput, match=says):
                use()


def test_the_same_model_under_another_name_and_dtype_is_taken():
    with moe.wrap(build("olmoe"), StubTokenizer(), name="mine") as model:
        lens = TunedLens.zeros(model)
    with moe.wrap(build("olmoe", dtype=torch.bfloat16), StubTokenizer(), name="copy") as model:
        lens.check(model)


def test_models_that_the_lens_cannot_decode_are_refused():
    for model_type, message in {
        "deepseek_v4": "expected one stream.*got 4 streams",
        "switch_transformers": "no next token to predict",
    }.items():
        with moe.wrap(build_type(model_type), StubTokenizer()) as model:
            with pytest.raises(UnsupportedModel, match=message):
                train_tuned_lens(model, CORPUS)
            with pytest.raises(UnsupportedModel, match=message):
                TunedLens.zeros(model)
    with opened() as model:
        lens = TunedLens.zeros(model)
        model.spec = replace(model.spec, final=None)
        with pytest.raises(UnsupportedModel, match="got logits that use earlier ones too"):
            lens.check(model)


BAD = [
    (dict(steps=0), "invalid steps for train_tuned_lens"),
    (dict(every=0), "invalid every"),
    (dict(patience=-1), "invalid patience"),
    (dict(learning_rate=0.0), "invalid learning_rate .*: expected a finite number above 0, got 0.0"),
    (dict(held_out=Corpus.from_texts({"b": CORPUS.texts[:2]})), "documents on both sides.*got 2 that are"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_a_training_that_cannot_be_is_told(wrong, message):
    with opened() as model, pytest.raises(BadInput, match=message):
        train_tuned_lens(model, CORPUS, **{**QUICK, **wrong})


def test_logits_of_minus_infinity_are_trained_beside():
    hf = build("olmoe")
    handle = hf.lm_head.register_forward_hook(lambda _, args, out: out.index_fill(-1, torch.tensor([7]), -torch.inf))
    with moe.wrap(hf, StubTokenizer()) as model:
        lens = train_tuned_lens(model, CORPUS, **QUICK)
        found = tuned_lens_quality(model, lens, HELD_OUT, resamples=10)
    assert all(np.isfinite(found[name]).all() for name in found if name.startswith("kl"))
    handle.remove()


def test_too_little_to_train_on_is_told():
    with opened() as model, pytest.raises(BadInput, match="too few documents.*two different texts"):
        train_tuned_lens(model, Corpus.from_texts({"a": ["one", "one"]}))

    class Silent(StubTokenizer):
        def __call__(self, text, verbose=True):
            return super().__call__(text.replace("?", ""))

    with moe.wrap(build("olmoe"), Silent()) as model, pytest.raises(BadInput, match="document 'a/0' has no tokens"):
        train_tuned_lens(model, Corpus.from_texts({"a": ["?"]}), held_out=HELD_OUT)
    with moe.wrap(build("olmoe")) as model, pytest.raises(BadInput, match="needs a tokenizer"):
        train_tuned_lens(model, CORPUS)


def test_layers_and_definitions_without_a_translator_are_told():
    with opened() as model:
        lens = TunedLens.zeros(model)
        with pytest.raises(BadInput, match="cannot be used as coded"):
            moe.expert_lens(model, "abc", definition="as_coded", lens=lens)
    for use in (lens.into, lens.out_of):
        with pytest.raises(UnknownName, match="no layer 4.*\\[0, 1, 2, 3\\]"):
            use(4)
    assert torch.equal(lens.out_of(1).weight, lens.into(2).weight)


# ---- the bundled lens ----------------------------------------------------------------------------------------


def test_an_unknown_bundled_lens_is_told():
    with pytest.raises(UnknownName, match="no bundled tuned lens 'gpt'.*reference.*TunedLens.load"):
        moe.tuned_lens("gpt")


def test_the_bundled_lens_is_trained_on_texts_that_are_not_held_out(tmp_path):
    (tmp_path / "train").mkdir()
    for domain in DOMAINS:
        own = [f"{domain} {number}" for number in range(zoo.HELD_OUT + 2)]
        lines = [json.dumps({"text": text}) for text in [*own, own[0]]]  # the first once more, beyond those held out
        (tmp_path / "train" / f"{domain}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    corpus, held_out = zoo.split(tmp_path)
    assert held_out.texts == [f"{domain} {number}" for domain in DOMAINS for number in range(zoo.HELD_OUT)]
    assert corpus.texts == [f"{domain} {zoo.HELD_OUT + number}" for domain in DOMAINS for number in range(2)]


def test_its_table_has_the_figures():
    with opened() as model:
        quality = tuned_lens_quality(model, random_lens(model), HELD_OUT, resamples=20)
    at = quality.sel(layer=2)
    low, high = at["kl_gain_interval"].values
    row = zoo.table(quality).splitlines()[4]
    plain, tuned = (float(at["kl"].sel(lens=lens)) for lens in ("plain", "tuned"))
    assert row.startswith(f"| 2 | {plain:.3f} | {tuned:.3f} | {plain - tuned:.3f} [{low:.3f}, {high:.3f}] | ")
    assert row.count("|") == 8
