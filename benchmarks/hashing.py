"""Measure whether a second start hashes the experts' files again.

    python -m benchmarks.hashing

Every start is a process that describes three sparse files of 2 GB each, as `afa inspect` does. The
bytes are those that the process reads by system calls (`rchar` of /proc/self/io).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from afa.files import SETTLED

NUM_FILES = 3
_START = """
import json, sys, time
from pathlib import Path
from afa.loading.inspection import describe
from afa.policy import trusting

def num_read():
    return int(Path("/proc/self/io").read_text().split()[1])

rehash, *files = sys.argv[1:]
before, started = num_read(), time.perf_counter()
with trusting(rehash=rehash == "rehash"):
    hashes = [describe(file)["sha256"] for file in files]
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "bytes_read": num_read() - before, "hashes": hashes}))
"""


def measure(size: int) -> list[dict[str, Any]]:
    """Measure a row for each start."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"expert{number}.safetensors") for number in range(NUM_FILES)]
        for file in files:
            _write(file, size)
        time.sleep(1.1 * SETTLED / 1e9)  # hashes of recently written files are not stored
        environment = os.environ | {"XDG_CACHE_HOME": folder}
        rows = []
        for start in ("first", "second", "third, with `--rehash`"):
            option = "rehash" if "rehash" in start else "-"
            command = [sys.executable, "-c", _START, option, *map(str, files)]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            rows.append({"start": start, "bytes": NUM_FILES * size, **json.loads(done.stdout)})
    if len({tuple(row.pop("hashes")) for row in rows}) > 1:
        raise RuntimeError("the hashes of the starts differ")
    return rows


def _write(file: Path, size: int) -> None:
    """Write a sparse safetensors file of about this size, all zeros."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"weight": tensor}).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=2_000_000_000, help="size of each file")
    print(json.dumps(measure(parser.parse_args().bytes), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
