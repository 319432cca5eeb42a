"""What it costs that a child process reads a saved result.

Random results of several sizes, each loaded both ways in turn; medians over rounds.

    python benchmarks/load_result.py --rounds 9
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_interp.results import Variable, labelled, load, save

MEGABYTES = (0.1, 16, 100)


def saved(folder: Path, megabytes: float) -> Path:
    """A file with so many megabytes of random float64."""
    values = np.random.default_rng(0).random((int(megabytes * 1e6 / 8 / 100), 100))
    path = folder / f"{megabytes}.nc"
    result = labelled(
        {"values": Variable(("row", "column"), values, "1", "random, 0 ... 1")},
        {"row": range(len(values)), "column": range(100)},
        analysis="benchmark",
        provenance={},
    )
    save(result, path)
    return path


def seconds(path: Path, trusted: bool) -> float:
    """How long one load takes."""
    began = time.perf_counter()
    load(path, trusted=trusted)
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print("| MB | trusted, s | in a child, s | more, s |\n|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in MEGABYTES:
            path = saved(Path(folder), megabytes)
            pairs = [(seconds(path, True), seconds(path, False)) for _ in range(rounds + 1)][1:]
            here, child = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"| {megabytes} | {here:.2f} | {child:.2f} | {child - here:.2f} |", flush=True)


if __name__ == "__main__":
    main()
