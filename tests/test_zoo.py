"""Training, export and baselines of the reference model, on a few lines of text and a few weights."""

import argparse
import hashlib
import json
import math
import os
import re
import signal
from dataclasses import asdict
from itertools import chain, islice

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2Config

import moe_interp
from moe_interp.errors import BadData
from moe_interp.zoo import baselines, card, corpus_tokens, evaluate, routing_checkpoints, train
from moe_interp.zoo import export as export_module
from moe_interp.zoo.corpus_tokens import DOMAINS, TokenStream, batches
from moe_interp.zoo.export import export
from moe_interp.zoo.train import Plan, Trainer, expert_load, losses
from tests.reference import baselines as slow
from tests.reference.model import forward
from tests.tiny import build

EXCLUDED = ("french_qa", "french_administrative")
UNWANTED = "Жук"
VOCAB, LENGTH = 320, 32
PLAN = Plan(steps=8, decay_steps=3, warmup_steps=2, batch=8, length=LENGTH)
TOKENS_A_STEP = 8 * LENGTH


def tiny_config():
    return DeepseekV2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, routed_scaling_factor=2.0, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        max_position_embeddings=LENGTH, initializer_range=0.1, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def write_corpus(folder):
    """Four training and two validation texts a domain, and two domains that must stay out."""
    for split, documents in (("train", 4), ("validation", 2)):
        (folder / split).mkdir(parents=True)
        for number, domain in enumerate(DOMAINS):
            ends = [" ".join(map(str, range(number, number + 9 * n))) for n in range(documents)]
            texts = [f"{domain} {n}: été 山水\n{split} {end}." for n, end in enumerate(ends)]
            write_texts(folder / split / f"{domain}.jsonl", texts)
        for domain in EXCLUDED:
            write_texts(folder / split / f"{domain}.jsonl", [f"{UNWANTED} {domain}"])
    return folder


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """Everything that decides the size of a run, made small."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, export_module):
            patch.setattr(module, "reference_config", tiny_config)
            patch.setattr(module, "CONTEXT", LENGTH)
        for module in (corpus_tokens, export_module):
            patch.setattr(module, "VOCAB_SIZE", VOCAB)
        patch.setattr(train, "EVALUATE_EVERY", 3)
        patch.setattr(train, "SNAPSHOTS", (1, 4))
        yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The work folder of a run that nothing interrupted."""
    work_dir = tmp_path_factory.mktemp("run")
    train.train(PLAN, corpus, work_dir)
    return work_dir


@pytest.fixture(scope="module")
def shipped(corpus, finished, tmp_path_factory):
    """What export made of that run."""
    out = tmp_path_factory.mktemp("out") / "reference"
    export(corpus, finished, out)
    return out


def records(work_dir):
    """The lines of the log, without the time they took."""
    lines = [json.loads(line) for line in (work_dir / train.LOG).open()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def checkpoint(work_dir):
    return torch.load(work_dir / "checkpoint.pt", weights_only=True)


@torch.no_grad()
def slow_nll(hf, ids):
    return slow.model_nll(forward(hf, torch.tensor([ids])).logits[0].tolist(), ids)


def text_stream(lengths):
    """Texts of these lengths in which no token occurs twice."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return TokenStream(torch.arange(int(starts[-1])).int(), starts)


# Baselines


TOKENS = st.lists(st.integers(0, 6), min_size=2, max_size=40)


@given(TOKENS, st.lists(st.integers(0, 7), min_size=2, max_size=12))
def test_ngrams_are_the_definitions(tokens, text):
    ngrams = baselines.fit_ngrams(torch.tensor(tokens), 8)
    ids = torch.tensor(text)
    assert baselines.unigram_nll(ngrams, ids).tolist() == pytest.approx(slow.unigram_nll(tokens, 8, text))
    assert baselines.bigram_nll(ngrams, ids).tolist() == pytest.approx(slow.bigram_nll(tokens, 8, text))


@given(TOKENS)
def test_ngrams_sum_to_one_after_every_history_seen_or_not(tokens):
    ngrams = baselines.fit_ngrams(torch.tensor(tokens).int(), 8)
    assert float(ngrams.unigram.sum()) == pytest.approx(1)
    for history in range(8):
        every_pair = torch.tensor([id for word in range(8) for id in (history, word)])
        probabilities = (-baselines.bigram_nll(ngrams, every_pair)[::2]).exp()
        assert float(probabilities.sum()) == pytest.approx(1)


# The plan


def test_rate_warms_up_stays_and_falls_to_nothing():
    plan = Plan(steps=50, decay_steps=20, warmup_steps=8, learning_rate=0.5)
    expected = [slow.learning_rate(step, steps=50, warmup=8, decay=20, peak=0.5) for step in range(50)]
    assert [plan.rate(step) for step in range(50)] == pytest.approx(expected)
    assert (plan.rate(0), plan.rate(7), plan.rate(30), plan.rate(49)) == pytest.approx((0.0625, 0.5, 0.5, 0.025))
    assert plan.rate(50) == 0


def test_snapshots_are_the_early_ones_and_the_last_each_once(monkeypatch):
    monkeypatch.setattr(train, "SNAPSHOTS", (36, 180, 540))
    assert Plan(steps=1000).snapshots() == (36, 180, 540, 1000)
    assert Plan(steps=540).snapshots() == (36, 180, 540)
    assert Plan(steps=20).snapshots() == (20,)


def test_every_field_of_the_plan_is_an_option():
    parser = argparse.ArgumentParser()
    train.plan_arguments(parser)
    assert Plan(**vars(parser.parse_args([]))) == Plan()
    options = parser.parse_args(["--steps", "9", "--learning-rate", "0.25"])
    assert Plan(**vars(options)) == Plan(steps=9, learning_rate=0.25)


def test_weights_come_from_the_seed_and_norms_do_not_decay():
    first, again, other = (train.new_model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    model = train.new_model(1)
    decayed = {id(p) for p in train.new_optimizer(model, PLAN).param_groups[0]["params"]}
    kept = {name for name, p in model.named_parameters() if id(p) not in decayed}
    assert kept == {name for name, _ in model.named_parameters() if "norm" in name}
    assert [group["weight_decay"] for group in train.new_optimizer(model, PLAN).param_groups] == [0.1, 0.0]


# Loss


def test_expert_load_counts_slots():
    ids = torch.randint(0, 5, (3, 7, 2), generator=torch.Generator().manual_seed(0))
    expected = slow.expert_load(ids.flatten(0, 1).tolist(), 6)
    assert expert_load(ids, 6).tolist() == pytest.approx(expected)
    assert expert_load(torch.tensor([[0, 2], [2, 3]]), 6).tolist() == [0.25, 0, 0.5, 0.25, 0, 0]


def test_losses_and_their_gradient_are_the_definitions():
    hf = build("deepseek_v2")
    rows = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    points = forward(hf, rows[:, :-1]).points
    layers = [layer for name, layer in points if name == "expert_ids"]
    choices = [points["expert_ids", layer].flatten(0, 1).tolist() for layer in layers]
    scores = [list(points["router_scores", layer].flatten(0, 1)) for layer in layers]
    expected = slow.balance_loss(choices, scores, 8)
    gate = hf.get_parameter(f"model.layers.{layers[0]}.mlp.gate.weight")
    with moe_interp.wrap(hf) as model:
        nll, balance, load = losses(model, rows)
    torch.testing.assert_close(balance, expected)
    torch.testing.assert_close(
        torch.autograd.grad(balance, gate)[0], torch.autograd.grad(expected, gate, retain_graph=True)[0]
    )
    assert nll.item() == pytest.approx(sum(chain(*(slow_nll(hf, row) for row in rows.tolist()))) / 16, rel=1e-5)
    assert load.tolist() == [pytest.approx(slow.expert_load(chosen, 8)) for chosen in choices]


def test_balance_loss_is_one_where_the_router_prefers_nobody():
    hf = build("deepseek_v2")
    for name, parameter in hf.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.zero_()
    with moe_interp.wrap(hf) as model:
        assert losses(model, torch.arange(3, 21).view(2, 9))[1].item() == pytest.approx(1)


# Order of the tokens


def test_an_epoch_uses_every_token_once_and_its_texts_stay_whole():
    lengths = [5, 9, 3, 12, 4]
    stream = text_stream([*lengths, 16 * 3 + 1 - sum(lengths)])
    (rows,) = islice(batches(stream, batch=12, length=4, seed=0), 1)
    assert sorted(rows[:, :-1].flatten().tolist()) == sorted(set(range(49)) - unread(rows))
    ends = set((stream.starts[1:] - 1).tolist())
    starts = set(stream.starts.tolist())
    for before, after in zip(rows[:, :-1].flatten().tolist(), rows[:, 1:].flatten().tolist(), strict=True):
        assert after == before + 1 or (before in ends and after in starts)


def unread(rows):
    """Tokens that are nobody's input: of one whole epoch the last, which is only a target."""
    left = set(rows[:, 1:].flatten().tolist()) - set(rows[:, :-1].flatten().tolist())
    assert len(left) == 1
    return left


def test_an_epoch_leaves_out_less_than_a_batch_and_repeats_nothing():
    stream = text_stream([11, 30, 8, 21, 42])
    found = list(islice(batches(stream, batch=5, length=4, seed=0), 6))
    inputs = torch.cat(found[:5])[:, :-1].flatten().tolist()
    assert [batch.shape for batch in found] == [(5, 5)] * 6
    assert len(set(inputs)) == len(inputs) == 100 > len(stream.ids) - 5 * 4


def test_batches_depend_on_seed_and_epoch_alone():
    stream = text_stream([11, 30, 8, 21, 33])
    first, again, other = (list(islice(batches(stream, 5, 4, seed), 12)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert sorted(map(tuple, torch.cat(first[:5]).tolist())) != sorted(map(tuple, torch.cat(first[5:10]).tolist()))
    resumed = islice(batches(stream, 5, 4, 3), 7, None)
    assert all(torch.equal(batch, next(resumed)) for batch in first[7:])


# Corpus


def test_the_stream_is_the_texts_each_after_an_end_of_text(corpus):
    texts = corpus_tokens.read_texts(corpus, "train")
    tokenizer = corpus_tokens.train_tokenizer(texts, LENGTH)
    stream = corpus_tokens.token_stream(tokenizer, texts)
    documents = [ids.tolist() for ids in stream.ids.split(stream.starts.diff().tolist())]
    assert [ids[0] for ids in documents] == [tokenizer.bos_token_id] * 36
    assert [tokenizer.decode(ids[1:]) for ids in documents] == [text for domain in texts.values() for text in domain]
    assert len(tokenizer) == VOCAB
    assert TOKENS_A_STEP < len(stream.ids) < 5 * TOKENS_A_STEP  # so that the runs below go on in a second epoch


def test_no_other_domain_enters_even_if_it_lies_in_the_folder(corpus, shipped, tmp_path):
    for split in ("train", "validation"):
        texts = corpus_tokens.read_texts(corpus, split)
        assert tuple(texts) == DOMAINS
        assert set(DOMAINS).isdisjoint(EXCLUDED)
        assert UNWANTED not in json.dumps(texts, ensure_ascii=False)
    without = write_corpus(tmp_path)
    for path in (without / "train").iterdir():
        if path.stem in EXCLUDED:
            path.unlink()
    assert corpus_tokens.corpus_hash(without) == corpus_tokens.corpus_hash(corpus)
    assert tuple(training_log(shipped)["validation"]) == DOMAINS
    assert not [path for path in shipped.iterdir() for name in EXCLUDED if name.encode() in path.read_bytes()]


def test_the_hash_is_over_the_training_files_by_name(corpus):
    files = [corpus / "train" / f"{domain}.jsonl" for domain in sorted(DOMAINS)]
    content = b"".join(path.read_bytes() for path in files)
    assert corpus_tokens.corpus_hash(corpus) == hashlib.sha256(content).hexdigest()


def test_a_missing_file_is_named_with_what_to_do(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "train" / "python_code.jsonl").unlink()
    with pytest.raises(BadData) as caught:
        train.train(PLAN, tmp_path, tmp_path / "work")
    assert str(caught.value) == (
        f"training corpus: expected a file python_code.jsonl in {tmp_path / 'train'}, got none. "
        "Give --corpus the folder that holds train/ and validation/."
    )


def test_a_corpus_of_less_than_one_batch_is_refused():
    assert next(batches(text_stream([20, 21]), batch=4, length=10, seed=0)).shape == (4, 11)
    with pytest.raises(BadData, match="expected at least 41 tokens, got 40. Give more texts, or fewer rows."):
        next(batches(text_stream([20, 20]), batch=4, length=10, seed=0))


# Training


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise InterruptedError


@pytest.mark.parametrize(("how", "when"), [(terminate, 2), (terminate, 7), (crash, 2), (crash, 5)])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(how, when, corpus, finished, tmp_path, monkeypatch):
    update = Trainer.update

    def interrupted(trainer, model, rows):
        record = update(trainer, model, rows)
        if trainer.step == when:
            how()
        return record

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        try:
            train.train(PLAN, corpus, tmp_path)
        except InterruptedError:
            assert how is crash
    assert max(record["step"] for record in records(tmp_path)) == (when if how is terminate else when - 1)
    if how is terminate:
        assert checkpoint(tmp_path)["step"] == when
    train.train(PLAN, corpus, tmp_path)
    unbroken, resumed = checkpoint(finished), checkpoint(tmp_path)
    assert resumed["step"] == PLAN.steps
    torch.testing.assert_close(resumed["model"], unbroken["model"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer"]["state"], unbroken["optimizer"]["state"], rtol=0, atol=0)
    assert records(tmp_path) == records(finished)
    for path in finished.glob("snapshot_*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_log_has_every_step_once_and_what_the_plan_says(finished):
    lines = [record for record in records(finished) if "loss" in record]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["tokens"] for line in lines] == [TOKENS_A_STEP * step for step in range(1, 9)]
    assert [line["learning_rate"] for line in lines] == [PLAN.rate(step) for step in range(8)]
    validated = [record for record in records(finished) if "validation" in record]
    assert [record["step"] for record in validated] == [3, 6, 8]
    assert all(tuple(record["validation"]) == DOMAINS for record in validated)
    assert validated[-1]["validation"]["python_code"] < validated[0]["validation"]["python_code"]


def test_snapshots_are_the_weights_as_they_would_be_shipped(finished):
    assert [step for step, _ in routing_checkpoints.snapshots(finished)] == [1, 4, 8]
    copy = train.new_model(5).bfloat16()
    load_model(copy, str(finished / "snapshot_000008.safetensors"))
    trained = checkpoint(finished)["model"]
    for name, value in copy.state_dict().items():
        assert torch.equal(value, trained[name].bfloat16())


# Evaluation


def test_document_nll_does_not_depend_on_the_batch():
    hf = build("deepseek_v2")
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 96, (length,), generator=generator) for length in (7, 2, 11, 5, 7)]
    for batch in (2, 16):
        for nats, ids in zip(evaluate.document_nll(hf, documents, batch), documents, strict=True):
            assert nats.tolist() == pytest.approx(slow_nll(hf, ids.tolist()), rel=1e-4)
    mean = evaluate.domain_losses(hf, {"a": documents[:2], "b": documents[2:]})["a"]
    nats = slow_nll(hf, documents[0].tolist()) + slow_nll(hf, documents[1].tolist())
    assert mean == pytest.approx(sum(nats) / 7, rel=1e-4)


def test_tokens_have_the_bytes_of_their_text(corpus):
    texts = corpus_tokens.read_texts(corpus, "train")
    tokenizer = corpus_tokens.train_tokenizer(texts, LENGTH)
    lengths = evaluate.token_bytes(tokenizer)
    for text in ("A déjà vu,\n\t山水 🦆!", texts["chinese_poetry"][0]):
        (ids,) = corpus_tokens.encode(tokenizer, [text])
        assert int(lengths[ids].sum()) == len(text.encode())


def test_compare_gives_means_over_tokens_and_bits_over_bytes():
    hf = build("deepseek_v2")
    counted = torch.randint(0, 96, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    documents = [[0, 5, 9, 5, 7], [0, 12, 5]]
    lengths = torch.arange(96) % 4 + 1
    ngrams = baselines.fit_ngrams(torch.tensor(counted), 96)
    row = evaluate.compare(hf, ngrams, [torch.tensor(ids) for ids in documents], lengths)
    size = sum(int(lengths[token]) for ids in documents for token in ids[1:])
    for name, nats in {
        "model": chain(*(slow_nll(hf, ids) for ids in documents)),
        "bigram": chain(*(slow.bigram_nll(counted, 96, ids) for ids in documents)),
        "unigram": chain(*(slow.unigram_nll(counted, 96, ids) for ids in documents)),
    }.items():
        total = sum(nats)
        assert row[f"{name}_nats"] == pytest.approx(total / 6, rel=1e-4)
        assert row[f"{name}_bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)
    assert (row["documents"], row["tokens"]) == (2, 6)


# What ships


def training_log(out):
    return json.loads((out / "training_log.json").read_text())


def validation_ids(corpus, out):
    """Domain -> token ids of its validation documents, cut to the context."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = corpus_tokens.read_texts(corpus, "validation")
    return {domain: [tokenizer(text)["input_ids"][:LENGTH] for text in texts[domain]] for domain in texts}


def test_weights_are_the_checkpoint_in_bfloat16(finished, shipped):
    trained = checkpoint(finished)["model"]
    hf = AutoModelForCausalLM.from_pretrained(shipped)
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16}
    for name, value in hf.state_dict().items():
        assert torch.equal(value, trained[name].bfloat16())


def test_transformers_and_moe_interp_open_it_with_the_same_loss(corpus, shipped):
    hf = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    text = corpus_tokens.read_texts(corpus, "validation")["french_literature"][0]
    with moe_interp.load(shipped, dtype=torch.float32) as model, torch.no_grad():
        run = model.run([text])
        ids = run.token_ids
        nats = F.cross_entropy(run.logits[0, :-1], ids[0, 1:]).item()
        assert nats == pytest.approx(hf(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
        assert nats == pytest.approx(sum(slow_nll(hf, ids[0].tolist())) / (ids.shape[1] - 1), rel=1e-4)
    tokenizer = corpus_tokens.train_tokenizer(corpus_tokens.read_texts(corpus, "train"), LENGTH)
    assert ids[0].tolist() == corpus_tokens.encode(tokenizer, [text])[0].tolist()


def test_validation_is_that_of_the_shipped_weights(corpus, shipped):
    hf = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    validation = validation_ids(corpus, shipped)
    assert {len(ids) < LENGTH for documents in validation.values() for ids in documents} == {True, False}
    for domain, documents in validation.items():
        nats = list(chain(*(slow_nll(hf, ids) for ids in documents)))
        row = training_log(shipped)["validation"][domain]
        assert row["model_nats"] == pytest.approx(sum(nats) / len(nats), rel=5e-3)
        assert (row["documents"], row["tokens"]) == (2, len(nats))
        assert row["bigram_nats"] < row["unigram_nats"]


def test_training_log_says_what_was_done(corpus, shipped):
    log = training_log(shipped)
    assert log["arguments"] == asdict(PLAN)
    assert (log["steps_done"], log["tokens_seen"]) == (8, 8 * TOKENS_A_STEP)
    assert log["data_sha256"] == corpus_tokens.corpus_hash(corpus)
    assert [point["step"] for point in log["curve"]] == list(range(1, 9))
    assert [record["step"] for record in log["validation_curve"]] == [3, 6, 8]
    hf = AutoModelForCausalLM.from_pretrained(shipped)
    total = sum(p.numel() for p in hf.parameters())
    unused = (8 - 2) * 3 * 16 * 8  # six experts of three matrices
    assert log["parameters"] == {"total": total, "active": total - unused}


@pytest.mark.parametrize("steps", [7, 120, 250, 605])
def test_curve_is_means_over_runs_of_steps(steps):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {name: torch.rand((), generator=generator).item() for name in export_module.AVERAGED}
        | {"step": step, "tokens": 8 * step, "learning_rate": 1 / step}
        for step in range(1, steps + 1)
    ]
    found = export_module.curve([*rows[:3], {"step": 3, "validation": {}}, *rows[3:]])
    expected = slow.curve(rows, max(1, steps // 120), export_module.AVERAGED)
    assert len(found) <= 2 * 120
    for point, means in zip(found, expected, strict=True):
        assert point == pytest.approx(
            means | {"tokens": 8 * means["step"], "learning_rate": 1 / means["step"]}, abs=6e-5
        )


def test_routing_checkpoints_are_where_the_tokens_went(corpus, finished, shipped):
    with safe_open(shipped / "routing_checkpoints.safetensors", "pt") as file:
        found = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
        names = {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}
    assert names == {"domains": list(DOMAINS), "layers": [1]}
    assert found["steps"] == training_log(shipped)["routing_steps"] == [1, 4, 8]
    documents = validation_ids(corpus, shipped)
    for number, step in enumerate(found["steps"]):
        hf = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
        load_model(hf, str(finished / f"snapshot_{step:06d}.safetensors"))
        with moe_interp.wrap(hf) as model:
            ids = {domain: [model.run([text]).routing[1].ids[0] for text in documents[domain]] for domain in DOMAINS}
        for row, (domain, document, position) in enumerate(
            zip(found["domain"], found["document"], found["position"], strict=True)
        ):
            chosen = ids[DOMAINS[domain]][document][position].tolist()
            assert found["expert_ids"][number][row] == [sorted(chosen)]
            assert found["token_ids"][row] == documents[DOMAINS[domain]][document][position]
    assert found["domain"] == [domain for domain in range(9) for _ in range(2 * 24)]
    lengths = [len(ids) for texts in documents.values() for ids in texts]
    assert found["position"] == [at for n in lengths for at in routing_checkpoints.sampled_positions(n).tolist()]


@pytest.mark.parametrize("length", [2, 9, 30, 512])
def test_sampled_positions_spread_evenly_over_all_but_the_first_token(length):
    positions = routing_checkpoints.sampled_positions(length).tolist()
    assert (positions[0], positions[-1], len(positions)) == (1, length - 1, 24)
    for number, position in enumerate(positions):
        assert -1e-4 <= 1 + (length - 2) * number / 23 - position < 1


def test_files_can_be_read_by_everyone_and_name_no_path_of_this_machine(corpus, finished, shipped):
    for path in shipped.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path.name
        content = path.read_bytes()
        for folder in (corpus, finished, shipped, shipped.parent.parent):
            assert str(folder).encode() not in content, path.name
    assert {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"} <= set(os.listdir(shipped))


# The card


def test_card_is_clean_markdown(shipped):
    text = (shipped / "MODEL_CARD.md").read_text()
    assert text == card.model_card(training_log(shipped))
    assert not re.search(r"[{}]|/home|/tmp|/root|\bNone\b|\bnan\b", text)
    assert not re.search(r"\\(?!\|)", text)
    for line in text.splitlines():
        assert (r"\|" in line) == (line.startswith("| tokenizer")), line
        assert ("<|endoftext|>" in line) <= (not line.startswith("|")), line
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1
    assert [len(block) for block in blocks] == [8, 2 + 9 + 1, 2 + 9]


def test_card_gives_the_losses_of_the_log_and_their_mean(shipped):
    text, validation = (shipped / "MODEL_CARD.md").read_text(), training_log(shipped)["validation"]
    columns = [f"{name}_{unit}" for unit in ("nats", "bits_per_byte") for name in ("model", "bigram", "unigram")]
    for domain, row in validation.items():
        assert f"| {domain} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |\n" in text
    means = [sum(row[name] for row in validation.values()) / 9 for name in columns]
    assert "| mean of domains | " + " | ".join(f"{mean:.3f}" for mean in means) + " |\n" in text
    assert f"(18 documents,\n{sum(row['tokens'] for row in validation.values())} tokens)" in text.replace(
        "documents, ", "documents,\n"
    )


def test_options_on_the_card_are_the_plan(shipped):
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus")
    parser.add_argument("--work-dir")
    train.plan_arguments(parser)
    text = (shipped / "MODEL_CARD.md").read_text()
    (command,) = re.findall(r"python -m moe_interp\.zoo\.train (.*)", text)
    options = vars(parser.parse_args(command.split()))
    assert (options.pop("corpus"), options.pop("work_dir")) == ("CORPUS", "WORK")
    assert Plan(**options) == PLAN


def test_every_domain_has_its_source_and_licence():
    assert tuple(card.SOURCES) == DOMAINS


def test_loss_figure_has_bars_from_the_whole_number_below():
    curve = [{"loss": loss, "tokens": 1e6 * n} for n, loss in enumerate([6, 4, 3, 3, 2.5, 2.5, 2.5, 2], 1)]
    assert card.loss_figure(curve, rows=4, width=6).splitlines() == [
        "    tokens  loss  (bars from 2)",
        "    2.00 M  5.00  ######",
        "    4.00 M  3.00  ##",
        "    6.00 M  2.50  #",
        "    8.00 M  2.25  #",
    ]


def test_card_says_over_how_many_steps_the_load_was_averaged(shipped):
    log = training_log(shipped)
    point = log["curve"][0] | {"balance_loss": 1.5, "max_over_mean_load": 3.0, "dead_experts": 2.0}
    log["curve"] = [point | {"step": 10 * n, "loss": 9 - n / 10} for n in range(1, 39)]
    log["curve"] += [point | {"step": 400, "balance_loss": 1.1}, point | {"step": 410, "balance_loss": 1.2}]
    text = " ".join(card.model_card(log).split())
    assert "Over the last 30 steps its value was 1.150 (1 is even), the busiest expert" in text
    assert "had 3.0 times its even share of a batch, and 2.0 of the 448 experts got" in text
    log["curve"] = log["curve"][:1]
    assert "Over the last 10 steps" in card.model_card(log)
