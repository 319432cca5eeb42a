"""The audit of scores against slow counts of its own, what must hold of its controls, and its page."""

import re

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional

import moe_interp as moe
from examples import causal_audit as example
from moe_interp.analyses.score_audit import SCORES
from moe_interp.data import Corpus
from moe_interp.errors import BadInput, BadOutput, UnsupportedModel
from moe_interp.results import save
from moe_interp.views import score_audit as views
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build
from tests.tiny_types import build as build_type

CORPUS = Corpus.from_texts(
    {
        "<b>a</b>": ["ab cd ef gh", "hello there all", "some more of it"],
        "b": ["one two three", "xyz uvw", "numbers 12345"],
    }
)


@pytest.fixture(scope="module")
def audited():
    with moe.wrap(build("qwen3_moe"), StubTokenizer()) as model:
        return moe.score_audit(model, CORPUS, resamples=50, max_tokens=12, blocks=3), slow(model)


def nats(run: moe.Run) -> float:
    return float(functional.cross_entropy(run.logits[0, :-1], run.token_ids[0, 1:], reduction="sum"))


def slow(model: moe.MoEModel) -> dict[str, np.ndarray]:
    """Of each document [N, L, E]: nats added by ablation, one run after another; counts, weights, norms, saliency."""
    names = ("effect", "frequency", "weight_sum", "output_norm", "saliency_sum")
    found = {name: np.zeros((len(CORPUS), len(model.layers), 8)) for name in names}
    tokens = []
    for number, text in enumerate(CORPUS.texts):
        ids = torch.tensor(StubTokenizer()(text)["input_ids"][:12])
        run = model.run(ids, read=["expert_out", "gate_weights"])
        tokens.append(len(ids) - 1)
        for place, layer in enumerate(model.layers):
            for expert in range(8):
                edited = model.run(ids, edit=moe.ablate(layer=layer, expert=expert))
                found["effect"][number, place, expert] = nats(edited) - nats(run)
            for at in range(len(ids)):
                for slot, expert in enumerate(run.routing[layer].ids[0, at].tolist()):
                    weight = float(run["gate_weights", layer][0, at, slot])
                    norm = float(run["expert_out", layer][0, at, slot].norm())
                    for name, value in zip(names[1:], (1, weight, norm, weight * norm), strict=True):
                        found[name][number, place, expert] += value
    return found | {"tokens": np.array(tokens)}


def test_effects_and_scores_are_those_of_slow_sums(audited):
    result, expected = audited
    tokens, total = expected["tokens"], {name: value.sum(axis=0) for name, value in expected.items()}
    assert result.tokens.values.tolist() == [tokens[:3].sum(), tokens[3:].sum()]
    assert np.allclose(result.effect, total["effect"] / tokens.sum(), atol=1e-5)
    by_domain = [expected["effect"][part].sum(axis=0) / tokens[part].sum() for part in (slice(3), slice(3, 6))]
    assert np.allclose(result.effect_domain, by_domain, atol=1e-5)
    value = {name: result.value.sel(score=name).values for name in SCORES}
    for name in ("frequency", "weight_sum", "saliency_sum"):
        assert np.allclose(value[name], total[name] / tokens.sum(), rtol=1e-4)
    chosen = np.maximum(total["frequency"], 1)
    assert np.allclose(value["output_norm"], total["output_norm"] / chosen, rtol=1e-4)
    assert np.allclose(value["saliency"], total["saliency_sum"] / chosen, rtol=1e-4)
    shares = [expected["frequency"][part].sum(axis=0) for part in (slice(3), slice(3, 6))]
    shares = np.array([one / one.sum(axis=-1, keepdims=True) * 8 for one in shares])
    assert np.allclose(value["specialization"], shares.max(axis=0))
    assert (np.abs(total["effect"]).max(axis=1) > 0.05).all()


def test_correlations_are_those_of_scipy(audited):
    result = audited[0]
    for name in SCORES:
        at = result.sel(score=name)
        for place in range(result.sizes["layer"]):
            rho = spearmanr(at.value[place], result.effect[place]).statistic
            assert float(at.rank_correlation[place]) == pytest.approx(rho)
        rho = spearmanr(at.value.values.ravel(), result.effect.values.ravel()).statistic
        assert float(at.rank_correlation_overall) == pytest.approx(rho)
    low, high = result.rank_correlation_overall_interval.values
    assert (low <= result.rank_correlation_overall).all() and (result.rank_correlation_overall <= high).all()


def test_correlations_of_a_domain_are_of_its_documents(audited):
    result, expected = audited
    effect = expected["effect"][3:].sum(axis=0).ravel()
    for name, score in (
        ("frequency", expected["frequency"][3:].sum(axis=0)),
        ("saliency_sum", expected["saliency_sum"][3:].sum(axis=0)),
        ("specialization", result.value.sel(score="specialization").values),
    ):
        got = float(result.rank_correlation_domain.sel(score=name, domain="b"))
        assert got == pytest.approx(spearmanr(score.ravel(), effect).statistic, abs=0.02), name


def test_attribution_is_that_of_attribution_patching(audited):
    result = audited[0]
    with moe.wrap(build("qwen3_moe"), StubTokenizer()) as model:
        for name, steps in (("attribution", 1), ("attribution_path", 2)):
            nats, tokens = 0.0, 0
            for text in CORPUS.texts:
                ids = torch.tensor(StubTokenizer()(text)["input_ids"][:12])
                found = moe.attribution_patching(model, ids, steps=steps, sample=1)
                nats, tokens = nats + found.attribution_mean.values * (len(ids) - 1), tokens + len(ids) - 1
            assert np.allclose(result.value.sel(score=name), nats / tokens, atol=1e-5)


def test_halves_of_the_same_documents_agree_wholly():
    twice = Corpus.from_texts({"a": ["ab cd ef gh"] * 4})
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        result = moe.score_audit(model, twice, resamples=5, blocks=4)
    assert np.allclose(result.reliability, 1, atol=0.02)
    assert np.allclose(result.held_out, result.rank_correlation, atol=0.02)
    assert np.allclose(result.effect_interval[0], result.effect, atol=1e-6)
    ends = result.rank_correlation_overall_interval.values
    assert np.allclose(ends, result.rank_correlation_overall, atol=0.02)  # nothing differs between documents


def test_held_out_scores_meet_effects_of_the_other_half():
    texts = {"a": ["ab cd ef gh", "hello there all"]}
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        both = moe.score_audit(model, Corpus.from_texts(texts), resamples=5, blocks=2, seed=3)
        # alone twice, for an audit takes two documents
        one, other = (
            moe.score_audit(model, Corpus.from_texts({"a": [text] * 2}), resamples=5, blocks=2) for text in texts["a"]
        )
    rng = np.random.default_rng(3)
    orders = [(one, other) if rng.permutation(2)[0] == 0 else (other, one) for _ in range(20)]
    for name in ("frequency", "saliency", "attribution_path"):
        pairs = [(known.value.sel(score=name).values.ravel(), held.effect.values.ravel()) for known, held in orders]
        expected = np.mean([spearmanr(*pair).statistic for pair in pairs])
        assert float(both.held_out_overall.sel(score=name)) == pytest.approx(expected, abs=0.02), name
    expected = spearmanr(one.effect.values.ravel(), other.effect.values.ravel()).statistic
    assert float(both.reliability_overall) == pytest.approx(expected, abs=0.02)


def test_random_routers_are_whole_passes_of_random_routing():
    one = Corpus.from_texts({"a": ["ab cd ef gh", "other words here"]})
    with moe.wrap(build("mixtral"), StubTokenizer()) as model:
        result = moe.score_audit(model, one, resamples=5, random_routers=2, seed=4)
        from moe_interp.data import batches

        (batch,) = batches(model, one, batch_tokens=1024)
        seeds = np.random.default_rng(4).integers(2**63, size=2)
        mask, ids = batch.inputs["attention_mask"].bool(), batch.inputs["input_ids"]

        def cost(edit) -> float:
            logits = model.run(batch.inputs, edit=edit).logits
            rows = [
                functional.cross_entropy(logits[t][mask[t]][:-1], ids[t][mask[t]][1:], reduction="sum") for t in (0, 1)
            ]
            return float(sum(rows)) / int(mask[:, 1:].sum())

        for place, layer in enumerate(model.layers):
            for draw, seed in enumerate(seeds):
                expected = cost([moe.randomize(layer=layer, seed=int(seed))]) - cost([])
                assert float(result.random_router_draw[draw, place]) == pytest.approx(expected, abs=1e-5)
    assert np.allclose(result.random_router, result.random_router_draw.mean("draw"))


def test_refusals():
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        with pytest.raises(BadInput, match="too few documents"):
            moe.score_audit(model, Corpus.from_texts({"a": ["only one"]}))
        with pytest.raises(BadInput, match="two tokens or more"):
            moe.score_audit(model, Corpus.from_texts({"a": ["two", "x"]}))
    encoder = moe.wrap(build_type("openai_privacy_filter"), StubTokenizer())
    with encoder as model, pytest.raises(UnsupportedModel, match="next token"):
        moe.score_audit(model, CORPUS)


# ---- the page ----------------------------------------------------------------------------------------------


def test_figures_show_the_values(audited):
    result = audited[0]
    bars, held, ceiling = views.correlations(result).data
    assert np.allclose(bars.y, result.rank_correlation_overall) and np.allclose(held.y, result.held_out_overall)
    low, high = result.rank_correlation_overall_interval.values
    assert np.allclose(bars.y + bars.error_y.array, high) and np.allclose(bars.y - bars.error_y.arrayminus, low)
    assert np.allclose(ceiling.y, float(result.reliability_overall))
    for trace, score in zip(views.by_layer(result).data, SCORES, strict=True):
        assert np.allclose(trace.y, result.rank_correlation.sel(score=score))
    (domains,) = views.by_domain(result).data
    assert np.allclose(domains.z, result.rank_correlation_domain.T)
    assert domains.y[0] == "&lt;b&gt;a&lt;/b&gt;"
    assert np.allclose(
        np.moveaxis(domains.customdata, -1, 0),
        result.rank_correlation_domain_interval.transpose("bound", "domain", "score"),
    )
    dots = views.scatter(result).data
    assert np.allclose(dots[1].y, result.effect[1]) and np.allclose(dots[1].x, result.value.sel(score="frequency")[1])
    (effects,) = views.effects(result).data
    assert np.allclose(effects.z, result.effect)
    best, random = views.routers(result).data
    assert np.allclose(best.y, result.effect.max("expert")) and np.allclose(random.y, result.random_router)


def test_a_score_without_a_correlation_is_neither_the_best_nor_the_worst(audited):
    result = audited[0].copy(deep=True)
    result["effect"][0, 0] = np.nan  # an expert that the layer does not have
    result["rank_correlation_overall"].loc[{"score": "frequency"}] = np.nan  # the same for every expert
    kept = result.rank_correlation_overall.sel(score=[name for name in views.OBSERVED if name != "frequency"])
    best, _, costs = views.headlines(result)
    assert f"{float(kept.max()):.2f} [" in best.value and f"{float(kept.min()):.2f}" in best.control
    assert views.NAMES[str(kept.score.values[kept.values.argmin()])] in best.control
    assert f"{float(result.effect.max()):.3f} nats/token" in costs.value


def test_the_page_is_whole_and_escaped(audited, tmp_path):
    result = audited[0]
    text = views.page(result, tmp_path / "page.html").read_text(encoding="utf-8")
    body = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "Which scores say what an expert is worth?" in body and "<b>a</b>" not in text
    assert all(
        f'id="{name}"' in text for name in ("correlations", "layers", "scatter", "domains", "effects", "routers")
    )
    assert f"{float(result.effect.max()):.3f} nats/token" in body
    with pytest.raises(BadOutput):
        views.page(result, tmp_path / "none" / "page.html")


def test_the_example_reads_a_result_and_writes_tables_and_page(audited, tmp_path, monkeypatch, capsys):
    result, _ = audited
    stored, page, tables = tmp_path / "a.nc", tmp_path / "a.html", tmp_path / "a.md"
    save(result, stored)
    tables.write_text(f"# Mine\n\n{example.MARK}\n\nold", encoding="utf-8")
    command = ["causal_audit.py", "--result", str(stored), "-o", str(page), "--markdown", str(tables)]
    monkeypatch.setattr("sys.argv", command)
    threads = torch.get_num_threads()
    example.main()
    torch.set_num_threads(threads)
    text = tables.read_text(encoding="utf-8")
    assert text.startswith("# Mine") and "old" not in text and page.exists()
    row = next(line for line in text.splitlines() if line.startswith("| frequency "))
    assert row.split(" | ")[1].startswith(f"{float(result.rank_correlation_overall.sel(score='frequency')):.2f} [")
    assert row.split(" | ")[2] == f"{float(result.held_out_overall.sel(score='frequency')):.2f}"
    assert "Rank correlation of each score" in capsys.readouterr().out


def test_rows_of_domains_are_no_dates_and_differ(audited):
    result, _ = audited
    long = "a name that is longer than forty characters: "
    figure = views.by_domain(result.assign_coords(domain=[f"{long}one", f"{long}two"]))
    assert len(set(figure.data[0].y)) == 2
    assert figure.layout.yaxis.type == "category"
