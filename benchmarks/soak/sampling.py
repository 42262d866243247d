"""What this process holds now: memory, descriptors, threads, objects."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.soak.reads import lost_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

_SETTLING = 0.2  # seconds in which threads that were told to end do so


@dataclass(frozen=True)
class Held:
    """What a process holds between two rounds, when nothing of a round should be left.

    Attributes:
        rss: bytes of memory that are resident.
        uss: those of them that no other process shares.
        anonymous: those of them that are no file's. Pages of libraries and of mapped weights come
            and go as the system has room, and are shared with whoever else reads these files.
        allocated: bytes that the C library has given out and not got back; 0 where it does not say.
        kept: bytes that the C library could give back, but keeps to give them out again.
        blocks: of memory, that Python's own allocator has given out.
        lost: those of them that the library of weights has lost, see `reads`.
        objects: that Python's garbage collector knows.
        tensors: of torch, alive.
        tensor_bytes: of their storages, each counted once.
        cached: entries in the caches of afa's modules.
        fds: open file descriptors.
        threads: of the process, those of libraries too.
        children: processes that it has started, and theirs.
        maps: of memory.
        deleted: maps of files that have been removed, whose disk space is not free yet.
        disk: bytes of the work folder.
        unseen: errors until now that had nobody to be raised to, such as those of finalizers.
    """

    rss: int
    uss: int
    anonymous: int
    allocated: int
    kept: int
    blocks: int
    lost: int
    objects: int
    tensors: int
    tensor_bytes: int
    cached: int
    fds: int
    threads: int
    children: int
    maps: int
    deleted: int
    disk: int
    unseen: int

    def as_json(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


def look(folder: Path) -> Held:
    """What this process holds, once all is collected that can be.

    Args:
        folder: where it works.
    """
    gc.collect()
    time.sleep(_SETTLING)
    gc.collect()
    process = psutil.Process()
    memory = process.memory_full_info()
    maps = _maps()
    objects = gc.get_objects()
    tensors = list(_tensors(objects))
    return Held(
        rss=memory.rss,
        uss=memory.uss,
        anonymous=anonymous(),
        allocated=allocated(),
        kept=kept(),
        blocks=sys.getallocatedblocks(),
        lost=lost_blocks(),
        objects=len(objects),
        tensors=len(tensors),
        tensor_bytes=_storage_bytes(tensors),
        cached=sum(_caches().values()),
        fds=process.num_fds(),
        threads=process.num_threads(),
        children=len(process.children(recursive=True)),
        maps=len(maps),
        deleted=sum(line.endswith(" (deleted)") for line in maps),
        disk=size_of(folder),
        unseen=len(_unseen),
    )


_unseen: list[str] = []  # what was said


def watch_errors() -> None:
    """Count from here on the errors that Python only prints: in finalizers, and in threads."""
    print_it, print_of_thread = sys.unraisablehook, threading.excepthook

    def note(error: Any) -> None:
        _unseen.append(str(error.exc_value))
        print_it(error)

    def note_of_thread(error: Any) -> None:
        _unseen.append(str(error.exc_value))
        print_of_thread(error)

    sys.unraisablehook, threading.excepthook = note, note_of_thread


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def anonymous() -> int:
    """Bytes of memory that are resident and no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(kilobytes) * 1024


def _maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def _tensors(objects: list[Any]) -> Iterator[Any]:
    """The tensors among objects, told by their types: some pretend to be of another class."""
    torch = sys.modules.get("torch")
    if torch is not None:
        yield from (each for each in objects if issubclass(type(each), torch.Tensor))


def _storage_bytes(tensors: list[Any]) -> int:
    sizes = {}
    for tensor in tensors:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def _caches() -> dict[str, int]:
    """Entries of every cache that a module of afa has, by name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "afa" and module is not None:
            for key, value in vars(module).items():
                if isinstance(value, functools._lru_cache_wrapper):
                    found[f"{value.__module__}.{key}"] = value.cache_info().currsize
    prompt: Any = sys.modules.get("afa.denoisers.prompt")
    if prompt is not None:
        found["afa.denoisers.prompt._kept"] = len(prompt._kept)
    return found


# -- the C library ----------------------------------------------------------------------------


class _MallocInfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _malloc_info() -> _MallocInfo:
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # not glibc, or one before 2.33
        return _MallocInfo()
    mallinfo.restype = _MallocInfo
    return mallinfo()


def allocated() -> int:
    """Bytes that the C library has given out, in its heaps and as maps; 0 if it does not say."""
    info = _malloc_info()
    return int(info.uordblks + info.hblkhd)


def kept() -> int:
    """Bytes in the C library's heaps that are free; 0 if it does not say."""
    return int(_malloc_info().fordblks)


def trim() -> bool:
    """Let the C library give back what it keeps; whether it can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return False
    return True
