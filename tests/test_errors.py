"""Bad input: every refusal names what, expected, got and the next step, and leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_interp as moe
from moe_interp import errors
from moe_interp.model import listed
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build
from tests.tiny_types import build as build_type
from tests.tiny_types import inputs as type_inputs

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def model():
    with moe.wrap(build("qwen3_moe")) as opened:
        yield opened


def test_a_message_reads_what_expected_got_and_what_to_do():
    error = errors.BadInput("no such thing", expected="this", got="that", do="Do so.")
    assert str(error) == "no such thing: expected this, got that. Do so."
    assert (error.what, error.expected, error.got, error.do) == ("no such thing", "this", "that", "Do so.")
    assert issubclass(errors.BadInput, moe.MoEError)


def test_unknown_model_type():
    hf = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(
        errors.UnsupportedModel,
        match=r"model type 'gpt2' is dense: expected a mixture-of-experts model, .*transformer.*register_adapter",
    ):
        moe.wrap(hf)
    assert not hasattr(hf, "moe_points")


def test_dense_model_of_a_known_type():
    config = Qwen3MoeConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=20,
        intermediate_size=16, mlp_only_layers=[0, 1],
    )  # fmt: skip
    with pytest.raises(errors.UnsupportedModel, match="qwen3_moe model without experts: expected at least one mixture"):
        moe.wrap(Qwen3MoeForCausalLM(config))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ("expert_output", "unknown point 'expert_output': expected one of embed, .*expert_out"),
        ("shared_out", "qwen3_moe has no point 'shared_out': expected one of"),
        (moe.select("expert_out", layers=9), "unknown layer 9: expected a layer from 0 to 3"),
        (moe.select("expert_out", layers=1), r"no point 'expert_out' at layer 1: expected a layer of \[0, 2, 3\]"),
        (["moe_in", moe.select("moe_in", layers=2)], "'moe_in' is read twice at layer 2"),
        (moe.select("moe_in", positions=8), "no position 8 in text 0: expected a position from -8 to 7"),
    ],
)
def test_reads_that_cannot_be(model, read, message):
    with pytest.raises(moe.MoEError, match=message):
        model.run(IDS, read=read)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: moe.ablate(layer=2, expert=8), "unknown expert 8 at layer 2: expected an expert from 0 to 7"),
        (lambda: moe.ablate(layer=1, expert=0), r"layer 1 has no experts: expected one of the MoE layers \[0, 2, 3\]"),
        (lambda: moe.ablate(layer=7, expert=0), "unknown layer 7"),
        (lambda: moe.top_k(0), "cannot keep fewer than one expert"),
        (lambda: moe.top_k(9), "cannot keep 9 experts at layer 0: expected k up to 8, got k = 9"),
        (lambda: moe.apply("moe_out", torch.neg, positions=[0, 50]), r"can never touch anything.*got positions \[50\]"),
        (lambda: moe.apply("moe_out", torch.neg, layers=[]), "no layers or positions: expected at least one"),
        (lambda: moe.apply("router_scores", torch.neg), "point 'router_scores' cannot be edited.*Edit 'router_logits'"),
        (
            lambda: moe.apply("moe_out", lambda v: v[:1]),
            r"returned the wrong thing: expected a torch.float32 tensor of shape",
        ),
        (lambda: moe.apply("moe_out", lambda v: v.double()), "got a torch.float64 tensor"),
        (lambda: moe.apply("moe_out", lambda v: None), "got NoneType"),
        (lambda: moe.apply("expert_ids", lambda v: v + 100), "not expert ids: expected integers from 0 to 7"),
        (lambda: moe.ablate(layer=2, expert=0, positions=20), "an edit can never touch anything.*within the 8 tokens"),
    ],
)
def test_edits_that_cannot_be(model, edit, message):
    clean = model.run(IDS).logits
    with pytest.raises(moe.MoEError, match=message):
        model.run(IDS, edit=edit())
    assert torch.equal(model.run(IDS).logits, clean)


def test_routers_that_are_to_choose_more_experts_than_there_are():
    hf = build("olmoe", num_experts=4, num_experts_per_tok=6)
    with pytest.raises(
        errors.UnsupportedModel, match="layer 0 chooses more .*: expected top-k of 1 to 4 .*, got top-6"
    ):
        moe.wrap(hf)
    with moe.wrap(build("olmoe", num_experts=4, num_experts_per_tok=4)) as model:
        assert model.run(IDS).routing[0].ids.sort(-1).values.unique(dim=1).tolist() == [[[0, 1, 2, 3]]] * 2


def test_values_of_two_texts_are_not_patched_into_one(model):
    run = model.run(IDS, read="moe_out")
    message = "values of other texts: expected values of one text, got values of 2. Take them from a run of one text"
    with pytest.raises(errors.BadInput, match=message):
        model.run(IDS[:1], edit=moe.patch(run, layer=2, point="moe_out"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("hello", r"text needs a tokenizer: expected token ids, got text. Pass one to moe.wrap"),
        (torch.zeros(2, 3), "not token ids: expected integers"),
        (torch.zeros(1, 0, dtype=torch.long), "not token ids"),
        (torch.tensor([[96]]), "token id out of the vocabulary: expected ids from 0 to 95, got 96 to 96"),
        (torch.zeros(1, 129, dtype=torch.long), "text over the context length: expected at most 128 tokens, got 129"),
        ([[1, 2], []], "a text without a real token"),
        ([[1, 2], [96]], "token id out of the vocabulary"),
        ({"input_ids": IDS, "attention_mask": torch.zeros(2, 8)}, "a text without a real token"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, "ids and mask differ"),
        ({"attention_mask": torch.ones(2, 5)}, "no tokens in the model inputs: expected 'input_ids'"),
        (
            {"input_ids": IDS, "position_ids": torch.arange(3)[None]},
            r"position_ids do not fit.*\[..., 8\].*got \(1, 3\)",
        ),
        ({"input_ids": IDS, "labels": IDS[0]}, r"labels do not fit the ids: expected \(2, 8\), .*got \(8,\)"),
        (IDS.to("meta"), "'input_ids' has no values: expected a tensor in memory, got one on the meta device"),
    ],
)
def test_inputs_that_cannot_be(model, inputs, message):
    with pytest.raises(errors.BadInput, match=message):
        model.run(inputs)


def test_generations_that_cannot_be(model):
    for mask in (torch.ones(1, 1, 8, 8), torch.ones(1, 8, 8)):
        with pytest.raises(errors.BadInput, match=r"cannot generate under this mask: expected one of \[batch, pos\]"):
            model.generate({"input_ids": IDS[:1], "attention_mask": mask}, max_new_tokens=1)
    for new in (0, -1, 1.5, "3", True, float("nan")):
        with pytest.raises(errors.BadInput, match=f"invalid max_new_tokens: expected .* at least 1, got {new!r}"):
            model.generate(IDS, max_new_tokens=new)


@pytest.mark.parametrize("hidden", [torch.ones(3), torch.ones(2, 63), torch.zeros(0), torch.ones(64, device="meta")])
def test_what_is_no_residual_stream_is_not_decoded(model, hidden):
    with pytest.raises(errors.BadInput, match=r"not a residual stream: expected \[..., 64\], got torch.float32 values"):
        model.decode(hidden)


def test_nan_in_weights_is_told_under_edits_too():
    hf = build("olmoe")
    hf.model.layers[1].mlp.experts.down_proj.data.fill_(torch.nan)
    with moe.wrap(hf) as opened, pytest.raises(errors.BadCheckpoint, match="weights are not finite"):
        opened.run(IDS, edit=moe.ablate(layer=0, expert=0))


def test_empty_texts():
    with moe.wrap(build("olmoe"), StubTokenizer()) as opened:
        for text in ("", "  \n"):
            with pytest.raises(errors.BadInput, match="text 0 is empty"):
                opened.run(text)


@pytest.mark.parametrize("given", [["ablate"], None, 3])
def test_what_is_neither_a_read_nor_an_edit(given):
    with pytest.raises(errors.BadInput, match="interventions such as moe.ablate"):
        listed(given, moe.Intervention)


def test_a_run_says_what_it_holds(model):
    run = model.run(IDS, read=["moe_in", "embed", moe.select("resid_post", layers=3, top=2)])
    with pytest.raises(errors.UnknownName, match=r"run holds no 'expert_out' at layer 2.*moe_in.*read=\[...\]"):
        run["expert_out", 2]
    which = r"which layer of 'moe_in': expected a layer at which it was read: \[0, 2, 3\], got "
    with pytest.raises(errors.UnknownName, match=which + "none$"):
        run["moe_in"]
    with pytest.raises(errors.UnknownName, match=which + "1$"):
        run["moe_in", 1]
    with pytest.raises(
        errors.UnknownName, match="'embed' is a point of the whole model: expected no layer, got layer 0"
    ):
        run["embed", 0]
    with pytest.raises(errors.UnknownName, match=r"which layer of 'resid_post': .* read: \[3\], got none"):
        run.top_tokens("resid_post")


def test_experts_and_ranks_that_a_run_cannot_have(model):
    known, unknown = model.run(IDS, read=["expert_out", "router_logits"]), model.run(IDS, read="expert_out")
    for of in (moe.Run.expert, moe.Run.contribution):
        for expert in (8, -1, 1000):
            message = f"unknown expert {expert} at layer 2: expected an expert from 0 to 7, got {expert}"
            with pytest.raises(errors.UnknownName, match=message):
                of(known, 2, expert)
        with pytest.raises(errors.UnknownName, match="unknown expert -1 at layer 2: expected an expert from 0 on"):
            of(unknown, 2, -1)
    for rank in (3, -1):
        with pytest.raises(errors.BadInput, match=f"no rank {rank} at layer 2: expected a rank from 0 to 2"):
            known.heaviest(2, rank)


@pytest.mark.parametrize("top", ["5", 2.5, 0])
def test_tokens_to_keep_are_a_whole_number(model, top):
    with pytest.raises(errors.BadInput, match=f"invalid top for select: expected a whole .* 1 or None, got {top!r}"):
        moe.select("resid_post", top=top)
    with pytest.raises(errors.BadInput, match=f"invalid top for neuron_lens: .* at least 1, got {top!r}"):
        moe.neuron_lens(model, 2, 0, top=top)


def test_names_in_place_of_models_and_lenses(model):
    for given in ("gpt2", None):
        message = f"not a model that is in memory: .*got {given!r}. moe.load"
        with pytest.raises(errors.BadInput, match=message):
            moe.wrap(given)
    message = r"invalid lens for expert_lens: expected a tuned lens or None, got 'reference'. Get one: moe.tuned_lens"
    with pytest.raises(errors.BadInput, match=message):
        moe.expert_lens(model, IDS[:1], lens="reference")


def test_models_and_runs_are_short_to_print(model):
    run = model.run(IDS, read=["moe_in", "embed", moe.select("resid_post", layers=3, top=2)])
    assert repr(run) == "Run of 2 texts, 8 positions, read: embed, moe_in at layers 0, 2, 3, resid_post at layers 3"
    run = model.run(IDS[:1, :3], edit=[moe.ablate(layer=2, expert=range(8)), moe.top_k(3)])
    assert repr(run) == "Run of 1 text, 3 positions, read: nothing, touched: (9, 0)"
    assert repr(model) == "MoEModel('qwen3_moe', qwen3_moe: 4 layers, 3 of them MoE, of 8 experts, top_k 3)"


def test_weights_with_nan(tmp_path):
    hf = build("olmoe")
    hf.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = torch.nan
    with (
        moe.wrap(hf) as opened,
        pytest.raises(errors.BadCheckpoint, match=r"1 NaN or infinite values in model\.layers\.1"),
    ):
        opened.run(torch.arange(3, 90)[None])
    hf.save_pretrained(tmp_path)
    with pytest.raises(errors.BadCheckpoint, match="cannot load|weights are not finite"):
        moe.load(tmp_path)


def test_nan_at_a_token_whose_logits_are_not_made():
    hf, ids = build("olmoe"), torch.arange(3, 90)[None]
    with moe.wrap(hf) as opened:
        last = opened.layers[-1]
        chosen = opened.run(ids, output=False).routing[last].ids[0]
        expert = next(int(one) for one in chosen[0] if one not in chosen[-1])
        hf.model.layers[last].mlp.experts.down_proj.data[expert, 0, 0] = torch.nan
        for output in (True, False):
            with pytest.raises(errors.BadCheckpoint, match="1 NaN or infinite values"):
                opened.run(ids, output=output)


def test_checkpoints_that_are_not_there(tmp_path, monkeypatch):
    # Without a network the hub's client tries again for two minutes; that a command asks it is seen below.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", "../nothing", Path("nothing/at/all")):
        with pytest.raises(errors.BadCheckpoint, match="cannot load .*: expected a folder .*json, got no such folder"):
            moe.load(path)
    with pytest.raises(errors.BadCheckpoint, match="cannot load .*: expected a hub id or a folder with config.json"):
        moe.load("no-such/id")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.BadCheckpoint, match="cannot load"):
        moe.load(tmp_path)


def test_damaged_checkpoints_and_wrong_options(tmp_path):
    build("olmoe").save_pretrained(tmp_path)
    with pytest.raises(errors.BadCheckpoint, match="cannot load .* with .*no_such_type"):
        moe.load(tmp_path, dtype="no_such_type")
    with moe.load(tmp_path) as opened:
        assert opened.tokenizer is None
        with moe.wrap(build("olmoe")) as original:
            assert torch.equal(opened.run(IDS).logits, original.run(IDS).logits)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(errors.BadCheckpoint, match="cannot load"):
        moe.load(tmp_path)


def test_labels_that_are_numbers_and_texts_that_no_encoding_takes(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a", "domain": 0, "name": 0}\n{"text": "b", "domain": 1}\n')
    corpus = moe.read_corpus(tmp_path / "d.jsonl")
    assert corpus.domains == ("0", "1")
    assert [document.name for document in corpus.documents] == ["0", "d/1"]
    (tmp_path / "d.jsonl").write_text('{"text": "\\ud800 hi"}\n')
    with pytest.raises(errors.BadData, match="record 1 of"):
        moe.read_corpus(tmp_path / "d.jsonl")


def test_numpy_integers_are_whole_numbers(model):
    layer = np.int64(2)
    assert moe.select("moe_in", layers=layer) == moe.select("moe_in", layers=2)
    edits = [moe.ablate(layer=layer, expert=np.int64(1)), moe.top_k(np.int64(2), layers=np.array([0, 2]))]
    assert moe.from_json(moe.to_json(edits)) == [moe.ablate(layer=2, expert=1), moe.top_k(2, layers=[0, 2])]


def test_data_that_cannot_be_read(tmp_path):
    with pytest.raises(errors.BadData, match="no file .*missing.jsonl"):
        moe.read_corpus(tmp_path / "missing.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine", "domain": "a"}\n{"text": \n')
    with pytest.raises(errors.BadData, match="cannot read line 2 of .*broken.jsonl: expected a JSON object"):
        moe.read_corpus(broken)
    broken.write_text('{"text": "fine"}\n{"txt": "no"}\n')
    with pytest.raises(
        errors.BadData, match="record 2 of .* has no text: expected a field 'text', got the fields 'txt'"
    ):
        moe.read_corpus(broken)
    broken.write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(errors.BadData, match="expected UTF-8 text"):
        moe.read_corpus(broken)
    (tmp_path / "table.parquet").write_bytes(b"not parquet")
    with pytest.raises(errors.BadData, match="expected a parquet file"):
        moe.read_corpus(tmp_path / "table.parquet")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(errors.BadData, match="expected a file of type .jsonl, .jsonl.gz, .json, .csv, .txt, .parquet"):
        moe.read_corpus(tmp_path / "picture.png")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(errors.BadData, match="no documents in"):
        moe.read_corpus(tmp_path / "empty.txt")


def test_data_that_can_be_read(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    records = [{"text": "one", "domain": "a", "name": "x"}, {"text": "two", "domain": "b", "name": "y"}]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, records)))
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "some.parquet")
    (tmp_path / "letters.txt").write_text("first text\nsame text\n\n\nsecond text\n")
    for name in ("some.jsonl", "some.parquet"):
        corpus = moe.read_corpus(tmp_path / name)
        assert [(d.text, d.domain, d.name) for d in corpus.documents] == [("one", "a", "x"), ("two", "b", "y")]
        assert moe.read_corpus(tmp_path / name, domain="all", limit=1).domains == ("all",)
    corpus = moe.read_corpus(tmp_path / "letters.txt")
    assert [d.text.strip() for d in corpus.documents] == ["first text\nsame text", "second text"]
    assert corpus.domains == ("letters",)
    assert len(moe.read_corpus(tmp_path)) == 6


def test_datasets_saved_to_disk_can_be_read(tmp_path):
    import datasets

    records = [{"text": "one", "domain": "a"}, {"text": "two", "domain": "b"}]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(tmp_path / "parts")
    for name in ("one", "parts"):
        corpus = moe.read_corpus(tmp_path / name)
        assert corpus.texts == ["one", "two"]
        assert corpus.domains == ("a", "b")


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_interp.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "nowhere/at-all"], "cannot load 'nowhere/at-all'"),
        (["report", "--data", "missing.jsonl"], "no file missing.jsonl"),
        (["report", "-o", "no/such/folder/report.html"], "cannot write no/such/folder/report.html"),
    ],
)
def test_commands_exit_with_2_and_no_traceback(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.iterdir())


def test_an_expert_that_the_models_code_never_runs_is_refused_with_the_reason():
    hf = build_type("nllb-moe")
    with moe.wrap(hf) as opened:
        edit = moe.ablate(layer=opened.layers[0], expert=5)
        with pytest.raises(
            errors.UnknownName, match="never runs: expected an expert from 0 to 1: transformers 5.23 runs"
        ):
            opened.run(type_inputs(hf), edit=edit)
        assert opened.weights(opened.layers[0], 5).up.shape[1] == opened.spec.d_model


def test_more_experts_than_a_router_can_choose_are_refused():
    hf = build_type("gemma4_text")
    with moe.wrap(hf) as opened, pytest.raises(errors.BadInput, match="cannot choose 5 experts"):
        opened.run(type_inputs(hf), edit=moe.top_k(5))
