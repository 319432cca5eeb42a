"""NDIF's sandbox: the blocks of a trace run in a process of their own, the model in another, joined by a socket.

1. Values arrive there as copies, and what a block does to one in place is sent back. What is written anywhere else, as
   into a tensor that was served before, is lost.
2. Modules are called over there: no function mode sees what they do.
3. Three promises of nnsight that this package needs are not kept there, and `restore` makes up for them: write-backs
   that are issued before a block goes on, the batcher of the run, and which visit of a location a block is at.

It works on the classes of nnsight in that process, which serves one request and then ends.
"""

import ast
import re
from typing import Any

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Event, Mediator, Pending

from moe_interp.errors import UnsupportedModel


def sandboxed() -> bool:
    """Whether this process is one of NDIF's runners."""
    return _event().__module__.endswith(".sandbox.nns") or hasattr(Mediator, "moe_interp_step")


def _event() -> Any:
    return Mediator.event.__func__


def restore() -> None:
    """In one of NDIF's runners, make up for what is missing there; elsewhere, and the second time, nothing."""
    if not _event().__module__.endswith(".sandbox.nns"):
        return
    park, interleave = _event(), Envoy.interleave

    def event(cls: Any, kind: Event, location: str, *rest: Any) -> Any:
        mediator = cls.current(location)
        if mediator.iteration is not None:
            mediator.moe_interp_step = mediator.iteration
        mediator.flush()
        return park(cls, kind, location, *rest)

    def flush(self: Mediator) -> None:
        waiting, self.transform = self.transform, None
        if waiting is not None:
            step = self.iteration
            # Relaxed: at the visit that the model is at, which is the one that it was read at.
            self.worker.parent.switch(Pending(Event.SWAP, waiting.location, None, waiting.fn()))
            self.iteration = step

    def occurrence(self: Mediator, location: str) -> int:
        # Visits are counted in the other process. A step of ``tracer.iter`` visits a location once.
        return self.moe_interp_step

    def interleaved(self: Envoy, fn: Any, *args: Any, batcher: Any = None, **kwargs: Any) -> Any:
        self.interleaver.batcher = batcher
        return interleave(self, fn, *args, batcher=batcher, **kwargs)

    Mediator.moe_interp_step = 0
    Mediator.event, Mediator.flush, Mediator.occurrence = classmethod(event), flush, occurrence
    Envoy.interleave = interleaved


def refuse_copy(what: str, do: str) -> None:
    """Refuse, in a sandbox, what takes the model's own memory or what its modules do inside."""
    if sandboxed():
        raise UnsupportedModel(
            f"{what} cannot be edited in a server's sandbox",
            expected="an edit of what passes between modules there",
            got="one inside a module, whose code does not show it",
            do=do,
        )


# ---- values inside a module's own code -----------------------------------------------------------------------


def given_to(source: Any, module: str) -> str | None:
    """The operation of a module's code that makes the variable which it then gives to a submodule of it.

    It must be an operation whose result nothing else holds: a sum, or one that is given its other names afterwards.

    Args:
        source: nnsight's ``.source`` of the module.
        module: the submodule's name in it.
    """
    body = _body(source)
    for number, statement in enumerate(body):
        for call in _calls(statement, module):
            if len(call.args) != 1 or not isinstance(call.args[0], ast.Name):
                return None
            name = call.args[0].id
            made = [
                one for one, earlier in enumerate(body[:number]) if any(_stored(n, name) for n in ast.walk(earlier))
            ]
            if not made:
                return None
            by, after = body[made[-1]], body[made[-1] + 1]
            named = isinstance(after, ast.Assign) and isinstance(after.value, ast.Name) and after.value.id == name
            sums = isinstance(by, ast.Assign) and isinstance(by.value, ast.BinOp)
            return _label(source, by, name) if named or sums else None
    return None


def product_of(source: Any, module: str) -> str | None:
    """The operation of a module's code that assigns what is made of the result of a submodule of it."""
    for statement in _body(source):
        if _calls(statement, module) and isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BinOp):
            target = statement.targets[0]
            return _label(source, statement, target.id) if isinstance(target, ast.Name) else None
    return None


def last_topk(source: Any) -> str | None:
    """The last ``torch.topk`` of a module's code, if every run of the code comes to it and no other top-k follows."""
    last = None
    for statement in _body(source):
        calls = [one for one in ast.walk(statement) if isinstance(one, ast.Call)]
        calls = [one for one in calls if ast.unparse(one.func).rpartition(".")[2] == "topk"]
        if calls and not isinstance(statement, (ast.Assign, ast.Return)):
            return None
        last = calls[-1] if calls else last
    if last is None or ast.unparse(last.func) != "torch.topk" or not last.args:
        return None
    _, lines = _code(source)
    found = [label for label, line in lines.items() if line == last.lineno and re.fullmatch(r"torch_topk_\d+", label)]
    return found[0] if len(found) == 1 else None


def _stored(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name


def _calls(statement: ast.stmt, module: str) -> list[ast.Call]:
    return [
        one for one in ast.walk(statement) if isinstance(one, ast.Call) and ast.unparse(one.func) == f"self.{module}"
    ]


def _code(source: Any) -> tuple[str, dict[str, int]]:
    """The text of a module's forward, and the line of each operation."""
    compiled = getattr(source, "compiled", None)
    return (source._source, source._lines) if compiled is None else (compiled.source, compiled.lines)


def _body(source: Any) -> list[ast.stmt]:
    text, _ = _code(source)
    tree = ast.parse(text).body
    return tree[0].body if tree and isinstance(tree[0], ast.FunctionDef) else []


def _label(source: Any, statement: ast.stmt, name: str) -> str | None:
    """nnsight's name of an assignment to one variable."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1 or not _stored(statement.targets[0], name):
        return None
    _, lines = _code(source)
    found = [label for label, line in lines.items() if line == statement.lineno and label.rpartition("_")[0] == name]
    return found[0] if len(found) == 1 else None
