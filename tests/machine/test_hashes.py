"""Files are hashed once over several starts, and never told by what they were before."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from afa import files
from afa.machine import hashes
from afa.machine.hashes import hash_file
from afa.policy import trusting

if TYPE_CHECKING:
    from collections.abc import Callable

_ZEROS = hashlib.sha256(bytes(64)).hexdigest()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files whose bytes were read; files count as old at once, and small ones are kept."""
    read: list[Path] = []
    digest = hashes.compute_sha256

    def counting(file: Path) -> str:
        read.append(file)
        return digest(file)

    monkeypatch.setattr(hashes, "compute_sha256", counting)
    monkeypatch.setattr(files, "SETTLED", -1)
    monkeypatch.setattr(hashes, "MIN_KEPT", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    another_start(monkeypatch)
    return read


def another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process knows."""
    known = {False: files.FileCache(), True: files.FileCache()}
    monkeypatch.setattr(hashes, "hash_caches", known)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "afa" / "hashes").glob("*"))


def test_the_second_start_reads_no_byte(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(64))
    assert [hash_file(file), hash_file(file)] == [_ZEROS] * 2
    another_start(monkeypatch)
    assert hash_file(file) == _ZEROS
    assert counted == [file]
    assert (tmp_path / "cache" / "afa" / "hashes").stat().st_mode & 0o777 == 0o700


def test_rehash_ignores_what_is_kept_and_keeps_it_anew(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(64))
    hash_file(file)
    (entry,) = entries(tmp_path)
    entry.write_text(entry.read_text().replace(_ZEROS, "0" * 64))
    another_start(monkeypatch)
    assert hash_file(file) == "0" * 64
    with trusting(rehash=True):
        assert [hash_file(file), hash_file(file)] == [_ZEROS] * 2
    assert counted == [file] * 2
    another_start(monkeypatch)
    assert hash_file(file) == _ZEROS
    assert counted == [file] * 2


def _replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(bytes(63) + b"1")
    os.replace(other, file)


def _written_into(file: Path) -> None:
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"1")
    # whoever hides the time of the change cannot hide that of the inode
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [_replaced, _written_into])
@pytest.mark.parametrize("again", [False, True])
def test_a_file_that_changed_is_hashed_again(
    change: Callable[[Path], None],
    again: bool,
    counted: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(64))
    os.utime(file, ns=(0, 0))
    hash_file(file)
    _wait_for_the_clock(tmp_path)
    change(file)
    if again:
        another_start(monkeypatch)
    assert hash_file(file) == hashlib.sha256(file.read_bytes()).hexdigest() != _ZEROS


def _wait_for_the_clock(tmp_path: Path) -> None:
    """Until a file written now has another time than those before."""
    first = tmp_path / "first"
    first.write_bytes(b"")
    while True:
        second = tmp_path / "second"
        second.write_bytes(b"")
        if second.stat().st_ctime_ns > first.stat().st_ctime_ns:
            return


def test_a_hash_of_a_file_just_written_is_not_kept(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SETTLED", 2_000_000_000)
    file = tmp_path / "model"
    file.write_bytes(bytes(64))
    os.utime(file, ns=(0, 0))  # an old date, as copies have it, is not believed
    assert hash_file(file) == _ZEROS
    file.write_bytes(b"1" * 64)
    assert hash_file(file) == hashlib.sha256(b"1" * 64).hexdigest()
    assert entries(tmp_path) == []


def test_a_hash_of_a_file_that_changes_meanwhile_is_not_kept(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(64))
    digest = hashes.compute_sha256

    def slowly(file: Path) -> str:
        found = digest(file)
        file.write_bytes(b"longer" * 64)
        return found

    monkeypatch.setattr(hashes, "compute_sha256", slowly)
    hash_file(file)
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"file": 1}',
        b"[" * 10_000,
        b"x" * 100_000,
    ],
)
def test_a_damaged_entry_is_as_none(
    content: bytes, counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(64))
    hash_file(file)
    (entry,) = entries(tmp_path)
    good = json.loads(entry.read_text())
    entry.write_bytes(content)
    another_start(monkeypatch)
    assert hash_file(file) == _ZEROS
    entry.write_text(json.dumps({**good, "sha256": "no hash"}))
    another_start(monkeypatch)
    assert hash_file(file) == _ZEROS
    assert json.loads(entry.read_text()) == good
    assert counted == [file] * 3


def test_an_entry_that_others_could_have_written_is_ignored(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(64))
    hash_file(file)
    (entry,) = entries(tmp_path)
    entry.write_text(entry.read_text().replace(_ZEROS, "0" * 64))
    entry.chmod(0o664)
    another_start(monkeypatch)
    assert hash_file(file) == _ZEROS


def test_without_a_place_for_it_nothing_is_kept(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(64))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder
    assert hash_file(file) == _ZEROS


def test_several_processes_at_once(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(9_000_000))
    code = (
        "import sys; from pathlib import Path; from afa import files; files.SETTLED = -1;"
        "from afa.machine.hashes import hash_file; print(hash_file(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(file)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate()[0].strip() for process in running}
    assert said == {hashlib.sha256(bytes(9_000_000)).hexdigest()}
    assert hash_file(file) in said
    assert counted == []
    assert len(entries(tmp_path)) == 1
