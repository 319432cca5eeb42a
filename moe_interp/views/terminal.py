"""What commands print: tables as wide as their cells, and no text that could steer a terminal.

Names of models, domains and files, tokens and messages of other libraries are untrusted. `Terminal` shows their control
characters as codes, whoever made the text; `Escaping` does the same for a stream that others write to.
"""

from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table

from moe_interp.views.tokens import printable

_WIDEST = 10_000


class Terminal(Console):
    """A console that shows control characters in any text as their codes."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, each segment's text made printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(lines(segment.text), segment.style)


class Escaping:
    """A text stream that writes control characters as their codes, but for ends of lines and carriage returns."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, made printable."""
        return self.stream.write("\r".join(map(lines, text.split("\r"))))

    def isatty(self) -> bool:
        """Whether colours may be written: they are control characters."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def lines(text: str) -> str:
    """A text of lines with control characters as their codes."""
    return "\n".join(map(printable, text.split("\n")))


def show(console: Console, table: Table) -> None:
    """Print a table of numbers, every cell on one line and whole: wider than the terminal where it needs to be."""
    options = console.options.update(max_width=_WIDEST)
    table.width = Measurement.get(console, options, table).maximum
    console.print(table, crop=False, no_wrap=True, overflow="ignore")


def show_words(console: Console, table: Table) -> None:
    """Print a table of words as wide as the terminal: cells go on in the next line, and nothing is cut."""
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)
