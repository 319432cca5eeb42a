"""DBRX: experts in three flat matrices, [E * F, D] each."""

from typing import Any

from torch import Tensor

from moe_interp.adapters.experts import ExpertWeights, Grouping, OnAct
from moe_interp.adapters.formats import Matrices, in_memory


class FlatMatrices:
    """``down.T @ (act(gate @ x) * (up @ x))``, with gate, up and down called w1, v1 and w2."""

    def outputs(self, experts: Any, hidden: Tensor, ids: Tensor, on_act: OnAct | None = None) -> Tensor:
        """Unweighted outputs [T*K, D], slot by slot."""
        groups = Grouping(ids, experts.num_experts)
        rows = groups.sort(hidden)
        with in_memory(experts):
            gate, up, down = self._matrices(experts)
            act = experts.mlp.activation_fn(Matrices(gate).times(rows, groups.ends))
            act = groups.shown(act * Matrices(up).times(rows, groups.ends), on_act)
            return Matrices(down, transposed=True).times(act, groups.ends)[groups.inverse]

    def weights(self, experts: Any, expert: int) -> ExpertWeights:
        """The matrices of one expert, detached."""
        with in_memory(experts) as brought:
            gate, up, down = (matrix[expert].detach() for matrix in self._matrices(experts))
            found = ExpertWeights(gate, up, down.T)
            return found.copied() if brought else found

    def _matrices(self, experts: Any) -> tuple[Tensor, Tensor, Tensor]:
        shape = (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
        return experts.mlp.w1.view(shape), experts.mlp.v1.view(shape), experts.mlp.w2.view(shape)


KERNEL = FlatMatrices()
