"""What a newer transformers changed: which known model types still open and add up, and which new ones do.

    python -m tests.drift [-o FILE]

Prints a table (and writes it to FILE, as Markdown) and exits with 1 if a type of `tests.tiny_types` no longer opens,
or no longer passes its audit. Types that transformers has and the table does not are built by the same shrinking rules
and opened by their structure; whether that works is told and is no failure.
"""

import argparse
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moe_interp as moe
from moe_interp.adapters import FAMILIES
from tests.tiny_types import TYPES, build, inputs

PACKAGES = ("transformers", "nnsight", "transformer-lens", "torch")


def judge(model_type: str) -> str:
    """ "ok", or what went wrong."""
    try:
        hf: Any = build(model_type)
        with moe.wrap(hf) as model:
            given = inputs(hf) if model_type in TYPES else {"input_ids": torch.arange(3, 11)[None]}
            audit = model.audit(given)
        failed = [check.name for check in audit.checks if not check.passed]
        return f"audit fails: {'; '.join(failed)}" if failed else "ok"
    except Exception as error:  # whatever a new release sets off
        return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"


def unknown() -> Iterator[str]:
    """Model types whose modeling file decorates an experts class and that no adapter names."""
    root = Path(inspect.getfile(transformers)).parent / "models"
    folders = {name: config_class.__module__.split(".")[-2] for name, config_class in CONFIG_MAPPING.items()}
    known = {folders[name] for name in {*FAMILIES, *TYPES} if name in folders}
    for model_type, folder in folders.items():
        files = [] if folder in known else root.glob(f"{folder}/modeling_*.py")
        if any("@use_experts_implementation" in file.read_text(encoding="utf-8") for file in files):
            yield model_type


def main() -> None:
    """Judge all known and all new types."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    output = parser.parse_args().output
    new = list(unknown())
    verdicts = {model_type: judge(model_type) for model_type in tqdm([*TYPES, *new])}
    broken = [model_type for model_type in TYPES if verdicts[model_type] != "ok"]
    have = [name for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_"))]
    lines = [
        "# Drift",
        "",
        ", ".join(f"{name} {importlib.metadata.version(name)}" for name in have),
        "",
        f"{len(TYPES) - len(broken)} of {len(TYPES)} known types open and add up.",
        *(f"- **{model_type}**: {verdicts[model_type]}" for model_type in broken),
        "",
        f"{len(new)} types that no adapter names.",
        *(f"- {model_type}: {verdicts[model_type]}" for model_type in new),
    ]
    print("\n".join(lines))
    if output:
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
