"""Write constraints.txt and the lock files from the requirements in pyproject.toml.

    python -m tools.lock                  # keep the pins, add missing ones, drop unused ones
    python -m tools.lock --newest         # upgrade all pins except torch
    python -m tools.lock --wheels FOLDER  # also accept the files in FOLDER: builds of torch

uv resolves for all platforms and versions of Python at once, and lists the files of every release.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.markers import Marker
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from afa.errors import AfaError
from afa.files import write_atomic
from tools import ROOT, run, say
from tools.pins import CONSTRAINTS, EXTRAS_LOCK, LOCK, TOOLS_LOCK, Pin, Pins, read_pins

#: the lowest version that the pins allow: some of them exclude the first releases of 3.11
PYTHON = "3.11.5"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SYSTEMS = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
#: pinned to exact versions by CUDA builds of torch; no other build needs them
OF_CUDA = ("cuda-", "nvidia-", "triton")
#: upgraded by hand, because its files depend on the machine
BY_HAND = canonicalize_name("torch")

_CONSTRAINTS_HEAD = """\
# The versions that the tests run with, on every platform. `make lock` keeps them; `make
# constraints` upgrades them. The lock files have the same versions with the hashes of their files.
# torch has no local version, so that both the CPU and the CUDA builds match.
"""
_LOCK_HEAD = """\
# `make install` installs these pins of constraints.txt. Each pin has the SHA-256 of its accepted
# files: the wheels for Python 3.11 and newer on Linux, macOS and Windows, and the sdist. `make
# lock` writes this file; tools/install.sh reads it.
#
# torch: the builds on the package index and those named above its pin are accepted. Install any
# other build unchecked beforehand; `make install` prints the command and then continues.
# The other requirements of a CUDA build (cuda-*, nvidia-*, triton) are not in this file. They are
# installed without hashes, at the versions that torch pins.
"""
_EXTRAS_HEAD = """\
# The distributions that extras other than `dev` add to requirements.lock, in the same format.
"""
_TOOLS_HEAD = """\
# The tools that `make lock` and `make audit` run in .venv-tools; `make lock` writes this file.
"""


def is_accepted(file: str) -> bool:
    """Whether a file of a release may be installed: an sdist, or a wheel for a supported system."""
    if not file.endswith(".whl"):
        return True
    try:
        tags = parse_wheel_filename(file)[3]
    except InvalidWheelFilename:
        return False
    return any(
        (
            tag.interpreter.startswith("py3")
            or tag.abi == "abi3"
            or (tag.interpreter.startswith("cp3") and int(tag.interpreter[3:]) >= 11)
        )
        and tag.platform.startswith(("any", "linux", "manylinux", "musllinux", "macosx", "win"))
        for tag in tags
    )


def is_wanted(name: str, marker: str) -> bool:
    """Whether a supported version of Python on a supported system needs a distribution."""
    if name.startswith(OF_CUDA):
        return False
    environments = (
        {
            "python_version": python,
            "python_full_version": f"{python}.9",
            "sys_platform": system,
            "platform_system": SYSTEMS[system],
            "platform_machine": machine,
        }
        for python in PYTHONS
        for system in SYSTEMS
        for machine in ("x86_64", "aarch64", "arm64", "AMD64")
    )
    return not marker or any(Marker(marker).evaluate(each) for each in environments)


def pins_of(resolved: dict[str, Any]) -> Pins:
    """Return the pins of a resolution (PEP 751), by name.

    Raises:
        AfaError: if a distribution has two versions, or no file that can be installed.
    """
    pins: Pins = {}
    for entry in resolved["packages"]:
        name, marker = canonicalize_name(entry["name"]), entry.get("marker", "")
        if not is_wanted(name, marker):
            continue
        files = [*entry.get("wheels", []), *([entry["sdist"]] if "sdist" in entry else [])]
        hashes = [
            file["hashes"]["sha256"]
            for file in files
            if is_accepted(unquote(urlsplit(file["url"]).path.rsplit("/", 1)[1]))
        ]
        if name in pins or not hashes:
            raise AfaError(
                "AFA-TOOL-008",
                f"{name}=={entry['version']} has {len(hashes)} installable files"
                + (f", and {pins[name].version} was resolved as well" if name in pins else "")
                + ". Every distribution must have one version with at least one file. Restrict "
                "its version in pyproject.toml.",
            )
        pins[name] = Pin(name, entry["version"], marker, hashes)
    return dict(sorted(pins.items()))


def resolve(kept: Pins, *arguments: str) -> Pins:
    """Resolve the project's requirements with uv, with the kept pins as constraints.

    Raises:
        AfaError: if no set of versions fits, or the package index cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints, found = Path(folder, "constraints.txt"), Path(folder, "pylock.toml")
        constraints.write_text("".join(f"{pin.name}=={pin.version}\n" for pin in kept.values()))
        command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet"]
        command += ["--universal", "--python-version", PYTHON, "--fork-strategy", "fewest"]
        command += ["--format", "pylock.toml", "-o", str(found), "-c", str(constraints)]
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            said = " ".join(done.stderr.split())[:600]
            raise AfaError(
                "AFA-TOOL-009",
                f"uv cannot resolve pyproject.toml with the pins: {said} Remove the conflicting "
                "pin from constraints.txt.",
            )
        return pins_of(tomllib.loads(found.read_text()))


def accept_also(pins: Pins, before: Pins, folder: Path | None) -> None:
    """Accept files that are not on the index: those accepted before, and those in a folder."""
    for name, pin in pins.items():
        if name in before and before[name].version == pin.version:
            pin.beside = before[name].beside
    for file in sorted(folder.glob("*.whl")) if folder else ():
        name, version, *_ = parse_wheel_filename(file.name)
        accepted = pins.get(name)
        if accepted and version.public == accepted.version:
            with file.open("rb") as content:
                sha = hashlib.file_digest(content, "sha256").hexdigest()
            if sha not in accepted.hashes:
                accepted.beside[file.name] = sha


def main() -> None:
    """Write constraints.txt and the three lock files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--newest", action="store_true", help="upgrade all pins except torch")
    parser.add_argument("--wheels", type=Path, help="folder with further accepted files")
    arguments = parser.parse_args()
    if arguments.wheels and not arguments.wheels.is_dir():
        raise AfaError(
            "AFA-TOOL-010",
            f"--wheels must be a folder; got '{arguments.wheels}'. Pass a folder, or omit it.",
        )
    kept, tools = read_pins(CONSTRAINTS), read_pins(TOOLS_LOCK)
    before = read_pins(LOCK) | read_pins(EXTRAS_LOCK)
    if arguments.newest:
        kept, tools = {BY_HAND: kept[BY_HAND]}, {}
    pins = resolve(kept, "pyproject.toml", "--all-extras")
    usual = resolve(pins, "pyproject.toml", "--extra", "dev")
    accept_also(pins, before, arguments.wheels)
    for name, pin in usual.items():
        pin.beside = pins[name].beside
    extras = [pin for name, pin in pins.items() if name not in usual]
    _write(CONSTRAINTS, _CONSTRAINTS_HEAD, [f"{p.name}=={p.version}\n" for p in pins.values()])
    _write(LOCK, _LOCK_HEAD, [pin.as_text() for pin in usual.values()])
    _write(EXTRAS_LOCK, _EXTRAS_HEAD, [pin.as_text() for pin in extras])
    _write(
        TOOLS_LOCK, _TOOLS_HEAD, [p.as_text() for p in resolve(tools, "--group", "tools").values()]
    )


def _write(path: Path, head: str, pins: list[str]) -> None:
    write_atomic(path, head + "".join(pins))
    say(f"{path.relative_to(ROOT)}: {len(pins)} distributions")


if __name__ == "__main__":
    run(main)
