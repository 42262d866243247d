"""Write constraints.txt and the locks from what pyproject.toml asks for.

    python -m tools.lock                  # keep the pins, add what is missing, drop the rest
    python -m tools.lock --newest         # raise them all, but for torch
    python -m tools.lock --wheels FOLDER  # accept the files in FOLDER as well: builds of torch

uv resolves for all platforms and Pythons at once and tells the files of every release.
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

#: the lowest that the pins allow: some of them leave out the first releases of 3.11
PYTHON = "3.11.5"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SYSTEMS = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
#: what a CUDA build of torch pins itself, down to the version; no other build wants them
OF_CUDA = ("cuda-", "nvidia-", "triton")
#: raised by hand: its files are chosen by machine
BY_HAND = canonicalize_name("torch")

_CONSTRAINTS_HEAD = """\
# The versions that the tests run with, on every platform. `make lock` keeps them, `make
# constraints` raises them. The locks are the same versions with the hashes of their files.
# torch stands without a local version, so the CPU and the CUDA builds both fit.
"""
_LOCK_HEAD = """\
# What `make install` installs: pins of constraints.txt, with the SHA-256 of every file of their
# releases, which are the wheels for Python 3.11 and newer on Linux, macOS and Windows, and the
# sdist. `make lock` writes it; tools/install.sh reads it.
#
# torch: its builds on the package index are accepted, and those that are named above its pin. Any
# other must be installed unchecked beforehand; `make install` says how, and goes on from there.
# What a CUDA build of it asks for besides (cuda-*, nvidia-*, triton) is not here and installed
# without hashes, at the versions that torch itself pins.
"""
_EXTRAS_HEAD = """\
# What the extras add that `dev` leaves out, in addition to requirements.lock and in the same form.
"""
_TOOLS_HEAD = """\
# What `make lock` and `make audit` run, in a .venv-tools of their own; `make lock` writes it.
"""


def is_accepted(file: str) -> bool:
    """Whether a file of a release may be installed: an sdist, or a wheel for a machine of ours."""
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
    """Whether some Python on some system of ours wants a distribution."""
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
    """The pins of a resolution as in PEP 751, by name.

    Raises:
        AfaError: it has two versions of a distribution, or no file of one.
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
                f"Every distribution must have one version with files to install, came "
                f"{name}=={entry['version']}, {len(hashes)} files"
                + (f", beside {pins[name].version}" if name in pins else "")
                + ". Bound it in pyproject.toml.",
            )
        pins[name] = Pin(name, entry["version"], marker, hashes)
    return dict(sorted(pins.items()))


def resolve(kept: Pins, *arguments: str) -> Pins:
    """What uv finds for the project, held to the pins that are kept.

    Raises:
        AfaError: there is no such set of versions, or the package index cannot be reached.
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
                f"The pins must fit pyproject.toml and be on the package index, but uv says: "
                f"{said} Take the pin that is in the way out of constraints.txt.",
            )
        return pins_of(tomllib.loads(found.read_text()))


def accept_also(pins: Pins, before: Pins, folder: Path | None) -> None:
    """Accept files that are not on the index: those of before, and those in a folder."""
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
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--newest", action="store_true", help="raise all pins but torch's")
    parser.add_argument("--wheels", type=Path, help="a folder of files to be accepted as well")
    arguments = parser.parse_args()
    if arguments.wheels and not arguments.wheels.is_dir():
        raise AfaError(
            "AFA-TOOL-010",
            f"--wheels must be a folder, came '{arguments.wheels}'. Name one, or none.",
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
