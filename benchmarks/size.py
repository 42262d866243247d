"""Measure the installed size: the wheel, the core, and what each extra adds.

    python -m benchmarks.size

The sizes are those of the files in `.venv-all`, which `make licences` creates.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.utils import canonicalize_name

from tools import ROOT
from tools.installed import EVERYTHING, Installed
from tools.wheel import build, committed_at

if TYPE_CHECKING:
    from collections.abc import Iterable

TORCH = canonicalize_name("torch")


def bytes_of(given: Iterable[Distribution]) -> int:
    """Return the disk size of distributions; a shared file counts once."""
    files = {Path(str(file.locate())).resolve() for each in given for file in each.files or []}
    return sum(file.stat().st_size for file in files if file.is_file())


def measure(installed: Installed) -> list[dict[str, Any]]:
    """Measure a row for each part."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(ROOT, Path(folder), committed_at(ROOT))
        target = Path(folder, "installed")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
        rows = [
            _row("the wheel of afa", 1, wheel.stat().st_size),
            _row("afa, installed", 1, bytes_of(distributions(path=[str(target)]))),
        ]
    torch = installed.distributions[TORCH]
    rows.append(_row(f"torch {torch.version}", 1, bytes_of([torch])))
    for extra, (names, _) in installed.parts().items():
        given = [installed.distributions[name] for name in names - {TORCH}]
        part = f"`afa[{extra}]` adds" if extra else "the core's other dependencies"
        rows.append(_row(part, len(given), bytes_of(given)))
    return rows


def _row(part: str, number: int, size: int) -> dict[str, Any]:
    return {"part": part, "distributions": number, "bytes": size}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=EVERYTHING)
    print(json.dumps(measure(Installed(parser.parse_args().venv)), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
