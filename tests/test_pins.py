"""What is pinned is one set of versions, with hashes, and nothing else is installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from afa import AfaError
from tests.refusal import refusal
from tools import ROOT, run
from tools.installed import Installed
from tools.lock import accept_also, is_accepted, is_wanted, pins_of
from tools.pins import CONSTRAINTS, EXTRAS_LOCK, LOCK, TOOLS_LOCK, Pin, Pins, read_pins

SHA = "0123456789abcdef" * 4


def test_the_locks_are_the_constraints_with_hashes() -> None:
    usual, extras = read_pins(LOCK), read_pins(EXTRAS_LOCK)
    assert not usual.keys() & extras.keys()
    locked = usual | extras
    constraints = read_pins(CONSTRAINTS)
    assert {name: pin.version for name, pin in locked.items()} == {
        name: pin.version for name, pin in constraints.items()
    }
    for pin in [*locked.values(), *read_pins(TOOLS_LOCK).values()]:
        assert pin.hashes, pin.name
        assert pin.hashes == sorted(set(pin.hashes)), pin.name
    assert list(usual) == sorted(usual)


def test_what_is_asked_for_is_pinned_to_a_version_that_fits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = {
        LOCK: [*project["build-system"]["requires"], *project["project"]["dependencies"]],
        TOOLS_LOCK: project["dependency-groups"]["tools"],
        CONSTRAINTS: [text for texts in extras.values() for text in texts],
    }
    for part in ("app", "dev", "docs", "zoo"):
        asked[LOCK] += extras[part]
    for file, texts in asked.items():
        pins = read_pins(file)
        for each in map(Requirement, texts):
            if each.name != "afa":
                assert each.specifier.contains(pins[canonicalize_name(each.name)].version), each


def test_the_lock_has_all_that_is_needed_here() -> None:
    needed = Installed(Path(sys.prefix)).needed("dev")
    assert len(needed) > 50
    assert not [name for name in needed - read_pins(LOCK).keys() if is_wanted(name, "")]


def test_a_line_that_is_no_pin_is_not_passed_over(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    with refusal("AFA-TOOL-011", r"'a\.lock'"):
        read_pins(lock)
    lock.write_text(f"numpy==2.0 \\\n    --hash=sha256:{SHA}\ntorch>=2\n")
    with refusal("AFA-TOOL-012", "3", "'torch>=2'"):
        read_pins(lock)


def test_a_pin_is_read_as_it_is_written(tmp_path: Path) -> None:
    pin = Pin(
        canonicalize_name("torch"),
        "2.0",
        "python_version < '3.13'",
        ["e" * 64, "d" * 64],
        {"torch-2.0+cpu-py3-none-any.whl": SHA},
    )
    lock = tmp_path / "a.lock"
    lock.write_text("# a comment\n" + pin.as_text())
    pin.hashes = [SHA, "d" * 64, "e" * 64]
    assert read_pins(lock) == {"torch": pin}


@pytest.mark.parametrize(
    ("file", "accepted"),
    [
        ("a-1.0.tar.gz", True),
        ("a-1.0-py2.py3-none-any.whl", True),
        ("a-1.0-cp39-abi3-manylinux_2_28_x86_64.whl", True),
        ("a-1.0-cp311-cp311-macosx_11_0_arm64.whl", True),
        ("a-1.0-cp314-cp314t-win_amd64.whl", True),
        ("a-1.0-cp310-cp310-manylinux_2_28_x86_64.whl", False),
        ("a-1.0-pp311-pypy311_pp73-win_amd64.whl", False),
        ("a-1.0-cp313-cp313-android_21_arm64_v8a.whl", False),
        ("a-1.0.whl", False),
    ],
)
def test_files_for_our_machines_are_accepted(file: str, accepted: bool) -> None:
    assert is_accepted(file) == accepted


def test_what_no_system_of_ours_wants_is_left_out() -> None:
    assert is_wanted("colorama", "sys_platform == 'win32'")
    assert is_wanted("audioop-lts", "python_full_version >= '3.13'")
    assert not is_wanted("pyodide", "sys_platform == 'emscripten'")
    assert not is_wanted("tomli", "python_version < '3.11'")
    assert not is_wanted("nvidia-cublas", "sys_platform == 'linux'")


def _entry(version: str, *files: str) -> dict[str, Any]:
    wheels = [
        {"url": f"https://somewhere/{file}", "hashes": {"sha256": f"{number}" * 64}}
        for number, file in enumerate(files)
    ]
    return {"name": "A_b", "version": version, "wheels": wheels}


def test_a_resolution_becomes_pins() -> None:
    entry = _entry("1", "a_b-1-py3-none-any.whl", "a_b-1-cp38-cp38-win32.whl")
    entry["sdist"] = {"url": "https://somewhere/a_b-1.tar.gz", "hashes": {"sha256": SHA}}
    (pin,) = pins_of({"packages": [entry]}).values()
    assert (pin.name, pin.version, pin.hashes) == ("a-b", "1", ["0" * 64, SHA])


def test_a_resolution_needs_one_version_with_files() -> None:
    ours, others = _entry("1", "a_b-1-py3-none-any.whl"), _entry("2", "a_b-2-cp38-cp38-win32.whl")
    with refusal("AFA-TOOL-008", "a-b==2", "0"):
        pins_of({"packages": [others]})
    with refusal("AFA-TOOL-008", "a-b==1", "1"):
        pins_of({"packages": [ours, ours]})


def test_builds_from_elsewhere_are_accepted_and_kept(tmp_path: Path) -> None:
    torch = canonicalize_name("torch")

    def pins(version: str) -> Pins:
        return {torch: Pin(torch, version, hashes=["f" * 64])}

    file = tmp_path / "torch-2.0+cpu-cp311-cp311-linux_x86_64.whl"
    file.write_bytes(b"a build")
    (tmp_path / "numpy-2.0-py3-none-any.whl").write_bytes(b"another")
    first, again, raised = pins("2.0"), pins("2.0"), pins("2.1")
    accept_also(first, {}, tmp_path)
    assert first[torch].beside == {file.name: hashlib.sha256(b"a build").hexdigest()}
    accept_also(again, first, None)
    assert again[torch].beside == first[torch].beside
    accept_also(raised, first, tmp_path)
    assert not raised[torch].beside


def test_an_error_is_one_line_and_two(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise AfaError("AFA-STUDY-001", "It must be so.")

    with pytest.raises(SystemExit) as stop:
        run(fails)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: It must be so.\n"


# -- installing -------------------------------------------------------------------------------


def _wheel(folder: Path) -> Path:
    """A distribution by the name of torch that has nothing in it."""
    path = folder / "torch-2.13.0+small-py3-none-any.whl"
    info = "torch-2.13.0+small.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+small"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.nightly
@pytest.mark.slow
def test_a_file_whose_hash_is_not_locked_is_not_installed(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
    lock = tmp_path / "a.lock"
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}

    def install(*hashes: str) -> subprocess.CompletedProcess[str]:
        lock.write_text(Pin(canonicalize_name("torch"), "2.13.0", hashes=[*hashes]).as_text())
        command = [str(ROOT / "tools" / "install.sh"), "venv", lock.name]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    def is_there() -> bool:
        return not subprocess.run(
            [python, "-c", "from importlib.metadata import version as v; v('torch')"],
            capture_output=True,
        ).returncode

    refused = install(SHA)
    assert refused.returncode == 2
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert refused.stderr.splitlines()[-1] == (
        f"The hash of {wheel.name} is not in a.lock. To use this build of torch, install it "
        "unchecked and try again: venv/bin/pip install --no-deps -c constraints.txt torch"
    )
    assert not is_there()
    install(SHA, hashlib.sha256(wheel.read_bytes()).hexdigest())  # has no package to end with
    assert is_there()
