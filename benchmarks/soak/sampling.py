"""Measure the resources of this process: memory, descriptors, threads, objects."""

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

_SETTLING = 0.2  # seconds for stopped threads to end


@dataclass(frozen=True)
class Held:
    """The resources of a process between two rounds, when nothing of a round should be left.

    Attributes:
        rss: Resident memory in bytes.
        uss: Resident memory that no other process shares.
        anonymous: Resident memory that is not backed by a file. Pages of libraries and of mapped
            weights come and go with the system's free memory, and are shared with other readers.
        allocated: Bytes allocated by the C library and not freed; 0 if it does not report them.
        kept: Free bytes that the C library keeps for later allocations.
        blocks: Memory blocks allocated by Python's own allocator.
        lost: The blocks among them that safetensors has leaked, see `reads`.
        objects: Objects that Python's garbage collector tracks.
        tensors: Live torch tensors.
        tensor_bytes: Bytes of their storages, each counted once.
        cached: Entries in the caches of afa's modules.
        fds: Open file descriptors.
        threads: Threads of the process, including those of libraries.
        children: Child processes, including indirect ones.
        maps: Memory maps.
        deleted: Memory maps of deleted files, whose disk space is not free yet.
        disk: Bytes of the work folder.
        unseen: Exceptions so far that could not be raised, such as those of finalizers.
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
        """Return the values by name."""
        return asdict(self)


def look(folder: Path) -> Held:
    """Measure this process after garbage collection.

    Args:
        folder: The work folder.
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


_unseen: list[str] = []  # their messages


def watch_errors() -> None:
    """Start counting the exceptions that Python only prints: in finalizers and in threads."""
    print_it, print_of_thread = sys.unraisablehook, threading.excepthook

    def note(error: Any) -> None:
        _unseen.append(str(error.exc_value))
        print_it(error)

    def note_of_thread(error: Any) -> None:
        _unseen.append(str(error.exc_value))
        print_of_thread(error)

    sys.unraisablehook, threading.excepthook = note, note_of_thread


def size_of(folder: Path) -> int:
    """Return the total size of the files in a folder, in bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def anonymous() -> int:
    """Return the resident memory that is not backed by a file, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(kilobytes) * 1024


def _maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def _tensors(objects: list[Any]) -> Iterator[Any]:
    """Return the tensors among objects, by type, because some objects fake their class."""
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
    """Return the number of entries of every cache in afa's modules, by name."""
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
    except AttributeError:  # not glibc, or older than 2.33
        return _MallocInfo()
    mallinfo.restype = _MallocInfo
    return mallinfo()


def allocated() -> int:
    """Return the bytes allocated by the C library, in heaps and maps; 0 if unknown."""
    info = _malloc_info()
    return int(info.uordblks + info.hblkhd)


def kept() -> int:
    """Return the free bytes in the C library's heaps; 0 if unknown."""
    return int(_malloc_info().fordblks)


def trim() -> bool:
    """Make the C library release free memory; return whether it can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return False
    return True
