"""Every error moe_interp raises, as one tree.

MoEError            what went wrong, what was expected, what was got, what to do next
├── UnsupportedModel  the architecture cannot be opened correctly, so it is not opened at all
├── UnknownName       no such point, layer, expert, domain or intervention; the message lists what there is
├── BadInput          a text, token id, tensor shape or dtype, or option that cannot be right
├── BadData           a file or a line of data that cannot be read
├── BadCheckpoint     weights that are missing or not finite
├── BadOutput         a result that cannot be written where it was asked to go
└── RemoteFailure     a remote server that could not run what it was sent

EditsElsewhere is a warning: a pass ran without edits that stand in another thread or task.
"""

from collections.abc import Sequence


class MoEError(Exception):
    """Base of all errors of this package.

    The message reads ``what: expected ..., got .... do``; the four parts stay available as attributes.
    """

    def __init__(self, what: str, *, expected: str | None = None, got: str | None = None, do: str | None = None):
        self.what, self.expected, self.got, self.do = what, expected, got, do
        clauses = [f"expected {expected}"] * (expected is not None) + [f"got {got}"] * (got is not None)
        message = what + (": " + ", ".join(clauses) if clauses else "")
        super().__init__(f"{message}. {do}" if do else message)


class UnsupportedModel(MoEError):
    """The architecture cannot be opened correctly, so it is not opened at all."""


class UnknownName(MoEError):
    """No such point, layer, expert, domain or intervention."""


class BadInput(MoEError):
    """A text, token id, tensor shape or dtype, or option that cannot be right."""


class BadData(MoEError):
    """A file or a line of data that cannot be read."""


class BadCheckpoint(MoEError):
    """Weights that are missing or not finite."""


class BadOutput(MoEError):
    """A result that cannot be written where it was asked to go."""


class RemoteFailure(MoEError):
    """A remote server that could not run what it was sent."""


class EditsElsewhere(UserWarning):
    """A forward pass runs without edits that stand in another context."""


def one_of(name: str, given: object, options: Sequence[str]) -> None:
    """Refuse what is none of the options.

    Raises:
        BadInput: it is not.
    """
    if given not in options:
        raise BadInput(f"unknown {name}", expected=f"one of {', '.join(map(repr, options))}", got=repr(given))
