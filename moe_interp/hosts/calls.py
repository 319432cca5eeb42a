"""Which edits and reads a forward pass has: they belong to a call, and never to the model.

1. A `Session` is what one `run` or `generate` asks for. It is in force in the context of that call (a context variable,
   PEP 567), so that other threads, tasks and runs inside it do not meet it.
2. A `Standing` is what `model.edit` begins (`moe_interp.hosts.standing`).
3. A `Call` is one forward pass. It is made where the pass enters the model, takes what is in force there, and holds all
   that the pass needs: tokens, routes, what edits and reads leave. Hooks are set once, when a model is opened, and ask
   for the call that is under way.
4. What users give (edits, hooks at points) runs in the context that the pass was begun in: a run inside it is a run of
   its own.

Sessions and calls are set in copies of the context alone, which end with the function that runs in them. So nothing is
left behind by an exception, whenever it comes.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, ContextVar, copy_context
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe_interp.adapters.spec import ModelSpec
from moe_interp.errors import BadInput, EditsElsewhere
from moe_interp.hosts.modes import StateKept
from moe_interp.hosts.program import Edited, Program
from moe_interp.hosts.standing import Standing
from moe_interp.hosts.tokens import arguments_of, follows, tokens_of
from moe_interp.run import Read, Tokens

T = TypeVar("T")
Place = tuple[str, int | None]

_SESSION: ContextVar["Session | None"] = ContextVar("moe_interp_session", default=None)
_CALL: ContextVar["Call | None"] = ContextVar("moe_interp_call", default=None)
_DEPTH: ContextVar[int] = ContextVar("moe_interp_depth", default=0)


def depth() -> int:
    """Return how many runs and generations are inside each other in this context."""
    return _DEPTH.get()


# ---- what a call asks for ------------------------------------------------------------------------------------


class Session:
    """What one `run` or `generate` asks for.

    Args:
        host: the opened model.
        edits, reads, decode: as `Program` has them, which says what is refused.
        grad: whether to keep the graph.
        whole: whether a pass without a cache has all tokens that there will be.
        routing: whether the routing of all layers is kept.
        texts: how many texts a generation was given, of which beams may make more rows.
        steps: whether its passes are steps of a generation, which prepares the inputs of each.
        unembed: changes what the unembedding is given of a batch, [B, S, D]; some tokens alone, say.
        given: a value to put at a point before all edits.
        skipped: modules to leave out, by path, and what each returns besides the residual (None: a tensor alone).
        forms: filled with what layers return besides the residual, by path.

    Attributes:
        generating: whether transformers' ``generate`` was entered.
        prepared: whether it has prepared the inputs of the pass that comes next.
        warned: whether a warning told of passes between its steps.
    """

    def __init__(
        self,
        host: Any,
        edits: Edited,
        reads: Sequence[Read] = (),
        grad: bool = False,
        decode: Callable[[Tensor], Tensor] | None = None,
        *,
        whole: bool = True,
        routing: bool = True,
        texts: int | None = None,
        steps: bool = False,
        unembed: Callable[[Tensor], Tensor] | None = None,
        given: Mapping[Place, Tensor] | None = None,
        skipped: Mapping[str, Any] | None = None,
        forms: dict[str, Any] | None = None,
    ):
        self.host, self.grad, self.whole, self.texts = host, grad, whole, texts
        self.unembed, self.given, self.skipped, self.forms = unembed, dict(given or {}), dict(skipped or {}), forms
        self.program = Program(host.spec, edits, reads, grad, decode=decode, routing=routing)
        self.steps, self.generating, self.prepared, self.warned = steps, False, False, False
        host.check_in_place({layer for _, layer in (*self.program.edits, *self.program.reads)})

    def __call__(self, forward: Callable[[], T]) -> T:
        """Call ``forward`` with this session in force, and return its result.

        Raises:
            BadInput: the model was closed meanwhile.
        """
        with StateKept():
            result = copy_context().run(self._in_force, forward)
        if self.host.closed:
            raise BadInput(
                "the model was closed while it ran",
                expected="close() after the last pass has ended",
                got="a pass whose later layers had no hook points",
                do="Wait for what runs in other threads, then close the model.",
            )
        return result

    def _in_force(self, forward: Callable[[], T]) -> T:
        _SESSION.set(self)
        _DEPTH.set(depth() + 1)
        with torch.set_grad_enabled(self.grad):
            return forward()

    def takes(self, path: str) -> bool:
        """Tell whether the pass that begins, of the module at ``path``, belongs to this session.

        A generation prepares the inputs of each of its passes, but for those of an encoder, which runs once before the
        first. Another pass without prepared inputs is one that a callback, such as a logits processor or a streamer,
        makes between two steps.
        """
        if not self.steps or self.host.entries.get(path) not in (None, self.host.spec.main_stack):
            return True
        its, self.prepared = self.prepared, False
        if not its and self.program.interventions and not self.warned:
            self.warned = True
            warnings.warn(
                EditsElsewhere(
                    "a forward pass between two steps of a generation runs without the generation's edits, because a "
                    "logits processor or a streamer seems to make it. To edit it, call model.run(..., edit=...)."
                ),
                stacklevel=4,
            )
        return its


def without_session(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function with no session in force, so that passes of a model have only the edits that stand."""

    def call() -> T:
        _SESSION.set(None)
        return function(*args, **kwargs)

    return copy_context().run(call)


def session_of(host: Any) -> Session | None:
    """Return the session that is in force for a model in this context, if there is one."""
    session = _SESSION.get()
    return session if session is not None and session.host is host else None


# ---- a forward pass ------------------------------------------------------------------------------------------


class Call:
    """One forward pass.

    Attributes:
        host: the opened model.
        path: the module that it entered by.
        outer: the pass that it was begun inside, of whatever model.
        outside: the context that it was begun in.
        first: edits that stand, in a direct call of the transformers model; own: what `run` or `generate` asked for.
        heard: reads that stand.
        wanted: points (and layers) at which any of these has something to do; silent: whether there are none.
        flows: by layer, what the pass knows of it.
    """

    def __init__(self, host: Any, path: str, outside: Context, session: Session | None, standing: Sequence[Standing]):
        self.host, self.path, self.outer, self.outside = host, path, _CALL.get(), outside
        self.session, self.flows = session, dict[int, Any]()
        self.standing = [] if session else [one for one in standing if one.edits]
        self.plain = any(one.plain for one in standing)
        self.own = session.program.of_pass(self._rows) if session else None
        self.first = _joined(host.spec, self.standing, self._rows) if self.standing and not self.plain else None
        listening = [one for one in standing if one.hear and not self.plain]
        self.heard = [(one, Program(host.spec, (), one.reads, rows=self._rows, routing=False)) for one in listening]
        self.programs = [one for one in (self.first, self.own, *(program for _, program in self.heard)) if one]
        self.wanted = frozenset[Place]().union(session.given if session else (), *(one.wanted for one in self.programs))
        edits = self.own or self.first
        self.widths: Mapping[int, int] = edits.widths if edits else {}
        self.exchanges: Mapping[int, int] = edits.exchanges if edits else {}
        self.dropping: set[int] = edits.dropping if edits else set()
        self.silent = self.plain or not self.wanted

    def holds(self, path: str) -> bool:
        """Tell whether a module at this path, entered while the pass is under way, is a part of the pass."""
        return path.startswith(f"{self.path}.") if self.path else path != ""

    def _rows(self, layer: int) -> Tensor | None:
        return self.flows[layer].rows if layer in self.flows else None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the programs which tokens are real."""
        self.host.remember_recomputed()
        if not self.wanted and not follows(kwargs.get("past_key_values")):
            return
        known: dict[str, Tokens] = {}
        whole = False
        if self.path in self.host.entries:
            given = arguments_of(module, args, kwargs)
            known = tokens_of(self.host.spec, args, given, self.host.entries[self.path])
            whole = (self.session is None or self.session.whole) and given.get("past_key_values") is None
        texts = self.session.texts if self.session else None
        if texts is not None:
            known = {stack: _of_texts(tokens, texts) for stack, tokens in known.items()}
        for program in self.programs:
            program.begin(known, whole)

    def end(self) -> None:
        """Hand what the pass has left to its session, to the edits that stand, and to those who listen."""
        if self.session is not None and self.own is not None:
            self.session.program = self.own
        if self.first is not None:
            counts = iter(self.first.touched)
            with self.host.standings.lock:
                for one in self.standing:
                    one.touched = [before + next(counts) for before in one.touched]
        for one, program in self.heard:
            if hear := one.hear and one.hear():
                self.away(hear, program)

    def passed(self, name: str, layer: int | None, point: Any, value: Tensor) -> Tensor:
        """Pass a value through standing edits, hooks at its point, then the edits and reads of the call."""
        place = name, layer
        if self.session is not None and place in self.session.given:
            value = self.session.given[place]
        if place not in self.host.fronts:
            value = self.edited_first(place, value)
        if point.live:
            value = self.away(point, value)
        if self.own is not None and place in self.own.wanted:
            value = self.away(self.own, name, layer, value)
        for _, program in self.heard:
            if place in program.wanted:
                self.away(program, name, layer, value)
        return value

    def edited_first(self, place: Place, value: Tensor) -> Tensor:
        """Pass a value through the edits that stand."""
        there = self.first is not None and place in self.first.wanted
        return self.away(self.first, *place, value) if there else value  # type: ignore[arg-type]

    def away(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function outside the pass, so that what it runs of the model is a pass of its own."""
        return self.outside.copy().run(function, *args)


def under_way(host: Any) -> Call | None:
    """Return the innermost pass of a model that is under way in this context, if there is one."""
    call = _CALL.get()
    while call is not None and call.host is not host:
        call = call.outer
    return call


def open_pass(host: Any) -> Call | None:
    """Return the pass that is under way, if it has anything to do. Every hook asks, so this must be fast."""
    call = _CALL.get()
    if call is not None and call.host is not host:
        call = under_way(host)
    if call is None or call.plain or (call.silent and not host.used):
        return None
    return call


def part_of(host: Any, path: str) -> bool:
    """Tell whether a module at this path, entered now, is a part of the pass that is under way."""
    call = _CALL.get()
    if call is not None and call.host is not host:
        call = under_way(host)
    return call is not None and call.holds(path)


def enter(host: Any, path: str, own: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Call a module's own code as a part of the pass that is under way, or as a pass of its own."""
    if part_of(host, path):
        return own(*args, **kwargs)
    return copy_context().run(_pass, host, path, own, args, kwargs)


def _pass(host: Any, path: str, own: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    session, standing = session_of(host), host.standings.here()
    if session is not None and not session.takes(path):
        session = None
    _SESSION.set(None)
    outside = copy_context()
    if host.standings.all:
        host.standings.warn_of_others(standing, host.spec.model_type)
    call = Call(host, path, outside, session, standing)
    _CALL.set(call)
    call.begin(host.hf.get_submodule(path), args, kwargs)
    with StateKept():
        result = own(*args, **kwargs)
    call.end()
    return result


def _joined(spec: ModelSpec, standing: Sequence[Standing], rows: Callable[[int], Tensor | None]) -> Program:
    """Return the program of one pass for several edits that stand."""
    last, all_of_them = standing[-1], tuple(standing)
    if last.joined is None or last.joined[0] != all_of_them:
        last.joined = all_of_them, Program(spec, [edit for one in standing for edit in one.edits], routing=False)
    return last.joined[1].of_pass(rows)


def _of_texts(tokens: Tokens, texts: int) -> Tokens:
    """Number the texts of rows where beams have made several rows of each text."""
    rows = len(tokens.mask)
    if rows == texts or rows % texts:
        return tokens
    return replace(tokens, numbers=torch.arange(rows, device=tokens.mask.device) // (rows // texts))
