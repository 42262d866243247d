"""Measure start-up times: import, command line, loading, the first picture.

    python -m benchmarks.startup

Every start is a separate process; the starts alternate. The first row is the import of the
libraries alone, and the ratios are relative to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.rounds import ratio, take_turns

_LOAD = "import afa; pipe = afa.load_ensemble('zoo:ensemble')"
STARTS: dict[str, list[str]] = {
    "import torch, diffusers and its pipeline": [
        "-c",
        "import torch; from diffusers import StableDiffusionPipeline",
    ],
    "import afa": ["-c", "import afa"],
    "import afa.EnsembleDenoiser": ["-c", "import afa; afa.EnsembleDenoiser"],
    "afa --help": ["-m", "afa", "--help"],
    "three experts and their aggregators loaded": ["-c", _LOAD],
    "the first picture, 20 steps": [
        "-c",
        f"{_LOAD}; pipe('a fox on the left and a pizza on the right, blue background', "
        "num_inference_steps=20)",
    ],
}


def measure(num_rounds: int) -> list[dict[str, Any]]:
    """Measure all starts."""

    def run(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    functions = {name: (lambda given=given: run(given)) for name, given in STARTS.items()}
    seconds = take_turns(functions, num_rounds)
    first = next(iter(STARTS))
    return [
        {
            "start": name,
            "num_rounds": num_rounds,
            "seconds": statistics.median(seconds[name]),
            "ratio": ratio(seconds, name, first).as_json(),
        }
        for name in STARTS
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    print(json.dumps(measure(parser.parse_args().rounds), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
