"""Modules that carry the points of a layer: one opened model owns each, and they stay in place while it is open."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from moe_interp.adapters.reading import bare
from moe_interp.adapters.spec import LayerSpec
from moe_interp.errors import BadInput, UnsupportedModel

_OWNER = "_moe_interp_owner"  # of a module of a mixture: the host that opened it


class Part(NamedTuple):
    """A module that carries points of a layer.

    Attributes:
        path: its path in the model.
        module: the module itself.
        carries: whether its call was wrapped to carry values through points, as that of a router is.
    """

    path: str
    module: nn.Module
    carries: bool


def parts_of(hf: nn.Module, layer: LayerSpec) -> list[Part]:
    """Return the modules that carry the points of a layer, as they are now."""
    paths = {
        layer.path,
        *([layer.moe.block] if layer.moe else ()),
        *_mixture(layer),
        *(site.module for site in layer.sites.values()),
    }
    return [_part(hf, path, _mixture(layer)) for path in sorted(paths)]


def _part(hf: nn.Module, path: str, mixture: set[str]) -> Part:
    module = bare(hf.get_submodule(path))
    called = vars(module).get("_compiled_call_impl")  # of layers, compiled ones keep all hooks
    return Part(path, module, path in mixture and getattr(called, "carries_points", False))


def _mixture(layer: LayerSpec) -> set[str]:
    # Not the block: two mixtures, of texts and of images, may have one.
    return {layer.moe.experts, layer.moe.router} if layer.moe else set()


def check_in_place(hf: nn.Module, parts: Iterable[Part]) -> None:
    """Refuse a model of which a part was exchanged or compiled since it was opened: no edit would act there.

    Raises:
        BadInput: naming the first such module.
    """
    for part in parts:
        now = _part(hf, part.path, {part.path} if part.carries else set())
        if now.module is not part.module or now.carries != part.carries:
            raise BadInput(
                f"{part.path} is not as it was when the model was opened",
                expected="the same modules while a model is open, and none compiled since",
                got="another module" if now.module is not part.module else "a compiled one, which passes points by",
                do="Close the model and open it again: model.close(); model = moe.wrap(...).",
            )


def claim(owner: Any, hf: nn.Module, layers: Iterable[LayerSpec]) -> list[Callable[[], Any]]:
    """Mark the modules of all mixtures as those of one opened model.

    Returns:
        What takes the marks away.

    Raises:
        UnsupportedModel: a module that serves two layers, or that another opened model has; no mark is left.
    """
    whose: dict[nn.Module, int] = {}
    for layer in layers:
        for path in _mixture(layer):
            module = bare(hf.get_submodule(path))
            other = whose.setdefault(module, layer.index)
            if other != layer.index or _OWNER in vars(module):
                raise UnsupportedModel(
                    "a mixture of experts that is shared",
                    expected="modules of its own in every layer and in every opened model",
                    got=f"{path}, which is also in {'an opened model' if _OWNER in vars(module) else f'layer {other}'}",
                    do="Close the other model first, or give each layer a copy: copy.deepcopy(module).",
                )
    for module in whose:
        vars(module)[_OWNER] = owner
    return [partial(vars(module).pop, _OWNER, None) for module in whose]
