"""What a result says of what it was measured on: inputs, a fingerprint of the weights, the code, the metric.

1. `fingerprint` hashes the routers of a model whole, and sixteen values of every other parameter: it tells a model from
   one that was trained, edited or quantised since, and costs one pass over the routers (see there).
2. `inputs_told` gives texts and ids as they are where they are short, else their hash.
3. `code_version` hashes the source of this package: two states of one version differ.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cache, partial
from pathlib import Path
from types import CellType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_interp.adapters import ModelSpec

LONGEST = 2000  # characters of inputs that a result holds as they are
_SAMPLED = 16
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(hf: nn.Module, spec: ModelSpec) -> str:
    """A hash of a model's weights, 16 hexadecimal digits.

    It covers all parameters and buffers of every router, and sixteen evenly spaced values of every other parameter,
    with its name, shape and dtype. Parameters on the meta device count by these alone. A change of a few values outside
    the routers may go unseen. On one CPU core it takes about 1.5 ms for a MB of router weights and 40 microseconds for
    a parameter: 4 ms for the bundled model, whose forward pass of a short text takes 25.
    """
    found = hashlib.sha256()
    routers = {name for layer in spec.layers if layer.moe for name in _within(hf, layer.moe.router)}
    for name, tensor in sorted([*hf.named_parameters(), *hf.named_buffers()], key=lambda one: one[0]):
        if name in routers or isinstance(tensor, nn.Parameter):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            found.update(_bytes(tensor.detach(), whole=name in routers))
    return found.hexdigest()[:16]


def _within(hf: nn.Module, path: str) -> list[str]:
    module = hf.get_submodule(path)
    return [f"{path}.{name}".strip(".") for name, _ in [*module.named_parameters(), *module.named_buffers()]]


def _bytes(tensor: Tensor, whole: bool) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    if hasattr(tensor, "__tensor_flatten__"):  # packed: of a subclass that holds plain tensors
        names, _ = tensor.__tensor_flatten__()
        return b"".join(_bytes(getattr(tensor, name), whole) for name in names)
    flat = tensor.reshape(-1)
    if not whole and len(flat) > _SAMPLED:
        flat = flat[torch.linspace(0, len(flat) - 1, _SAMPLED, dtype=torch.float64, device=flat.device).long()]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()


@cache
def code_version() -> str:
    """A hash of this package's source, 12 hexadecimal digits."""
    found = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        found.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


def inputs_told(**given: Any) -> dict[str, str]:
    """Inputs by name, as a result's provenance has them: JSON where that is short, else its length and hash.

    Tensors and arrays count by their values; a mapping of model inputs by key.
    """
    found = {}
    for name, inputs in given.items():
        told = json.dumps(_plain(inputs), ensure_ascii=False)
        if len(told) > LONGEST:
            told = f"{len(told)} characters of JSON, sha256 {hashlib.sha256(told.encode('utf-8')).hexdigest()}"
        found[name] = told
    return found


def _plain(given: Any) -> Any:
    if isinstance(given, str | int | float) or given is None:
        return given
    if isinstance(given, Tensor):
        return given.detach().cpu().tolist()
    if isinstance(given, np.ndarray | np.generic):
        return given.tolist()
    if isinstance(given, Mapping):
        return {str(name): _plain(value) for name, value in given.items()}
    if isinstance(given, Sequence):
        return [_plain(one) for one in given]
    return function_told(given) if callable(given) else type(given).__name__


def metric_told(metric: Any) -> str:
    """A metric with its answers, positions and function, as a provenance has it."""
    function = getattr(metric, "fn", None)
    told = _ADDRESS.sub("", repr(metric))
    return told if function is None else f"{told} of {function_told(function)}"


def function_told(function: Any) -> str:
    """Where a function is from, and a hash of its source and of what it was made with.

    The source is the function's code where it is not known. A function inside another counts with the values that it
    takes from there, `functools.partial` with its arguments, an object that can be called with its attributes.
    """
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return f"{name}, sha256 {hashlib.sha256(chr(0).join(_made_of(function)).encode('utf-8')).hexdigest()[:16]}"


def _made_of(value: Any, deep: int = 4) -> Iterator[str]:
    """What a value is made of, to some depth: numbers, texts, values of tensors, sources; of others the type."""
    if isinstance(value, str | bytes | int | float | None):
        yield repr(value)
        return
    if isinstance(value, Tensor | np.ndarray | np.generic):
        yield values_told(value)
        return
    yield type(value).__qualname__
    for part in _parts(value) if deep else ():
        yield from _made_of(part, deep - 1)


def _parts(value: Any) -> list[Any]:
    """What a container holds, or a function or an object that can be called is made with."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Set):
        return sorted(value, key=repr)  # in one order in every process
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if not callable(value) or isinstance(value, nn.Module):
        return []
    if not inspect.isroutine(value) and not inspect.isclass(value):
        return [type(value).__call__, getattr(value, "__dict__", {})]
    cells = getattr(getattr(value, "__func__", value), "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != CellType()]  # a cell may be empty yet
    return [_source(value), getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None), *held]


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return "" if code is None else f"{code.co_code.hex()} {_ADDRESS.sub('', repr(code.co_consts))}"


def edits_told(edits: Iterable[Any]) -> str:
    """Interventions as a result names them: with hashes of their tensors and functions."""
    told = []
    for one in edits:
        functions = [function_told(value) for value in vars(one).values() if callable(value)]
        told.append(_ADDRESS.sub("", " of ".join([repr(one), *functions])))
    return "; ".join(told)


def values_told(*values: Tensor | np.ndarray | np.generic) -> str:
    """A hash of the values, shapes and dtypes of tensors and arrays, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for one in values:
        found.update(f"{tuple(one.shape)} {one.dtype};".encode())
        found.update(_bytes(one.detach(), whole=True) if isinstance(one, Tensor) else one.tobytes())
    return found.hexdigest()[:16]
