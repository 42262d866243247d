"""Run `afa evaluate` as a stage of a study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from afa.errors import AfaError
from afa.files import write_atomic
from afa.policy import FOLDERS_VARIABLE
from afa.studies.zoo_build.evaluate import GUIDANCE_SCALE


@dataclass(frozen=True)
class StageStarted:
    """The start of a stage whose progress `afa evaluate` shows."""

    name: str


def sampling(num_steps: int) -> dict[str, Any]:
    """Sampling settings; one thread, so that pictures do not depend on the number of processes."""
    return {
        "num_steps": num_steps,
        "guidance": GUIDANCE_SCALE,
        "batch_size": 16,
        "num_threads": 1,
        "device": "cpu",
    }


def evaluate_in_processes(output: Path, recipe: dict[str, Any], num_processes: int) -> None:
    """Run `afa evaluate` in several processes on a recipe, which is stored next to `output`.

    The study wrote the recipe, so the folders that it names are trusted.
    """
    file = output.with_suffix(".yaml")
    plain = json.loads(json.dumps(recipe))  # avoids YAML aliases for shared lists
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=100)
    write_atomic(file, text)
    command = [sys.executable, "-m"]
    if num_processes > 1:
        launcher = "torch.distributed.run"
        command += [launcher, "--standalone", f"--nproc_per_node={num_processes}", "-m"]
    # the check would take a minute, and the models were made by this study
    command += ["afa", "evaluate", str(file), "--output", str(output), "--no-check"]
    trusted = [os.environ.get(FOLDERS_VARIABLE, ""), *sorted(folders_in(plain))]
    variables = {FOLDERS_VARIABLE: os.pathsep.join(trusted), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **variables}, check=False)
    if done.returncode:
        raise AfaError(
            "AFA-STUDY-006",
            f"afa evaluate failed on '{file}'; see its error above. Run the same command again to "
            "resume.",
        )


def folders_in(content: Any) -> set[str]:
    """The folders of all absolute paths in the content of a recipe."""
    if isinstance(content, dict):
        return folders_in(list(content.values()))
    if isinstance(content, list):
        return set().union(*map(folders_in, content))
    is_path = isinstance(content, str) and Path(content).is_absolute()
    return {str(Path(content).parent)} if is_path else set()
