"""What stands: edits, and reads that somebody hears, that are in force on a model for a while.

`model.edit` begins to stand in the context that it is called in (a context variable, PEP 567), and ends when its
``with`` ends, however that comes about. Other threads and tasks do not have it, unless it stands everywhere.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from moe_interp.errors import BadInput, EditsElsewhere
from moe_interp.hosts.program import Program
from moe_interp.interventions import Intervention
from moe_interp.run import Read

_STANDING: ContextVar[tuple["Standing", ...]] = ContextVar("moe_interp_standing", default=())


class Standing:
    """What is in force in a context for a while: edits, reads that somebody hears, or that the model is plain.

    Attributes:
        edits: interventions, in order.
        touched: how many values each of them has changed in direct calls of the transformers model.
        everywhere: whether it is in force in every context.
        plain: whether the model computes as it was found.
        reads: what is kept for `hear`, after all edits.
        hear: a method that is told the program of every pass; its object is not kept by what stands.
        warned: whether a warning told of passes without it.
    """

    def __init__(
        self,
        edits: Sequence[Intervention] = (),
        *,
        everywhere: bool = False,
        plain: bool = False,
        reads: Sequence[Read] = (),
        hear: Callable[[Program], None] | None = None,
    ):
        self.edits, self.everywhere, self.plain = list(edits), everywhere, plain
        self.reads, self.hear = tuple(reads), None if hear is None else weakref.WeakMethod(hear)
        self.touched = [0] * len(self.edits)
        self.warned = False
        self.joined: tuple[tuple[Standing, ...], Program] | None = None  # with what stood before it, once it was used
        self._on: weakref.ref[Standings] | None = None
        self._held: weakref.ref[_Held] | None = None

    def __repr__(self) -> str:
        edits = ", ".join(
            f"{edit!r} (touched {touched})" for edit, touched in zip(self.edits, self.touched, strict=True)
        )
        return f"Standing edits: {edits or 'none'}"

    def on(self, standings: "Standings") -> bool:
        """Tell whether it is in force on this model."""
        return self._held is not None and self._held() is not None and self._on is standings.ref

    def begin(self, standings: "Standings") -> "_Held":
        """Begin to stand; it ends with `end`, or when nobody holds the returned token any more."""
        held = _Held()
        self._on, self._held = standings.ref, weakref.ref(held)
        with standings.lock:
            standings.all.add(self)
            if self.everywhere:
                standings.everywhere = (*(one for one in standings.everywhere if one.on(standings)), self)
        if not self.everywhere:
            _STANDING.set((*(one for one in _STANDING.get() if one._held and one._held()), self))
        return held

    def end(self) -> None:
        """End in every context where it is in force."""
        self._held = None
        if self.everywhere and self._on is not None and (standings := self._on()) is not None:
            with standings.lock:
                standings.everywhere = tuple(one for one in standings.everywhere if one is not self)
        if self in _STANDING.get():
            _STANDING.set(tuple(one for one in _STANDING.get() if one is not self))


class _Held:
    """A token of a `Stay`. What stands has ended when nothing holds the token, however the ``with`` ended."""

    __slots__ = ("__weakref__",)


class Stay:
    """A context manager that keeps something in force. It can be entered again after it has ended."""

    def __init__(self, standings: "Standings", standing: Standing):
        self.standings, self.standing = standings, standing
        self.held: _Held | None = None

    def __enter__(self) -> Standing:
        """Begin.

        Raises:
            BadInput: it stands already.
        """
        if self.held is not None:
            raise BadInput(
                "an edit that stands already",
                expected="one `with` at a time for what model.edit(...) returned",
                got="a second one inside the first",
                do="Call model.edit(...) once more.",
            )
        try:
            self.held = self.standing.begin(self.standings)
            return self.standing
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self.held = None
        finally:
            self.standing.end()

    def __del__(self) -> None:
        """End what an interrupt kept from ending."""
        self.standing.end()


class Standings:
    """All that stands on one model, in whatever context."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ref = weakref.ref(self)
        self.everywhere: tuple[Standing, ...] = ()
        self.all: weakref.WeakSet[Standing] = weakref.WeakSet()

    def stand(self, standing: Standing) -> "Stay":
        """Keep something in force inside the ``with`` that the returned object is entered by."""
        return Stay(self, standing)

    def here(self) -> list[Standing]:
        """Return what is in force in this context: first what is in force everywhere, each in the order it began."""
        return [one for one in (*self.everywhere, *_STANDING.get()) if one.on(self)]

    @property
    def plain(self) -> bool:
        """Whether the model is plain in this context."""
        return any(one.plain for one in self.here())

    def edits(self) -> list[Intervention]:
        """Return the edits that stand in this context."""
        return [edit for one in self.here() for edit in one.edits]

    def end(self) -> None:
        """End all that stands, in every context."""
        for one in list(self.all):
            one.end()

    def warn_of_others(self, here: Sequence[Standing], model_type: str) -> None:
        """Warn once of each edit that stands in another context, when a pass begins in a context where none stands."""
        if any(one.edits for one in here):
            return
        with self.lock:
            missed = [one for one in self.all if one.edits and one.on(self) and not one.warned]
        for one in missed:
            one.warned = True
            warnings.warn(
                EditsElsewhere(
                    f"a forward pass of {model_type} runs without edits that stand in another context: "
                    f"{'; '.join(map(repr, one.edits))}. A thread, an executor or a task starts without them: give it "
                    "contextvars.copy_context().run, or edit with model.edit(..., everywhere=True)."
                ),
                stacklevel=4,
            )
