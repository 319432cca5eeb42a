"""What a trace on a remote server needs of this package, sent along with it.

nnsight sends functions as source. Dataclasses do not survive that (what their decorator writes has no source, and
bytecode needs the same Python on both sides), and annotations would ask for packages that a server need not have. So
the modules that run inside a trace are sent as source themselves, and the data as a pickle that refers to them:

1. The modules of `SENT`, without docstrings, are given the name of a package that says which version it is. Imports of
   what is not sent are left out; they serve annotations alone.
2. On the server `unpack` makes them modules, once a version, and reads the data against them.

Nothing is installed there, and nothing of the user's is read: this is the package's own code.
"""

import ast
import hashlib
import importlib.util
import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import nnsight

PACKAGE = "moe_interp"
# In an order in which each finds those before it.
SENT = (
    "errors",
    "arguments",
    "points",
    "run",
    "adapters.sums",
    "adapters.spec",
    "adapters.formulas",
    "interventions.values",
    "interventions.chance",
    "interventions.base",
    "interventions.together",
    "interventions.outputs",
    "interventions.places",
    "interventions.routes",
    "interventions.swaps",
    "interventions.widths",
    "hosts.tokens",
    "hosts.program",
    "hosts.modes",
    "hosts.sandbox",
    "hosts.rows",
    "hosts.traces",
    "hosts.stock",
    "hosts.choices",
    "hosts.passes",
)


def unpack(name: str, sources: dict, data: bytes, apart: list) -> Any:
    """On a server: make modules of the sources under the package's name, once, and read the data against them.

    Sent to the server as it stands, so everything that it uses is imported in it.
    """
    import io
    import linecache
    import pickle
    import sys
    import types

    if name not in sys.modules:
        for full, source in sources.items():
            module = types.ModuleType(full)
            module.__file__ = f"<{full}>"
            module.__path__ = []
            sys.modules[full] = module
            linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
            parent, _, last = full.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)
            exec(compile(source, module.__file__, "exec"), module.__dict__)

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, attribute: str) -> Any:
            if module.split(".")[0] == "moe_interp":
                module = name + module[len("moe_interp") :]
            return super().find_class(module, attribute)

        def persistent_load(self, number: int) -> Any:
            return apart[number]

    function, args = Reader(io.BytesIO(data)).load()
    return function(*args)


# The one function that nnsight itself must send by its source, not by its name.
nnsight.register(__name__)


def sent(function: Callable[..., Any], *args: Any, apart: list[Any] | None = None) -> tuple[Any, ...]:
    """A call of one of the sent functions, as something to be pickled: what unpickling it gives is its result.

    Args:
        function: of a module of `SENT`.
        args: its arguments; their classes are of such modules, too.
        apart: objects among them that nnsight must pickle, its own. Functions of the user join them.
    """
    apart = list(apart or [])
    data = io.BytesIO()
    _Writer(data, apart).dump((function, args))
    return unpack, (_name(), _sources(), data.getvalue(), apart)


class _Writer(pickle.Pickler):
    def __init__(self, file: Any, apart: list[Any]):
        super().__init__(file, protocol=4)
        self.apart = apart

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, FunctionType) and value.__module__.split(".")[0] != PACKAGE:
            self.apart.append(value)  # the user's, which nnsight sends by its source
        return next((number for number, one in enumerate(self.apart) if one is value), None)


@cache
def _sources() -> dict[str, str]:
    """The sent modules by their names there."""
    root = _name()
    packages = {root: "", **{f"{root}.{name.split('.')[0]}": "" for name in SENT if "." in name}}
    return packages | {f"{root}.{name}": _Sent(root).source(text) for name, text in _texts().items()}


@cache
def _name() -> str:
    return f"{PACKAGE}_{hashlib.sha256(repr(_texts()).encode()).hexdigest()[:12]}"


@cache
def _texts() -> dict[str, str]:
    specs = {name: importlib.util.find_spec(f"{PACKAGE}.{name}") for name in SENT}
    return {name: Path(str(spec.origin)).read_text(encoding="utf-8") for name, spec in specs.items() if spec}


class _Sent(ast.NodeTransformer):
    """A module's source as it is sent."""

    def __init__(self, root: str):
        self.root = root

    def source(self, text: str) -> str:
        """The source, without docstrings and comments, its imports led to what is sent."""
        return ast.unparse(ast.fix_missing_locations(self.visit(ast.parse(text))))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        module = str(node.module)
        inside = module.removeprefix(f"{PACKAGE}.")
        if module == "jaxtyping" or (inside != module and inside not in SENT):
            names = [alias.asname or alias.name for alias in node.names]
            return (
                ast.parse(f"{' = '.join(names)} = __import__('typing').Any").body
                if module != "jaxtyping"
                else [
                    *ast.parse("class _Shaped:\n    def __class_getitem__(cls, item):\n        return cls").body,
                    *ast.parse(f"{' = '.join(names)} = _Shaped").body,
                ]
            )
        if inside != module:
            node.module = f"{self.root}.{inside}"
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        return self._bare(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        return self._bare(node)

    def visit_Module(self, node: ast.Module) -> Any:
        return self._bare(node)

    def _bare(self, node: Any) -> Any:
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node
