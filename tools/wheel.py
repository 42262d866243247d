"""Build the wheel reproducibly, and print its size and SHA-256.

    python -m tools.wheel            # into dist

The same commit gives the same bytes. Nothing is downloaded: the build tools are installed from
requirements.lock.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from afa.errors import AfaError
from tools import ROOT, run, say


def build(tree: Path, output: Path, epoch: int) -> Path:
    """Build the wheel of a tree, with `epoch` (in seconds) as the date of its files.

    Raises:
        AfaError: if hatchling cannot build it.
    """
    output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    with tempfile.TemporaryDirectory(dir=output) as folder:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise AfaError(
                "AFA-TOOL-013",
                f"hatchling cannot build '{tree}': {said} If hatchling is missing, install it: "
                "make install",
            )
        (wheel,) = Path(folder).glob("*.whl")
        return wheel.replace(output / wheel.name)


def committed_at(tree: Path) -> int:
    """Return the time of the last commit, in seconds.

    Raises:
        AfaError: if the tree is not a git checkout.
    """
    command = ["git", "-C", str(tree), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AfaError(
            "AFA-TOOL-014",
            f"'{tree}' is not a git checkout: {done.stderr.strip()} The last commit dates the "
            "files of the wheel. Clone the repository.",
        )
    return int(done.stdout)


def main() -> None:
    """Build the wheel of this tree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    wheel = build(ROOT, parser.parse_args().output, committed_at(ROOT))
    content = wheel.read_bytes()
    say(f"{wheel.name}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    run(main)
