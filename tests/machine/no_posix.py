"""Import all of afa where neither the POSIX modules nor the POSIX functions of modules exist.

What else is imported keeps them: it is loaded before. Says at the end that all of it works.
"""

from __future__ import annotations

import builtins
import importlib
import os
import pkgutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import afa

MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog", "readline")
FUNCTIONS: dict[Any, tuple[str, ...]] = {
    os: (
        *("preadv", "pread", "pwrite", "geteuid", "getuid", "getgid", "fork", "forkpty", "killpg"),
        *("setsid", "sched_getaffinity", "statvfs", "mkfifo", "uname", "getloadavg", "sysconf"),
        *("O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "posix_fadvise", "sendfile", "wait"),
    ),
    signal: ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "pthread_kill"),
    socket: ("AF_UNIX",),
}


def names() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(afa.__path__, "afa.")]
    return [name for name in found if not name.endswith("__main__")]


def main() -> None:
    for name in names():
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "afa"]:
        del sys.modules[name]
    usual: Any = builtins.__import__

    def checked(name: str, names: Any = None, *rest: Any, **options: Any) -> Any:
        if name in MODULES and str((names or {}).get("__name__", "")).startswith("afa"):
            raise ModuleNotFoundError(f"{names['__name__']} imports {name}")
        return usual(name, names, *rest, **options)

    builtins.__import__ = checked  # type: ignore[assignment]
    for module, gone in FUNCTIONS.items():
        for name in gone:
            if hasattr(module, name):
                delattr(module, name)
    sys.platform = "win32"
    for name in names():
        importlib.import_module(name)
    work()
    sys.stdout.write("works\n")


def work() -> None:
    """What asks the machine itself."""
    import torch

    from afa.ensemble.placement.streaming import LayerStream
    from afa.machine.free import free_memory
    from afa.machine.hashes import hash_file
    from afa.training.examples import _require_sockets
    from afa.training.stopping import stop_on_signals

    assert free_memory(torch.device("cpu")) > 0
    with stop_on_signals() as request:
        assert not request()
    _require_sockets()
    stream = LayerStream()
    stream.file.write(b"0123456789")
    stream.file.flush()
    assert bytes(stream._bytes_at(3, 4).tolist()) == b"3456"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large"
        file.write_bytes(bytes(9_000_000))
        os.environ["XDG_CACHE_HOME"] = folder
        os.utime(file, (1, 1))
        hash_file(file)


if __name__ == "__main__":
    main()
