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
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.adapters import ModelSpec

LONGEST = 2000  # characters of inputs that a result holds as they are
_SAMPLED = 16


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

    Tensors count by their values; a mapping of model inputs by key.
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
    if isinstance(given, Mapping):
        return {str(name): _plain(value) for name, value in given.items()}
    if isinstance(given, list | tuple):
        return [_plain(one) for one in given]
    return function_told(given) if callable(given) else type(given).__name__


def metric_told(metric: Any) -> str:
    """A metric with its answers, positions and function, as a provenance has it."""
    function = getattr(metric, "fn", None)
    told = re.sub(r" at 0x[0-9a-f]+", "", repr(metric))
    return told if function is None else f"{told} of {function_told(function)}"


def function_told(function: Any) -> str:
    """Where a function is from, and a hash of its source (of its code where the source is not known)."""
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    try:
        source = inspect.getsource(function).encode()
    except (OSError, TypeError):
        source = getattr(getattr(function, "__code__", None), "co_code", b"")
    return f"{name}, sha256 {hashlib.sha256(source).hexdigest()[:16]}"
