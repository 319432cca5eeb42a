"""Does the wheel work where this checkout is not?

1. Build it, and hold that every file under `moe_interp/` is in it.
2. Install it into a fresh virtual environment, with the versions in `constraints.txt`.
3. In an empty folder, run `moe-interp --help`, `moe-interp audit` and the README's first example there.

Run by `make wheel-check`; pytest does not collect it.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command with nothing of this checkout on its path; leave if it fails."""
    shown = " ".join(str(part) for part in command)
    print(f"$ {shown}", flush=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    started = time.monotonic()
    code = subprocess.run(command, cwd=cwd, env=clean).returncode
    if code:
        sys.exit(f"wheel check: `{shown}` ended with {code}")
    print(f"  {time.monotonic() - started:.0f} s", flush=True)


def build(folder: Path) -> Path:
    """The wheel, built from this checkout."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def hold_complete(wheel: Path) -> None:
    """Leave if a file of the package, code or data, is missing from the wheel."""
    files = (path for path in (ROOT / "moe_interp").rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    missing = wanted - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        sys.exit(f"wheel check: not in {wheel.name}: {', '.join(sorted(missing))}")
    print(f"  {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(wanted)} files", flush=True)


def first_example() -> str:
    """The first python block of the README."""
    text = (ROOT / "README.md").read_text("utf-8")
    block = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    if block is None:
        sys.exit("wheel check: README.md has no ```python block")
    return block.group(1)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="moe-interp-wheel-") as name:
        folder = Path(name)
        wheel = build(folder)
        hold_complete(wheel)
        venv.create(folder / "venv", with_pip=True)
        bin_, elsewhere = folder / "venv" / "bin", folder / "elsewhere"
        elsewhere.mkdir()
        install = (bin_ / "python", "-m", "pip", "install", "--quiet", "--no-compile")
        run(*install, "-c", ROOT / "constraints.txt", wheel, cwd=elsewhere)
        (elsewhere / "example.py").write_text(first_example(), "utf-8")
        run(bin_ / "moe-interp", "--help", cwd=elsewhere)
        run(bin_ / "moe-interp", "audit", cwd=elsewhere)
        run(bin_ / "python", "example.py", cwd=elsewhere)
    print("wheel check: passed")


if __name__ == "__main__":
    main()
