"""Self-contained HTML pages: one look, figures that bring their library along, nothing fetched, all text escaped.

Templates extend ``page.html.j2``, which has the title, the headlines and what was measured. A content security policy
in the page forbids to fetch anything.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any, SupportsFloat

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from moe_interp.paths import write_whole
from moe_interp.views.tables import between
from moe_interp.views.tokens import shown


@dataclass(frozen=True)
class Headline:
    """One question, the number that answers it, and its control."""

    question: str
    value: str
    control: str


def template(name: str) -> Template:
    """A template of this package: everything that it is given is escaped, and nothing may be missing."""
    environment = Environment(
        loader=PackageLoader("moe_interp.views"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "fixed": fixed, "between": between}
    return environment.get_template(name)


def fixed(value: SupportsFloat, digits: int = 2) -> str:
    """A number with so many digits after the point; no number, a dash."""
    number = float(value)
    return "–" if isnan(number) else f"{number:.{digits}f}"


def render(name: str, figures: Mapping[str, go.Figure], provenance: Mapping[str, Any], **values: Any) -> str:
    """A page of figures by a template that extends ``page.html.j2``."""
    from plotly.offline import get_plotlyjs

    drawn = {
        key: figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=key.replace(" ", "-"), config={"displaylogo": False}
        )
        for key, figure in figures.items()
    }
    shown_provenance = json.dumps(provenance, indent=2, ensure_ascii=False)
    return template(name).render(plotly=get_plotlyjs(), figures=drawn, provenance=shown_provenance, **values)


def write(text: str, target: Path) -> Path:
    """The file, whole or not at all."""
    return write_whole(target, text.encode("utf-8"))
