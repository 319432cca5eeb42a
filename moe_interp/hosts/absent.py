"""What caches of TransformerLens say of a point that a layer, such as a dense one, does not have."""

from typing import Any

from moe_interp.adapters.spec import ModelSpec
from moe_interp.errors import UnknownName
from moe_interp.points import POINTS, Scope


class Cached(dict[str, Any]):
    """Values by hook name, which explains names of points that a layer does not have.

    Attributes:
        absent: the point and layer of each such name.
        spec: of the model, which says where the points are.
    """

    def __init__(self, values: dict[str, Any], absent: dict[str, tuple[str, int]], spec: ModelSpec):
        super().__init__(values)
        self.absent, self.spec = absent, spec

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # what is saved or copied are values, without the model's description

    def __missing__(self, name: str) -> Any:
        if name not in self.absent:
            raise KeyError(name)
        point, layer = self.absent[name]
        there = [one for one in self.spec.layers_of(point) if one is not None]
        of_experts = POINTS[point].scope is Scope.MOE and layer not in self.spec.moe_layers
        raise UnknownName(
            f"layer {layer} has no experts and no {point!r}" if of_experts else f"layer {layer} has no {point!r}",
            expected=f"one of layers {there}" if there else "a point of this model",
            got=repr(name),
            do=_DO if there else None,
        )


_DO = (
    "generic_activation_patch takes every layer unless told: in place of index_axis_names give it index_df="
    "pandas.DataFrame([(layer, pos) for layer in those layers for pos in range(tokens.shape[1])], "
    'columns=["layer", "pos"]).'
)


def absent_names(spec: ModelSpec, blocks: dict[int, str], hooks: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """The names that points would have at layers that lack them, and that no hook of the bridge has."""
    found = {
        f"{blocks[layer.index]}.{within}hook_{point}": (point, layer.index)
        for layer in spec.layers
        for point, one in POINTS.items()
        for within in ("", "mlp.")
        if one.scope is not Scope.MODEL and point not in layer.sites
    }
    return {name: at for name, at in found.items() if name not in hooks}
