"""Example contexts of every expert: where its weight was largest, and where it was chosen, at random.

The largest weight is unlike the usual one, so both kinds are kept. What is drawn depends on the seed, the document and
the position alone: the smallest hashes of these are kept, which any order of batches and merges agrees on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from moe_interp.analyses.exact import UNIT, Exact
from moe_interp.run import Run


@dataclass
class Examples(Exact):
    """The few tokens of each expert that come first, by weight and by chance.

    Holds 48 L E n bytes: 1 MB for 27 layers, 64 experts and 12 examples.

    Attributes:
        layers: [L], MoE layer indices.
        seed: of the random ones.
        heaviest: [L, E, n, 3]: weight in units of 2^-32, document, position; weight -1 where there are fewer.
        random: [L, E, n, 3]: a hash in place of the weight; -1 where there are fewer.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    layers: tuple[int, ...]
    seed: int
    heaviest: Int[np.ndarray, "L E n three"]
    random: Int[np.ndarray, "L E n three"]

    @classmethod
    def empty(cls, layers: Sequence[int], experts: int, examples: int, *, seed: int = 0) -> "Examples":
        """None kept yet."""
        size = (len(layers), experts, examples, 3)
        return cls(tuple(layers), seed, np.full(size, -1, np.int64), np.full(size, -1, np.int64))

    def update(self, run: Run, documents: Int[np.ndarray, " B"]) -> None:
        """Adds a run; row b belongs to document ``documents[b]``."""
        for index, layer in enumerate(self.layers):
            routing = run.routing[layer]
            mask = routing.mask.cpu().numpy()
            ids = routing.ids.cpu().numpy()[mask]
            weights = np.rint(routing.weights.cpu().double().numpy()[mask] * UNIT).astype(np.int64)
            places = np.stack(
                [np.broadcast_to(documents[:, None], mask.shape)[mask], run.tokens.index.cpu().numpy()[mask]], axis=-1
            )
            hashes = np.broadcast_to(_hash(places, self.seed)[:, None], ids.shape)
            for kept, keys in ((self.heaviest, weights), (self.random, hashes)):
                kept[index] = self._with(kept[index], ids, keys, places)

    def _with(
        self, kept: Int[np.ndarray, "E n three"], ids: np.ndarray, keys: np.ndarray, places: np.ndarray
    ) -> Int[np.ndarray, "E n three"]:
        """The first ones of those kept and of new token-slots."""
        experts, count, _ = kept.shape
        rows = np.column_stack([keys.ravel(), np.repeat(places, ids.shape[1], axis=0)])
        expert = ids.ravel()
        order = np.lexsort((rows[:, 2], rows[:, 1], -rows[:, 0], expert))
        expert, rows = expert[order], rows[order]
        rank = np.arange(len(expert)) - np.searchsorted(expert, expert)
        new = np.full((experts, count, 3), -1, np.int64)
        first = rank < count
        new[expert[first], rank[first]] = rows[first]
        return _first(np.concatenate([kept, new], axis=1), count)

    def merge(self, other: "Examples") -> "Examples":
        """The first ones of both."""
        super().merge(other)  # refuses what does not fit
        count = self.heaviest.shape[2]
        parts = [
            _first(np.concatenate([getattr(self, name), getattr(other, name)], axis=2), count)
            for name in ("heaviest", "random")
        ]
        return Examples(self.layers, self.seed, *parts)


def _first(rows: Int[np.ndarray, "*experts m three"], count: int) -> Int[np.ndarray, "*experts n three"]:
    order = np.lexsort((rows[..., 2], rows[..., 1], -rows[..., 0]), axis=-1)[..., :count]
    return np.take_along_axis(rows, order[..., None], axis=-2)


def _hash(places: Int[np.ndarray, "T two"], seed: int) -> Int[np.ndarray, " T"]:
    """splitmix64 of document, position and seed, without its sign."""
    with np.errstate(over="ignore"):
        x = places.astype(np.uint64)
        x = x[:, 0] * np.uint64(0x9E3779B97F4A7C15) + x[:, 1] * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
