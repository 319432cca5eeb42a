"""Files that nobody vouches for: damaged, endless, far larger than they look, or referring to others.

Each is read or refused in bounded time and memory, and what reads it ends no process but its own.
"""

import gzip
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
import xarray as xr
from pyarrow import parquet

import moe_interp as moe
from moe_interp import files, untrusted
from moe_interp.errors import BadData, BadInput
from moe_interp.results import load, save
from tests.test_results import assert_same, example


def damaged(good: bytes, rng: np.random.Generator) -> bytes:
    """A copy that is cut, or whose bytes are changed, flipped in a bit, or zero over a stretch."""
    bad = bytearray(good[: rng.integers(1, len(good))] if rng.random() < 0.2 else good)
    kind = rng.integers(3)
    if kind == 2:
        begin = rng.integers(len(bad))
        bad[begin : begin + 100] = bytes(len(bad[begin : begin + 100]))
        return bytes(bad)
    for place in rng.integers(len(bad), size=rng.integers(1, 20)):
        bad[place] = rng.integers(256) if kind else bad[place] ^ 1 << rng.integers(8)
    return bytes(bad)


def fuzz(path: Path, read, copies: int) -> tuple[int, float]:
    """How many damaged copies of a file are refused, and the longest time that one takes."""
    good, rng, refused, longest = path.read_bytes(), np.random.default_rng(0), 0, 0.0
    bad = path.with_name(f"bad{path.suffix}")
    for _ in range(copies):
        bad.write_bytes(damaged(good, rng))
        began = time.perf_counter()
        try:
            read(bad)
        except BadData:
            refused += 1
        longest = max(longest, time.perf_counter() - began)
    return refused, longest


def texts(folder):
    """A parquet file of a few texts and domains."""
    table = {"text": [f"text {number} of some" for number in range(200)], "domain": ["a", "b"] * 100}
    parquet.write_table(pa.table(table), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize("copies", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_results_are_read_or_refused_in_seconds(copies, tmp_path):
    example().to_netcdf(tmp_path / "x.nc", engine="h5netcdf")  # as others write it, without a hash that tells damage
    refused, longest = fuzz(tmp_path / "x.nc", load, copies)
    assert refused > copies / 2 and longest < 90  # by the clock: the limit is of processor time


def test_any_damage_to_what_save_wrote_is_seen(tmp_path):
    """Of values too, of which the format itself says nothing."""
    path = save(example(), tmp_path / "x.nc")
    good = path.read_bytes()
    for place in np.random.default_rng(0).integers(len(good), size=300).tolist():
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        if len(good) - place > 82:
            with pytest.raises(BadData, match="x.nc is damaged: expected the bytes that save wrote, got others"):
                load(path)
    path.write_bytes(good)
    assert_same(xr.load_dataset(path, engine="h5netcdf"), example())


@pytest.mark.filterwarnings("ignore:.* empty texts")
@pytest.mark.parametrize("copies", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_parquet_is_read_or_refused_in_seconds(copies, tmp_path):
    refused, longest = fuzz(texts(tmp_path), moe.read_corpus, copies)
    assert refused > copies / 4 and longest < 90


READERS = {
    "crash": "os.abort()",
    "loop": "resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass",
    "wait": "time.sleep(20)",
    "half a frame": "sys.stdout.buffer.write(b'J' + (100).to_bytes(8, 'little') + b'{}')",
    "no end": "sys.stdout.buffer.write(b'J' + (2).to_bytes(8, 'little') + b'[]')",
}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("crash", "damage that ends the reading library .exit status -6."),
        ("loop", "damage that keeps the reading library busy without end"),
        ("wait", "a file that takes too long to read, or too much memory"),
        ("half a frame", "damage that ends the reading library .exit status 0."),
        ("no end", "damage that ends the reading library .exit status 0."),
    ],
)
def test_whatever_becomes_of_the_child_is_an_error(kind, said, tmp_path, monkeypatch):
    (tmp_path / "reader.py").write_text(f"import os, resource, sys, time\n{READERS[kind]}\n")
    monkeypatch.setattr(untrusted, "_READER", tmp_path / "reader.py")
    monkeypatch.setattr(untrusted, "SILENCE", 3.0)
    (tmp_path / "x.nc").write_bytes(b"x")
    with pytest.raises(BadData, match=f"cannot read .*x.nc: expected a, got {said}"):
        list(untrusted.frames("netcdf", tmp_path / "x.nc", expected="a"))


def test_a_reader_that_nobody_listens_to_is_ended(tmp_path, monkeypatch):
    started = []
    begin = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **more: started.append(begin(*given, **more)) or started[0])
    (tmp_path / "reader.py").write_text(f"import sys, time\n{READERS['no end']}\nsys.stdout.flush()\ntime.sleep(20)\n")
    monkeypatch.setattr(untrusted, "_READER", tmp_path / "reader.py")
    answers = untrusted.frames("parquet", texts(tmp_path), "text", expected="a")
    assert next(answers) == []
    answers.close()
    assert started[0].returncode == -9 and started[0].stdout.closed


def test_a_file_that_is_trusted_is_read_here(tmp_path, monkeypatch):
    path = save(example(), tmp_path / "x.nc")
    monkeypatch.setattr(untrusted, "_READER", tmp_path / "none.py")
    assert_same(load(path, trusted=True), example())
    with pytest.raises(BadData, match="exit status 2"):
        load(path)
    with pytest.raises(BadInput, match="trusted is neither True nor False: expected True or False, got 'no'"):
        load(path, trusted="no")


def test_what_others_wrote_comes_back_as_xarray_reads_it(tmp_path):
    """Fill values, scales, times, characters, other byte orders, attributes of every kind, a file without values."""
    given = xr.Dataset(
        {
            "filled": ("a", [1.0, np.nan, 3.0], {"one": np.int16(3), "more": [1.5, np.inf], "texts": ["x", "é"]}),
            "time": ("a", np.array(["2020-01-01", "2021-02-03", "NaT"], "datetime64[ns]")),
            "swapped": ("a", np.arange(3, dtype=">i4")),
            "characters": ("a", np.array([b"ab", b"c", b""])),
            "flag": ("a", [True, False, True]),
            "empty": (("a", "none"), np.zeros((3, 0))),
        },
        coords={"a": ["p", "q", "r"], "beside": ("a", [1, 2, 3])},
        attrs={"text": "é", "empty": "", "number": 3, "array": np.arange(3, dtype=np.uint8)},
    )
    packed = {"filled": {"dtype": "int16", "scale_factor": 0.5, "_FillValue": -1}}
    given.to_netcdf(tmp_path / "x.nc", engine="h5netcdf", encoding=packed)
    assert_same(load(tmp_path / "x.nc"), xr.load_dataset(tmp_path / "x.nc", engine="h5netcdf"))
    xr.Dataset().to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    assert_same(load(tmp_path / "x.nc"), xr.Dataset())
    assert load(save(example(), tmp_path / "x.nc")).share.values.flags.writeable


# ---- files that are larger than they look, or lie elsewhere ---------------------------------------------------------


def outside(folder, kind):
    """A file that takes its values from another one."""
    (folder / "secret.bin").write_bytes(np.arange(4.0).tobytes())
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.arange(4.0)
    with h5py.File(folder / "x.nc", "w") as file:
        if kind == "storage":
            file.create_dataset("x", (4,), float, external=[(str(folder / "secret.bin"), 0, 32)])
        elif kind == "link":
            file["x"] = h5py.ExternalLink(str(folder / "other.h5"), "x")
        elif kind == "a link in a group":
            file.create_group("deep/er")["x"] = h5py.ExternalLink(str(folder / "other.h5"), "x")
        else:
            layout = h5py.VirtualLayout((4,), float)
            layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (4,))
            file.create_virtual_dataset("x", layout)
    return folder / "x.nc"


@pytest.mark.parametrize("kind", ["storage", "link", "a link in a group", "virtual"])
def test_a_result_that_refers_to_other_files_is_refused(kind, tmp_path):
    with pytest.raises(BadData, match=r"x.nc refers to other files: expected a file that holds its own values, got"):
        load(outside(tmp_path, kind))


def test_a_result_that_states_sizes_beyond_its_bytes_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.nc", "w") as file:
        file.create_dataset("x", (10**12,), float, chunks=(10**6,))
    with pytest.raises(BadData, match="x.nc states sizes that it cannot hold: .*, got 8000000000000 bytes"):
        load(tmp_path / "x.nc")


@pytest.mark.parametrize("link", ["hard", "soft"])
def test_values_that_are_read_under_many_names_count_under_each(link, tmp_path):
    with h5py.File(tmp_path / "x.nc", "w") as file:
        file["n"] = np.zeros(10**6)
        file["n"].make_scale("n")
        for number in range(40):
            file[f"x{number}"] = file["n"] if link == "hard" else h5py.SoftLink("/n")
    with pytest.raises(BadData, match="x.nc states sizes that it cannot hold: .*, got 328000000 bytes"):
        load(tmp_path / "x.nc")


def sharing(path, count, characters):
    """A file of many strings that all lie at the same place."""
    with h5py.File(path, "w") as file:
        texts = file.create_dataset("x", (count,), h5py.string_dtype())
        texts[0] = "a" * characters
        file["n"] = np.zeros(count)
        file["n"].make_scale("n")
        texts.dims[0].attach_scale(file["n"])
        place = texts.id.get_offset()
    content = bytearray(path.read_bytes())
    content[place : place + 16 * count] = content[place : place + 16] * count
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("count", "characters", "said"),
    [
        (3, 4000, "x.nc has strings that share their bytes: expected at most .* characters, its size, got 12000"),
        (50_000, 10**6, "got .*memory allocation failed|got values that take more memory"),
    ],
)
def test_strings_that_share_their_bytes_are_refused(count, characters, said, tmp_path):
    with pytest.raises(BadData, match=said):
        load(sharing(tmp_path / "x.nc", count, characters))


def test_strings_that_would_be_padded_to_absurd_lengths_are_refused(tmp_path):
    longest = np.array(["a"] * 10**4 + ["b" * 10**4], object)
    xr.Dataset({"x": ("a", longest)}).to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    with pytest.raises(BadData, match="x.nc has strings that are too long side by side: .*, got 400040000 bytes"):
        load(tmp_path / "x.nc")


def test_values_of_a_type_that_no_result_has_are_refused(tmp_path):
    with h5py.File(tmp_path / "x.nc", "w") as file:
        file["x"] = np.zeros(3, [("a", int), ("b", float)])
        file["n"] = np.zeros(3)
        file["n"].make_scale("n")
        file["x"].dims[0].attach_scale(file["n"])
    with pytest.raises(BadData, match="x.nc holds values of a type that no result has: expected numbers and strings"):
        load(tmp_path / "x.nc")


def repeated(path, text, rows):
    """A parquet file of the same text in every row, which takes next to no bytes."""
    shared = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int8), [text])
    parquet.write_table(pa.table({"text": shared}), path, compression="zstd")
    assert path.stat().st_size < 10**5
    return path


@pytest.mark.filterwarnings("ignore:.* empty texts")
@pytest.mark.parametrize(("text", "rows"), [("", 10**7), ("a" * 10**6, 10**6), ("a" * 10**8, 1)])
def test_parquet_of_absurdly_many_or_long_texts_is_refused(text, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 10**6)
    path = repeated(tmp_path / "x.parquet", text, rows)
    with pytest.raises(BadData, match="x.parquet expands to more than a file of its size|take more memory than a file"):
        moe.read_corpus(path)
    assert len(moe.read_corpus(repeated(path, "a text", 3000))) == 3000


def test_compressed_lines_that_expand_absurdly_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 10**5)
    for content in (b'{"text":"a"}\n', b"\n"):
        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content * 10**6))
        with pytest.raises(BadData, match="x.jsonl.gz expands to more than a file of its size has reason to: expected"):
            moe.read_corpus(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.jsonl").write_text('{"text":"a"}\n' * 10**4)
    assert len(moe.read_corpus(tmp_path / "x.jsonl")) == 10**4


@pytest.mark.parametrize("value", [["a"], b"a", {"a": "b"}])
def test_parquet_whose_text_is_no_string_is_an_error(value, tmp_path):
    parquet.write_table(pa.table({"text": [value]}), tmp_path / "x.parquet")
    with pytest.raises(BadData, match="record 1 of .* has no text: expected a string under 'text', got"):
        moe.read_corpus(tmp_path / "x.parquet")
