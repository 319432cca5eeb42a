"""Which experts each token id goes to: sparse counts, by folds of documents.

Vocabulary specialization, the null of token identity and the profiles of experts all follow from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Int

from moe_interp.analyses.exact import Exact, SparseCounts, blocks_of, of_each
from moe_interp.errors import BadInput
from moe_interp.run import Run

if TYPE_CHECKING:
    from scipy.sparse import csr_array

FOLDS = 10


@dataclass
class TokenCounts(Exact):
    """Sparse counts of (fold, layer, token id, expert), and of (document, token id).

    Holds 16 bytes for each combination that occurs: of the first at most K L for every token read, and at most
    Z L E for every different id (124 MB for 30,000 ids, 27 layers, top-6 of 64 where an id goes to 10 experts a layer).

    Attributes:
        layers: [L], MoE layer indices.
        top_k: [L], K.
        experts: E.
        vocabulary: V.
        folds: Z; a document's is its block of Z (`blocks_of`).
        routed: codes ((fold L + layer) V + id) E + expert, the layer counted from 0.
        seen: codes document V + id.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    layers: tuple[int, ...]
    top_k: tuple[int, ...]
    experts: int
    vocabulary: int
    folds: int
    routed: SparseCounts
    seen: SparseCounts

    @classmethod
    def empty(
        cls, layers: Sequence[int], experts: int, top_k: int | Sequence[int], vocabulary: int, *, folds: int = FOLDS
    ) -> "TokenCounts":
        """Nothing counted yet; ``top_k`` is one for all layers, or one for each."""
        return cls(tuple(layers), of_each(top_k, layers), experts, vocabulary, folds, SparseCounts(), SparseCounts())

    def update(self, run: Run, documents: Int[np.ndarray, " B"]) -> None:
        """Adds a run; row b belongs to document ``documents[b]``.

        Raises:
            BadInput: a run of embeddings, which have no ids.
        """
        if run.token_ids is None:
            raise BadInput("no token ids to count", expected="a run of token ids", got="embeddings")
        mask = run.mask.cpu().numpy()
        document = np.broadcast_to(documents[:, None], mask.shape)
        folds = np.broadcast_to(blocks_of(documents, self.folds)[:, None], mask.shape)
        tokens = run.token_ids.cpu().numpy()
        self.seen.add(document[mask] * self.vocabulary + tokens[mask])
        for index, layer in enumerate(self.layers):
            seen = mask & run.routing[layer].mask.cpu().numpy()
            ids = run.routing[layer].ids.cpu().numpy()[seen]
            fold = folds[seen] * len(self.layers) + index
            self.routed.add((((fold * self.vocabulary + tokens[seen])[:, None]) * self.experts + ids).ravel())

    def table(self, index: int, fold: int) -> "csr_array":
        """[V, E], how often each id went to each expert at the layer number ``index``, in one fold."""
        from scipy.sparse import csr_array

        codes, counts = self.routed.tidy()
        size = self.vocabulary * self.experts
        start = (fold * len(self.layers) + index) * size
        part = slice(*np.searchsorted(codes, [start, start + size]))
        places = codes[part] - start
        return csr_array(
            (counts[part], (places // self.experts, places % self.experts)), shape=(self.vocabulary, self.experts)
        )

    def histogram(self, documents: int) -> "csr_array":
        """[N, V], how often each id occurs in each document."""
        from scipy.sparse import csr_array

        codes, counts = self.seen.tidy()
        return csr_array((counts, (codes // self.vocabulary, codes % self.vocabulary)), (documents, self.vocabulary))

    def occurrences(self) -> Int[np.ndarray, "Z V"]:
        """How often each id occurs in each fold."""
        codes, counts = self.seen.tidy()
        found = np.zeros((self.folds, self.vocabulary), np.int64)
        np.add.at(found, (blocks_of(codes // self.vocabulary, self.folds), codes % self.vocabulary), counts)
        return found
