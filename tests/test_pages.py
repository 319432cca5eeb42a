"""The examples of pages run as they stand and print what the page says; a tiny model stands in for checkpoints."""

import contextlib
import io
import linecache
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnsight.modeling import huggingface
from nnsight.schema.config import CONFIG

import moe_interp as moe
from moe_interp import adapters
from tests import linear_gates, tiny
from tests.served import saved

DOCS = Path(__file__).parent.parent / "docs"
CHECKPOINT = "allenai/OLMoE-1B-7B-0924"
BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
DECIMAL = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint like the one that the pages name."""
    found = saved(tiny.build("olmoe"), tmp_path_factory.mktemp("olmoe"))
    huggingface._ID_CACHE[found] = found
    return found


@pytest.fixture
def page(folder: str) -> Callable[..., dict[str, Any]]:
    """Runs the python blocks of a page one after the other, beside what it says that they print; gives the names."""

    def run(name: str, **names: Any) -> dict[str, Any]:
        text = (DOCS / name).read_text("utf-8").replace(CHECKPOINT, folder)
        for number, (block, said) in enumerate(BLOCK.findall(text)):
            file = f"<{name} {number}>"  # nnsight reads the source of a trace
            linecache.cache[file] = (len(block), None, block.splitlines(keepends=True), file)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block, file, "exec"), names)
            print(printed.getvalue(), end="")
            if said:
                assert_same(said, printed.getvalue())
        return names

    return run


def assert_same(said: str, printed: str) -> None:
    """Word for word, but for decimals, of which another machine may round the last digit otherwise."""
    assert DECIMAL.sub("#", printed).split() == DECIMAL.sub("#", said).split(), printed
    shown, found = (np.array([float(one) for one in DECIMAL.findall(text)]) for text in (said, printed))
    assert np.allclose(found, shown, rtol=0.02, atol=0.011), printed


def test_the_page_about_nnsight(page):
    names = page("nnsight.md")
    lm = names["lm"]
    with moe.wrap(lm) as model:
        text = "The capital of France is"
        plain = model.run(text)
        assert torch.equal(plain.routing[2].weights, names["weights"])
        edit = moe.ablate(layer=2, expert=5)
        assert torch.equal(
            model.generate(model.encode(text), edit=edit, max_new_tokens=5, do_sample=False), names["ids"]
        )
    assert names["slope"].shape == (1, len(text), 64) and names["slope"].abs().max() > 0
    assert names["first"].shape == names["second"].shape == (1, 96)
    names["points"].close()


def test_the_page_about_servers(page, address, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", address)
    names = page("ndif.md")
    assert not names["lm"].dispatched
    assert set(names["run"].routing) == {0, 1, 2, 3}
    assert names["run"].top_tokens("resid_post", 2).ids.shape == (2, 1, 5)
    assert isinstance(names["written"], str) and names["weights"].shape[-1] == 3
    assert names["routes"].attrs


def test_the_page_about_coming_from_elsewhere(page):
    names = page("migration.md")
    assert names["outputs"].shape[-1] == 64 and names["used"].dtype is torch.bool
    with moe.wrap(names["lm"]) as model:
        text = "The capital of France is"
        run = model.run(text, read=["moe_out", "resid_post", "attn_out", "expert_out"])
    assert torch.equal(names["mlp"], run["moe_out", 2]) and torch.equal(names["residual"], run["resid_post", 2])
    assert torch.equal(names["attention"], run["attn_out", 3]) and torch.equal(names["weights"], run.routing[3].weights)
    assert torch.equal(names["output"], run.expert(3, 5)[0])


def test_the_page_about_results(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page("results.md")
    assert [file.name for file in tmp_path.iterdir()] == ["routes.nc"]


def test_the_page_about_training(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, told = page("training.md"), {}
    with moe.RoutingWatch(names["model"], every=1, to=lambda step, values: told.update(values)) as watch, watch.step(0):
        names["model"](input_ids=names["batches"][0])
    listed = re.findall(r"^\| `(routing/\S+)`", (DOCS / "training.md").read_text("utf-8"), re.MULTILINE)
    assert listed == [name for name in told if "layer_1" not in name]


def test_what_a_page_says_is_held_to_what_is_printed():
    assert_same("expert 3: 0.50 [0.4, 0.6]\n", "expert 3:  0.505 [0.4, 0.6]\n")
    for printed in ("expert 4: 0.50 [0.4, 0.6]", "expert 3: 0.53 [0.4, 0.6]", "expert 3: 0.50 [0.4, nan]"):
        with pytest.raises(AssertionError):
            assert_same("expert 3: 0.50 [0.4, 0.6]", printed)


def test_the_page_about_architectures_of_ones_own(page, monkeypatch, capsys):
    monkeypatch.setattr("moe_interp.adapters.families.FAMILIES", dict(adapters.FAMILIES))
    mine = linear_gates.build("softmax_topk_renormalised")
    mine.config.model_type = "my_moe"
    names = page("adapters.md", my_model=mine)
    assert "audit of my_moe: passed" in capsys.readouterr().out
    model, inputs, clean, expert = (names[name] for name in ("model", "inputs", "clean", "expert"))
    assert names["audit"].passed and not model.spec.options
    ids, weights = clean.routing[1].ids, clean.routing[1].weights
    assert names["ablated"].touched == (int((ids == expert).sum()),)
    signal = model.run(inputs, read=["resid_post", "expert_out"])
    lost = (signal["expert_out", 1] * (weights * (ids == expert))[..., None]).sum(2)
    net = model.hf
    expected = net.head(net.norm(signal["resid_post", 1] - lost).mean(dim=1)).detach()
    assert torch.allclose(names["ablated"].logits, expected, atol=1e-5)
    assert not torch.allclose(clean.logits, expected, atol=1e-3)
