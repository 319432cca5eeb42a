"""Labelled results: what goes in comes back from a file, dtypes and attrs too; nothing is half-written."""

import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import moe_interp as moe
from moe_interp import __version__
from moe_interp.errors import BadData, BadInput, BadOutput
from moe_interp.paths import check_writable
from moe_interp.results import Variable, labelled, load, provenance_of, save
from moe_interp.views.page import write
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

PROVENANCE = {"model": "tiny/é", "tokens": 12, "level": 0.95}
IDS = torch.arange(3, 15).view(2, 6)


def example() -> xr.Dataset:
    """Every dtype that is allowed, a NaN, a scalar, an empty axis, and strings that are hard to keep."""
    numbers = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
    variables = {
        name: Variable(("domain",), np.array([0, np.iinfo(name).max if "int" in name else np.nan], name), "1", "x")
        for name in numbers
    }
    variables["share"] = Variable(("domain", "layer"), [[0.1, np.nan, 1e-300], [np.inf, -0.0, 1.0]], "1", "a share")
    variables["token"] = Variable(("pos",), ["<b>", "", " é▁", "\n", "☕" * 40], "text", "tokens")
    variables["nothing"] = Variable(("empty",), np.zeros(0), "nats", "an empty axis")
    variables["loss"] = Variable((), np.float64(0.1), "nats", "a scalar")
    coords = {"domain": ["arXiv", "Français"], "layer": np.array([1, 3, 27])}
    return labelled(variables, coords, analysis="example", provenance=PROVENANCE)


def assert_same(left: xr.Dataset, right: xr.Dataset) -> None:
    xr.testing.assert_identical(left, right)
    assert {name: left[name].dtype for name in left.variables} == {name: right[name].dtype for name in right.variables}


def test_attrs_say_what_it_is():
    dataset = example()
    assert dataset.attrs == {
        "analysis": "example",
        "provenance": json.dumps(PROVENANCE, ensure_ascii=False, sort_keys=True),
        "moe_interp": __version__,
    }
    assert provenance_of(dataset) == PROVENANCE
    assert dataset["share"].attrs == {"units": "1", "description": "a share"}
    assert dataset["loss"].attrs == {"units": "nats", "description": "a scalar"}
    assert dataset["share"].sel(domain="arXiv", layer=27) == 1e-300


def test_survives_save_and_load(tmp_path):
    assert_same(load(save(example(), tmp_path / "result.nc")), example())


def test_survives_plain_to_netcdf(tmp_path):
    example().to_netcdf(tmp_path / "result.nc", engine="h5netcdf")
    assert_same(xr.load_dataset(tmp_path / "result.nc", engine="h5netcdf"), example())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1))
def test_any_string_without_nul_survives(tmp_path_factory, texts):
    dataset = labelled({"token": Variable(("pos",), texts, "text", "t")}, {}, analysis="a", provenance={})
    found = load(save(dataset, tmp_path_factory.getbasetemp() / "strings.nc"))
    assert found["token"].values.tolist() == texts


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([True]), "bool"),
        (np.array([1j]), "complex128"),
        (np.array([1.0], np.float16), "float16"),
        (np.array([None]), "object"),
        (np.array(["2020-01-01"], "datetime64[D]"), "datetime64"),
        (["a\0b"], "a NUL"),
        (["a\0"], "a NUL"),
    ],
)
def test_what_a_file_does_not_keep_is_refused(values, said):
    with pytest.raises(BadInput, match=rf"result 'odd' cannot be stored: expected .*, got {said}"):
        labelled({"odd": Variable(("pos",), values, "1", "odd")}, {}, analysis="a", provenance={})
    with pytest.raises(BadInput, match="result 'odd' cannot be stored"):
        labelled({}, {"odd": values}, analysis="a", provenance={})


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        (Variable(("layer",), [1.0], "", "a share"), "is not described: expected units and meaning"),
        (Variable(("layer",), [1.0], "1", ""), "is not described: expected units and meaning"),
        (Variable(("layer",), [[1.0]], "1", "x"), r"expected 1 axes \(layer\), got shape \(1, 1\)"),
        (Variable(("layer",), [1.0, 2.0, 3.0], "1", "x"), "a result's dims do not fit"),
    ],
)
def test_undescribed_and_misfitting_variables_are_refused(variable, said):
    with pytest.raises(BadInput, match=said):
        labelled({"share": variable}, {"layer": [0, 1]}, analysis="a", provenance={})


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    old, none = tmp_path / "real" / "old.nc", tmp_path / "real" / "none.nc"
    old.write_text("old")
    for name, target in (("a.nc", old), ("b.nc", none)):
        link = tmp_path / name
        link.symlink_to(target)
        check_writable(link)
        save(example(), link)
        assert link.is_symlink() and not target.is_symlink()
        assert_same(load(target), example())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.nc", "b.nc", "none.nc", "old.nc", "real"]


def test_what_is_no_regular_file_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path / "link"):
        for refused in (check_writable, lambda path: write("text", path), lambda path: save(example(), path)):
            with pytest.raises(BadOutput, match="cannot write .*: expected a regular file, .* got a pipe, a device"):
                refused(target)
    with pytest.raises(BadOutput, match="got a folder"):
        check_writable(tmp_path)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for target in (tmp_path / "missing" / "result.nc", tmp_path / "file" / "result.nc"):
        with pytest.raises(BadOutput, match="cannot write .*: expected a file in a writable folder, got"):
            save(example(), target)
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadOutput, match="cannot write"):
        save(example(), tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_interrupted_save_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    target = save(example(), tmp_path / "result.nc")
    before = target.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadOutput, match="No space left on device"):
        save(example(), target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["result.nc"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\x89HDF\r\n\x1a\nbroken"])
def test_a_corrupt_or_missing_file_is_an_error(tmp_path, content):
    (tmp_path / "bad.nc").write_bytes(content)
    for name in ("bad.nc", "missing.nc"):
        with pytest.raises(BadData, match=f"cannot read .*{name}: expected a result saved as netCDF-4, got"):
            load(tmp_path / name)


def test_a_result_under_edits_says_so():
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        edit = moe.scale(layer=0, expert=2, by=0.5)
        assert "edits" not in provenance_of(moe.expert_effects(model, IDS))
        with model.edit(edit):
            assert provenance_of(moe.expert_effects(model, IDS))["edits"] == repr(edit)
        assert model.run(IDS, edit=edit).provenance["edits"] == repr(edit)
        assert "edits" not in model.run(IDS).provenance
        told = model.run(IDS, edit=moe.apply("resid_mid", lambda value: value, layers=1)).provenance["edits"]
        assert "<lambda>" in told and "0x" not in told


FULL = """
import resource, sys
import numpy as np, torch
from pathlib import Path
from moe_interp.errors import BadOutput
from moe_interp.paths import write_whole
from moe_interp.results import Variable, labelled, save

folder = Path(sys.argv[1])
values = np.random.default_rng(0).normal(size=10**5)
big = labelled({"x": Variable(("a",), values, "1", "x")}, {}, analysis="a", provenance={})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for write in (lambda: save(big, folder / "x.nc"), lambda: write_whole(folder / "x.nc", bytes(10**5))):
    try:
        write()
    except BadOutput as error:
        print(error)
"""


def test_a_disk_without_room_is_an_error_and_ends_no_process(tmp_path):
    """In a process of its own, whose files may have 50 kB."""
    (tmp_path / "x.nc").write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert (
        done.stdout.splitlines()
        == [f"cannot write {tmp_path / 'x.nc'}: expected a file in a writable folder, got File too large"] * 2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.nc"] and (tmp_path / "x.nc").read_text() == "old"


@pytest.mark.parametrize("name", ["x.csv", "x", "x.json", "x.nc.gz", "x.NC"])
def test_a_name_of_another_format_is_refused(name, tmp_path):
    says = f"cannot write .*{name}: expected a name that ends in .nc: results are netCDF, got '{name}'"
    with pytest.raises(BadOutput, match=says):
        save(example(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_write_and_what_is_written_stays(tmp_path):
    left, busy = (tmp_path / f".x.nc.{digit * 32}.part" for digit in "ab")
    others = [tmp_path / name for name in (f".y.nc.{'a' * 32}.part", ".x.nc.part", f"x.nc.{'a' * 32}.part")]
    for path in (left, busy, *others):
        path.write_text("half")
    with busy.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(example(), tmp_path / "x.nc")
    assert {path.name for path in tmp_path.iterdir()} == {"x.nc", busy.name, *(path.name for path in others)}
    assert_same(load(tmp_path / "x.nc"), example())


def test_a_dataset_that_netcdf_cannot_hold_is_an_error_and_leaves_nothing(tmp_path):
    odd = example().assign_attrs(odd={"a": 1})
    with pytest.raises(BadInput, match="this Dataset cannot be stored"):
        save(odd, tmp_path / "x.nc")
    assert not list(tmp_path.iterdir())


def test_well_compressed_results_of_others_are_read(tmp_path):
    dataset = xr.Dataset({"x": ("a", np.zeros(10**5))})
    dataset.to_netcdf(tmp_path / "x.nc", engine="h5netcdf", encoding={"x": {"zlib": True, "complevel": 9}})
    assert_same(load(tmp_path / "x.nc"), dataset)


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "x.nc")
    for read in (load, moe.TunedLens.load):
        with pytest.raises(BadData, match="cannot read .*x.nc: expected .*, got a pipe, a device or the like"):
            read(tmp_path / "x.nc")


def test_both_ends_of_an_interval_are_along_the_first_dim():
    ends = np.arange(12.0).reshape(2, 3, 2)
    for dims, values in ((("a", "b", "bound"), ends), (("a", "bound", "b"), ends.swapaxes(1, 2))):
        found = labelled(
            {"x": Variable(dims, values, "1", "x")}, {"bound": ["low", "high"]}, analysis="a", provenance={}
        )
        assert found.x.dims == ("bound", "a", "b")
        assert found.x.sel(bound="high").values.tolist() == ends[..., 1].tolist()


def test_half_of_a_surrogate_pair_is_refused_in_values_and_escaped_in_provenance(tmp_path):
    with pytest.raises(BadInput, match="result 'x' cannot be stored: expected Unicode text, got half of a surrogate"):
        labelled({"x": Variable(("a",), ["\ud800"], "text", "x")}, {}, analysis="a", provenance={})
    found = labelled({}, {}, analysis="a", provenance={"model": "\udcff"})
    assert provenance_of(load(save(found, tmp_path / "x.nc"))) == {"model": "\udcff"}


@pytest.mark.parametrize("told", [None, "{", "[" * 100_000, "3", 3])
def test_a_dataset_without_provenance_says_so(told):
    attrs = {} if told is None else {"provenance": told}
    with pytest.raises(BadData, match="no provenance: expected a result of an analysis of moe_interp, got"):
        provenance_of(xr.Dataset(attrs=attrs))


def test_a_lens_whose_metadata_is_too_deep_is_refused(tmp_path):
    save_file(
        {"x": torch.ones(1)}, tmp_path / "x.safetensors", {"format": "moe_interp tuned lens", "layers": "[" * 10**5}
    )
    with pytest.raises(BadData, match="cannot read .*x.safetensors: expected a file that TunedLens.save wrote"):
        moe.TunedLens.load(tmp_path / "x.safetensors")
