"""The TransformerLens door: `attach` adds every point of a mixture-of-experts model to a bridge's hooks."""

from types import TracebackType
from typing import TYPE_CHECKING, Any

from moe_interp.arguments import checked
from moe_interp.errors import BadInput
from moe_interp.hosts import open_host
from moe_interp.opening import is_bridge, wrap
from moe_interp.points import POINTS

if TYPE_CHECKING:
    from moe_interp.adapters import ModelSpec

_ATTACHED = "_moe_interp_attached"  # on the bridge itself: a table of bridges would keep them


class Attached:
    """The points of a bridge's model among the bridge's hooks, until `close` or the end of the ``with``.

    Attributes:
        bridge: the TransformerBridge.
        model: the same model as `moe_interp.wrap` opens it: runs and edits through either are the same.
        hook_names: the bridge's name of every (point, layer); layer is None for a point of the whole model.
    """

    def __init__(self, bridge: Any):
        from moe_interp.hosts.bridge import BridgeHost

        self.bridge, self.model = bridge, wrap(bridge)
        self._opening = open_host(self.model.hf, self.model.spec)  # it stays open if somebody closes the model
        try:
            self._host = BridgeHost(bridge, self._opening.host)
        except BaseException:
            self._close()
            raise
        self.hook_names = self._host.hook_names

    @property
    def spec(self) -> "ModelSpec":
        """What the architecture computes."""
        return self.model.spec

    def names(self, *points: str) -> list[str]:
        """All names of points at all their layers, for a ``names_filter`` (none given: of all points).

        What they cache, ``cache["expert_out", 5]`` finds as well as ``cache["blocks.5.mlp.hook_expert_out"]``.

        Raises:
            UnknownName: a point that this architecture does not have.
        """
        wanted = points or self.model.points
        keys = [(point, layer) for point in wanted for layer in self.spec.layers_of(point)]
        return [name for key in keys for name in self.spellings(*key)]

    def spellings(self, point: str, layer: int | None) -> list[str]:
        """All names of a point at a layer."""
        return self._host.spellings[point, layer]

    def close(self) -> None:
        """Leave the bridge as it was found."""
        if vars(self.bridge).get(_ATTACHED) is self:
            del vars(self.bridge)[_ATTACHED]
            self._host.remove()
            self._close()

    def _close(self) -> None:
        self._opening.close()
        self.model.close()

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        points = [point for point in POINTS if point in self.model.points]
        return f"Attached({self.spec.model_type}, {len(self.hook_names)} hooks: {', '.join(points)})"


@checked
def attach(bridge: Any) -> Attached:
    """Add every point of the model to the hooks of a TransformerBridge.

    They work in all that TransformerLens does with hooks: ``run_with_cache``, ``run_with_hooks``, names filters,
    ``stop_at_layer``, ``generate``, gradients by ``incl_bwd``, and patching. Values have the shapes of the table of
    points, [batch, pos, ...], padding included. A point that nobody hooks costs nothing.

    Inside a mixture names are ``blocks.{l}.mlp.hook_{point}`` and, for short, ``blocks.{l}.hook_{point}``, so that
    ``cache["expert_out", l]`` finds them; ``hook_names`` of what is returned has the name of every point.

    Args:
        bridge: a TransformerBridge on the weights of the checkpoint, not in compatibility mode.

    Returns:
        What takes it all away again, by `Attached.close` or as a context manager.

    Raises:
        BadInput: not a bridge, or one that is attached already.
        UnsupportedModel: a model or a bridge that cannot be opened correctly.
    """
    if not is_bridge(bridge):
        raise BadInput(
            "not a bridge",
            expected="a TransformerBridge of TransformerLens",
            got=type(bridge).__name__,
            do="Use moe.wrap(model) for a transformers model.",
        )
    if _ATTACHED in vars(bridge):
        raise BadInput("the bridge is attached already", expected="one attach", do="Close the first, or use it.")
    found = vars(bridge)[_ATTACHED] = Attached(bridge)
    return found


def attached(bridge: Any) -> Attached:
    """What `attach` returned for a bridge.

    Raises:
        BadInput: it is not attached.
    """
    if _ATTACHED not in getattr(bridge, "__dict__", {}):
        raise BadInput("the bridge is not attached", expected="a bridge after moe.attach(bridge)", got="one before")
    found: Attached = vars(bridge)[_ATTACHED]
    return found
