"""Labelled pictures for the vision study: scikit-learn's digits, or CIFAR-10 from disk. Nothing is fetched or kept.

`read_images` takes

- ``digits``: 1,797 pictures of 8 x 8 that scikit-learn brings along;
- a folder with ``train*.parquet`` and ``test*.parquet``, in it, in ``data/`` or in ``plain_text/``, as hubs lay out
  image data sets: a column ``image`` or ``img`` of encoded pictures, a column ``label`` of numbers;
- a folder with ``train/CLASS/*`` and ``test/CLASS/*``, a picture a file;
- a folder with ``cifar-10-batches-py``, which torchvision reads if it is installed.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from moe_interp.errors import BadData, BadInput

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VEHICLES = ("airplane", "automobile", "ship", "truck")
LOOPED = ("0", "6", "8", "9")
Rows = tuple[list[Any], Int[np.ndarray, " N"]]  # encoded pictures or paths, and their labels


@dataclass(frozen=True)
class Images:
    """Pictures of known classes, and a split of the classes into two groups that experts may follow.

    Attributes:
        name: for provenance.
        train, test: [N, C, H, W], 0 ... 255.
        train_labels, test_labels: numbers of classes.
        classes: their names.
        groups: the group of each class.
    """

    name: str
    train: UInt8[Tensor, "N C H W"]
    train_labels: Int[Tensor, " N"]
    test: UInt8[Tensor, "M C H W"]
    test_labels: Int[Tensor, " M"]
    classes: tuple[str, ...]
    groups: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all pictures and labels, which says whether two studies saw the same."""
        found = sha256()
        for values in (self.train, self.train_labels, self.test, self.test_labels):
            found.update(str(tuple(values.shape)).encode() + np.ascontiguousarray(values.numpy()).tobytes())
        return found.hexdigest()

    def normalised(
        self, device: torch.device | str = "cpu"
    ) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "M C H W"]]:
        """Training and test pictures of mean 0 and standard deviation 1 over the training ones, by channel."""
        train, test = (pictures.to(device).float() for pictures in (self.train, self.test))
        mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
        return tuple(
            ((pictures - mean) / std).contiguous(memory_format=torch.channels_last) for pictures in (train, test)
        )  # type: ignore[return-value]


def read_images(source: str | Path = "digits", *, train: int | None = None, test: int | None = None) -> Images:
    """Pictures from a source that the module's docstring names.

    Args:
        source: "digits", or a folder.
        train, test: so many of them, drawn with a fixed seed (None: all).

    Raises:
        BadInput: a package is missing that reads them.
        BadData: no such folder, or no pictures in it that can be read.
    """
    if str(source) == "digits":
        return _digits(train, test)
    folder = Path(source)
    read = _reader(folder)
    pictures = {}
    for split, count in (("train", train), ("test", test)):
        encoded, labels = read(split)
        kept = _some(len(labels), count)
        pictures[split] = torch.stack([_decode(encoded[at]) for at in kept])
        pictures[f"{split}_labels"] = torch.as_tensor(labels[kept], dtype=torch.long)
    groups = tuple("vehicle" if name in VEHICLES else "animal" for name in CIFAR10)
    return Images(name="CIFAR-10", classes=CIFAR10, groups=groups, **pictures)


def _some(available: int, count: int | None) -> list[int]:
    order = np.random.default_rng(0).permutation(available)
    return sorted(order[:count].tolist())


def _digits(train: int | None, test: int | None) -> Images:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise _missing("scikit-learn", "digits") from error
    found = load_digits()
    grey = torch.as_tensor(found.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.as_tensor(found.target, dtype=torch.long)
    first, second = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    first, second = first[_some(len(first), train)], second[_some(len(second), test)]
    names = tuple(str(name) for name in range(10))
    groups = tuple("with a loop" if name in LOOPED else "without" for name in names)
    return Images("digits", grey[first], labels[first], grey[second], labels[second], names, groups)


def _missing(package: str, what: str) -> BadInput:
    return BadInput(f"cannot read {what}", expected=package, got="none installed", do=f"pip install {package}.")


def _reader(folder: Path) -> Callable[[str], Rows]:
    """Reads a split of the first layout that a folder has."""
    for place in (folder, folder / "data", folder / "plain_text"):
        if all(any(place.glob(f"{split}*.parquet")) for split in ("train", "test")):
            return lambda split: _parquet(sorted(place.glob(f"{split}*.parquet")))
    if any((folder / split / CIFAR10[0]).is_dir() for split in ("train", "test")):
        return lambda split: _files(folder / split)
    if (folder / "cifar-10-batches-py").is_dir():
        return lambda split: _torchvision(folder, split)
    raise BadData(
        f"cannot read pictures from {folder}",
        expected="train*.parquet and test*.parquet, train/airplane/* and so on, or cifar-10-batches-py",
        got="none of them" if folder.is_dir() else "no such folder",
    )


def _parquet(paths: list[Path]) -> Rows:
    from pyarrow import ArrowException, concat_tables, parquet

    try:
        table = concat_tables([parquet.read_table(path) for path in paths])
    except (OSError, ArrowException) as error:
        raise BadData(f"cannot read {paths[0]}", expected="a parquet file", got=str(error)) from error
    name = next((name for name in ("image", "img") if name in table.column_names), None)
    if name is None or "label" not in table.column_names:
        raise BadData(
            f"cannot read pictures from {paths[0]}", expected="columns image and label", got=str(table.column_names)
        )
    pictures = [row["bytes"] if isinstance(row, dict) else row for row in table[name].to_pylist()]
    return pictures, _labels(np.asarray(table["label"].to_pylist()), paths[0])


def _files(folder: Path) -> Rows:
    empty = [name for name in CIFAR10 if not (folder / name).is_dir() or not any((folder / name).iterdir())]
    if empty:
        raise BadData(
            f"cannot read pictures from {folder}", expected="a folder of pictures a class", got=f"none: {empty}"
        )
    pictures = [(path, number) for number, name in enumerate(CIFAR10) for path in sorted((folder / name).iterdir())]
    return [path for path, _ in pictures], np.array([number for _, number in pictures])


def _torchvision(folder: Path, split: str) -> Rows:
    try:
        from torchvision.datasets import CIFAR10 as Dataset
    except ImportError as error:
        raise _missing("torchvision", f"{folder / 'cifar-10-batches-py'}") from error
    try:
        found = Dataset(folder, train=split == "train", download=False)
    except RuntimeError as error:  # it compares checksums
        raise BadData(f"cannot read {folder}", expected="the data set's own files", got=str(error)) from error
    return list(found.data), _labels(np.asarray(found.targets), folder)


def _labels(labels: np.ndarray, source: Path) -> np.ndarray:
    if labels.size == 0 or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(CIFAR10):
        raise BadData(f"labels of {source} are not CIFAR-10's", expected="numbers from 0 to 9", got=str(labels[:10]))
    return labels


def _decode(picture: Any) -> UInt8[Tensor, "3 32 32"]:
    """An array, a file or the bytes of one, as channels, rows and columns."""
    pixels = picture if isinstance(picture, np.ndarray) else _opened(picture)
    if pixels.shape != (32, 32, 3):
        raise BadData("not a picture of CIFAR-10", expected="32 x 32 pixels, RGB", got=str(pixels.shape))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _opened(picture: Any) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise _missing("pillow", "pictures") from error
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            return np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise BadData("cannot read a picture", expected="an image file", got=str(error)) from error
