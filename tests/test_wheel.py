"""The wheel is the same bytes wherever it is built, and holds the package and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from afa import __version__
from tests.refusal import refusal
from tools import ROOT
from tools.wheel import build, committed_at

pytestmark = pytest.mark.slow
EPOCH = 1_700_000_000
LIMIT = 4 * 2**20
SUFFIXES = {".py", ".typed", ".json", ".md", ".png", ".safetensors", ".txt"}


def _tracked() -> list[str]:
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def _copy(folder: Path, umask: int, age: int) -> Path:
    """The tree as it would be committed, with other dates and rights, and what must not ship."""
    before = os.umask(umask)
    try:
        for name in _tracked():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
            os.utime(target, (EPOCH - age, EPOCH - age))
        shutil.copy(ROOT / ".gitignore", folder)
        cache = folder / "src" / "afa" / "__pycache__"
        cache.mkdir()
        (cache / "errors.cpython-311.pyc").write_bytes(b"compiled")
        (folder / "runs").mkdir()
    finally:
        os.umask(before)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    return build(_copy(root / "tree", 0o022, 0), root / "dist", EPOCH)


def test_two_builds_are_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    tree = _copy(tmp_path / "elsewhere" / "another", 0o077, 1_000_000)
    before = os.umask(0o077)
    try:
        other = build(tree, tmp_path / "dist", EPOCH)
    finally:
        os.umask(before)
    assert other.name == wheel.name == f"afa-{__version__}-py3-none-any.whl"
    assert other.read_bytes() == wheel.read_bytes()
    assert build(tree, tmp_path / "later", EPOCH + 60).read_bytes() != wheel.read_bytes()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    info = f"afa-{__version__}.dist-info"
    expected = {name.removeprefix("src/") for name in _tracked() if name.startswith("src/afa/")}
    assert {"afa/py.typed", "afa/zoo/assets/sprites.png", "afa/configs/flux-dev.json"} <= expected
    assert {Path(name).suffix for name in expected} == SUFFIXES
    expected |= {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")
    } | {f"{info}/licenses/{name}" for name in ("LICENSE", "NOTICE")}
    with zipfile.ZipFile(wheel) as file:
        assert set(file.namelist()) == expected
        for name in ("LICENSE", "NOTICE"):
            assert file.read(f"{info}/licenses/{name}") == (ROOT / name).read_bytes()
        large = [entry.filename for entry in file.infolist() if entry.file_size > LIMIT]
    assert not large
    assert wheel.stat().st_size < 32 * 2**20


def test_what_is_no_checkout_or_cannot_be_built_is_told(tmp_path: Path) -> None:
    with refusal("AFA-TOOL-014"):
        committed_at(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    with refusal("AFA-TOOL-013"):
        build(tmp_path, tmp_path / "dist", EPOCH)
    assert not list((tmp_path / "dist").iterdir())
