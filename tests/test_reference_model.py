"""The bundled model and its sample: they load without a network, add up, and know their domains."""

import json
import math
import socket

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import moe_interp as moe
from moe_interp import cli
from moe_interp.checkpoint import REFERENCE
from moe_interp.files import SAMPLE

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def model():
    with moe.load() as opened:
        yield opened


def test_it_has_the_promised_shape(model):
    spec = model.spec
    assert (spec.model_type, spec.num_layers, spec.num_experts, spec.top_k) == ("deepseek_v2", 8, 64, 6)
    assert model.layers == tuple(range(1, 8))
    assert 9e6 < sum(parameter.numel() for parameter in model.hf.parameters()) < 12e6
    assert sum(file.stat().st_size for file in REFERENCE.iterdir()) < 30e6
    assert model.dtype is torch.float32


def test_what_was_added_to_the_residual_sums_to_the_logit(model):
    """Direct logit attribution of 32 prompts, to the token that the model gives most."""
    texts = [document.text for document in moe.sample().documents[::7]][:32]
    for text in texts:
        ids = model.tokenizer(text)["input_ids"][:24]
        logits = model.run(ids).logits[0, -1]
        best = int(logits.argmax())
        result = moe.logit_attribution(model, ids, best)
        total = float(result["attribution"].sum("part")[0])
        assert abs(total - float(logits[best])) < 1e-4 * float(logits.abs().max())
        assert len(result["part"]) == 1 + 8 + 1 + 7 * 7 + 1  # embedding, attention, dense MLP, experts and shared, bias


def test_it_loads_with_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with moe.load() as opened:
        assert opened.name == "reference"


def test_its_audit_passes(model):
    audit = model.audit(TEXT)
    assert audit.passed, str(audit)


def test_texts_of_different_lengths_run_together_as_they_do_alone(model):
    other = "def add(a, b):"
    together = model.run([TEXT, other], read="resid_post")
    for row, text in enumerate((TEXT, other)):
        alone = model.run(text, read="resid_post")
        length = int(together.mask[row].sum())
        assert length == alone.mask.sum()
        got, expected = together["resid_post", 7][row, :length], alone["resid_post", 7][0]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_it_generates_text_and_edits_change_it(model):
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(TEXT, **options)
    again = model.generate([TEXT, "Question: Tom has"], **options)
    silenced = model.generate(TEXT, edit=[moe.apply("routed_out", torch.zeros_like)], **options)
    assert plain.startswith(TEXT)
    assert len(again) == 2
    assert again[0] == plain
    assert silenced != plain


def test_it_predicts_text_of_its_domains_better_than_chance_and_than_shuffled_text(model):
    for text in moe.sample().take(1).texts:
        ids = model.run(text).token_ids
        order = torch.randperm(ids.shape[1] - 1, generator=torch.Generator().manual_seed(0)) + 1
        shuffled = torch.cat([ids[:, :1], ids[:, order]], dim=1)
        losses = []
        for tokens in (ids, shuffled):
            logits = model.run(tokens).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item())
        assert losses[0] < losses[1] - 0.5
        assert losses[0] < math.log(model.spec.vocab_size) - 2


def test_the_log_beats_the_baselines_and_matches_the_weights():
    log = json.loads((REFERENCE / "training_log.json").read_text())
    domains = log["validation"].values()
    nats = {who: np.mean([one[f"{who}_nats"] for one in domains]) for who in ("model", "bigram", "unigram")}
    assert nats["model"] < nats["bigram"] - 0.3 < nats["unigram"]
    text = json.dumps(log)
    assert "/work" not in text and "/home" not in text and "/tmp" not in text


def test_the_sample_has_twenty_documents_of_each_domain(model):
    corpus = moe.sample()
    counts = np.bincount(corpus.labels)
    assert len(corpus.domains) == 9
    assert counts.min() >= 20
    assert len(set(corpus.texts)) == len(corpus)
    longest = max(len(model.tokenizer(text)["input_ids"]) for text in corpus.texts)
    assert longest <= model.spec.context_length


def test_routing_of_six_checkpoints_is_kept():
    routes = load_file(REFERENCE / "routing_checkpoints.safetensors")
    ids = [value for value in routes.values() if value.dim() >= 3]
    assert ids
    for value in ids:
        assert 0 <= int(value.min()) and int(value.max()) < 64


def test_the_bundled_tuned_lens_is_nearer_to_the_output_at_every_layer(model):
    lens = moe.tuned_lens("reference")
    assert lens.layers == tuple(range(8)) and lens.provenance["data"] == "the training texts of the reference model"
    assert (REFERENCE / "tuned_lens.safetensors").stat().st_size < 0.5e6
    quality = moe.tuned_lens_quality(model, lens, moe.sample().take(3), max_tokens=32)
    assert (quality["kl_gain_interval"].sel(bound="low") > 0).all()
    assert (quality["agreement_gain"] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], "similarity"),
        (["models"], "deepseek_v2"),
        (["audit"], "passed"),
        (["lens", TEXT], "resid_mid+c1"),
        (["lens", TEXT, "--tuned", "reference"], "resid_mid+c1"),
        (
            ["tuned-lens", "--limit", "2", "--max-tokens", "16", "--steps", "2", "--test", str(SAMPLE), "-o", "t.lens"],
            "KL to the model's own output",
        ),
        (["routing", "--limit", "2", "--max-tokens", "32", "-o", "routing.nc"], "most specialised expert"),
        (["similarity", "--limit", "2", "--max-tokens", "32"], "Cosine to the ensemble"),
        (["perplexity", "--limit", "2", "--max-tokens", "32", "--renormalise"], "random slots"),
        (["report", "--limit", "2", "--max-tokens", "32", "-o", "r.html"], "r.html"),
    ],
)
def test_commands_run_on_the_bundled_model(arguments, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "console", Console(width=200))
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert done.value.code == 0, printed.err
    assert told in printed.out
    wanted = [arguments[arguments.index("-o") + 1]] if "-o" in arguments else []
    assert [file.name for file in tmp_path.iterdir()] == wanted
