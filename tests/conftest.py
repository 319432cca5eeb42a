"""A server that tests share; and ``docs/coverage.md``, written when the contract of all types was run and passed."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.shapes  # noqa: F401  # before anything of the package is imported
from moe_interp.points import POINTS
from tests.tiny_types import TYPES

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
RECORDED = "tests/test_types.py"
COLUMNS = {
    "read": "values read",
    "clean": "untouched output",
    "edit": "edits",
    "drop": "a slot dropped",
    "gradient": "gradients",
    "scores": "weights from scores",
    "neurons": "outputs from neurons",
    "block": "block",
    "mid": "resid_mid",
    "residual": "resid_post",
    "decode": "logits",
}
# An identity that is not checked: why, and what would end it.
SKIPS = {
    "scores": "weights are not proportional to the scores (a scale for each expert, or scores of one pick after the "
    "other; see below): that is what the model computes, and nothing would end it",
    "neurons": "a norm stands between the down-projection and the output: ends when the audit applies it",
    "mid": "no `resid_mid`, or something without a point (cross-attention, per-layer embeddings) is added before it: "
    "ends when the architecture has a point for it",
    "decode": "more than the last residual goes into the logits: ends with a point for what earlier blocks leave",
}


class Coverage:
    """What every test of a type recorded, the worst of each."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str | float]] = defaultdict(dict)
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.nodeid.startswith(RECORDED) or report.when != "call":
            return
        self.failed |= report.failed
        model_type = report.nodeid.partition("[")[2].removesuffix("]").removesuffix("-dtype0").removesuffix("-dtype1")
        if model_type not in TYPES or "-dtype1" in report.nodeid:
            return
        row = self.rows[model_type]
        for name, value in report.user_properties:
            row[name] = value if isinstance(value, str) else max(value, float(row.get(name, 0.0)))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        whole = set(self.rows) == set(TYPES) and all("residual" in row and "edit" in row for row in self.rows.values())
        if whole and not self.failed and not hasattr(session.config, "workerinput"):
            PAGE.write_text(page(self.rows), encoding="utf-8")


def page(rows: dict[str, dict[str, str | float]]) -> str:
    """The page, a row a type."""
    names = [*COLUMNS]
    lines = [
        "# Coverage",
        "",
        f"Every mixture-of-experts model type of transformers 5.23 that builds, {len(rows)} of them; none is refused.",
        "Written by the tests (`make test-all`) from tiny random models, every parameter and buffer drawn anew.",
        "",
        "Errors are the largest difference to the slow reference (`tests/reference/types`), relative to its largest",
        "value. *untouched output*: to the plain model, 0 where it is bit-equal. *block*, *resid_mid*, *resid_post*,",
        "*logits*: of the sums in which parts give the value. All have bounds: 1e-5, gradients 1e-4.",
        "",
        "| model type | opened by | points it lacks | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(names) + 3) + "|",
    ]
    for model_type in TYPES:
        row = rows[model_type]
        lacks = [point for point in POINTS if point not in str(row["points"]).split()]
        cells = [shown(row[name]) if name in row else "–" for name in names]
        lines.append(f"| {model_type} | {row['adapter']} | {' '.join(lacks) or 'none'} | " + " | ".join(cells) + " |")
    lines += ["", "## What is not checked", ""]
    for name, reason in SKIPS.items():
        types = [model_type for model_type in TYPES if name not in rows[model_type]]
        lines.append(f"- *{COLUMNS[name]}* of {', '.join(types)}: {reason}.")
    for name in ("mid", "residual"):
        some = [
            f"{model_type} ({row[f'partly {name}']})" for model_type, row in rows.items() if f"partly {name}" in row
        ]
        if some:
            lines.append(f"- *{COLUMNS[name]}* of {', '.join(sorted(some))}: {SKIPS['mid']}.")
    apart = [model_type for model_type in TYPES if "embedding" in rows[model_type]]
    lines.append(
        f"- the first *resid_pre* from *embed* of {', '.join(apart)}: positions or self-conditioning come between: "
        "ends with a point for those. Of encoders, whose embedding is no point, likewise."
    )
    unwritten = defaultdict(list)
    for model_type in TYPES:
        if "generation" in rows[model_type]:
            unwritten[str(rows[model_type]["generation"])].append(model_type)
    lines += [f"- *generation under edits* of {', '.join(types)}: {reason}." for reason, types in unwritten.items()]
    lines += ["", "## What is special", ""]
    notes = defaultdict(list)
    for model_type in TYPES:
        if rows[model_type].get("notes"):
            notes[str(rows[model_type]["notes"])].append(model_type)
    lines += [f"- {', '.join(types)}: {note}" for note, types in notes.items()]
    return "\n".join(lines) + "\n"


def shown(value: str | float) -> str:
    """An error by its order of magnitude, which does not change from run to run."""
    number = float(value)
    return "0" if number == 0 else f"{number:.0e}"


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """A server that this package is not installed on, one for each process of tests."""
    from tests.served import server

    with server() as found:
        yield found


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Coverage(), "coverage_page")
