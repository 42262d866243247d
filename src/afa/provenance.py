"""The provenance of results: commit, machine, software."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__version__ = "0.1.0"


def made_from() -> dict[str, str]:
    """Return the commit, machine and software of results."""
    return {
        "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores, one thread for each process",
        "software": ", ".join(
            [f"Python {platform.python_version()}"]
            + [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")]
        ),
    }


def releases(*packages: str) -> dict[str, str]:
    """Return major and minor versions of installed packages by name, without missing ones.

    Cached results depend on these; a patch release changes at most the last bits.
    """
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = ".".join(version(package).split("+")[0].split(".")[:2])
    return found


#: after the name of a commit
UNCOMMITTED = " and uncommitted changes"


def commit() -> str:
    """Return the commit of the running code, and whether there are uncommitted changes."""
    root = Path(__file__).parent
    try:
        name = _git(root, "rev-parse", "HEAD")
        top = Path(_git(root, "rev-parse", "--show-toplevel"))
        if _git(top, "status", "--porcelain", "--", "src", "pyproject.toml", "constraints.txt"):
            name += UNCOMMITTED
    except (OSError, subprocess.CalledProcessError):
        name = f"afa {version('afa')}, not a git checkout"
    return name


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip()


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
