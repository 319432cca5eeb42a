"""DBRX: experts in three flat matrices, [E * F, D] each."""

from typing import Any

from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from moe_interp.adapters.experts import ExpertWeights, Grouping, OnAct


class FlatMatrices:
    """``down.T @ (act(gate @ x) * (up @ x))``, with gate, up and down called w1, v1 and w2."""

    def outputs(self, experts: Any, hidden: Tensor, ids: Tensor, on_act: OnAct | None = None) -> Tensor:
        """Unweighted outputs [T*K, D], slot by slot."""
        groups = Grouping(ids, experts.num_experts)
        gate, up, down = self._matrices(experts)
        rows = groups.sort(hidden)
        act = experts.mlp.activation_fn(_grouped_linear(rows, gate, groups.ends))
        act = groups.shown(act * _grouped_linear(rows, up, groups.ends), on_act)
        return _grouped_linear(act, down, groups.ends, is_transposed=True)[groups.inverse]

    def weights(self, experts: Any, expert: int) -> ExpertWeights:
        """The matrices of one expert, detached."""
        gate, up, down = (matrix[expert].detach() for matrix in self._matrices(experts))
        return ExpertWeights(gate, up, down.T)

    def _matrices(self, experts: Any) -> tuple[Tensor, Tensor, Tensor]:
        shape = (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
        return experts.mlp.w1.view(shape), experts.mlp.v1.view(shape), experts.mlp.w2.view(shape)


KERNEL = FlatMatrices()
