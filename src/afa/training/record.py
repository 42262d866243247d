"""What a run leaves beside its checkpoints: metrics.jsonl, trackers, and where it was made."""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.provenance import commit, processor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

    from afa.training.loop import TrainStep
    from afa.training.routing import Routing

METRICS = "metrics.jsonl"
_ENVIRONMENT = "environment.json"
_PACKAGES = ("afa", "torch", "diffusers", "transformers", "accelerate", "safetensors", "datasets")


class Recorder:
    """Writes a training's figures down; only the main process has one.

    Args:
        folder: of the run.
        trackers: of accelerate, by name; `tensorboard` writes into `logs` of the folder.
        settings: the recipe, for trackers that keep it.
        first_step: the steps that are done; later lines of an earlier run are taken out.

    Raises:
        AfaError: a tracker that accelerate does not know or cannot start.
    """

    def __init__(
        self, folder: Path, trackers: Sequence[str], settings: dict[str, Any], first_step: int
    ) -> None:
        self._path = folder / METRICS
        self._keep_up_to(first_step)
        #: what a user should read of how the run starts, one line each
        self.notes = self._note_environment(folder / _ENVIRONMENT, first_step)
        self._trackers: list[Any] = []
        try:
            for name in trackers:
                self._trackers.append(_start(name, folder, settings, first_step))
        except BaseException:
            self.close()  # TensorBoard's writer has a thread, which would outlive this
            raise
        self._since = _Window()

    def _keep_up_to(self, step: int) -> None:
        """Take out what a run wrote after the checkpoint that goes on now."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line that a stop cut short
        write_atomic(self._path, "".join(f"{line}\n" for line in kept))

    @staticmethod
    def _note_environment(place: Path, first_step: int) -> list[str]:
        starts = read_json(place)["starts"] if place.exists() else []
        here = _here()
        before = starts[-1].get("versions", {}) if starts and first_step else here["versions"]
        starts.append({"step": first_step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | here)
        write_atomic(place, json.dumps({"starts": starts}, indent=2) + "\n")
        changed = [
            f"{name} {here['versions'].get(name, 'none')} (before: {before.get(name, 'none')})"
            for name in sorted(before.keys() | here["versions"].keys())
            if before.get(name) != here["versions"].get(name)
        ]
        if not changed:
            return []
        return [
            f"The run continues with other releases than it began with: {', '.join(changed)}. Its "
            "steps may differ from those of an undisturbed run."
        ]

    def step(self, step: TrainStep) -> None:
        """Take a step into account for the next line."""
        self._since.add(step)

    def flush(self, step: int) -> dict[str, float]:
        """Write a line of the means since the last one."""
        figures = self._since.figures()
        self._since = _Window()
        self.write(step, figures)
        return figures

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """A line in metrics.jsonl, and its numbers to the trackers."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            if numbers:
                tracker.log(numbers, step=step)

    def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Hand pictures to the trackers that show some."""
        import numpy as np

        for tracker in self._trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                arrays = np.stack([np.asarray(picture) for picture in pictures])
                tracker.log_images({"previews": arrays}, step, **layout)

    def close(self) -> None:
        """Let the trackers write what they hold."""
        for tracker in self._trackers:
            tracker.finish()


@dataclass
class _Window:
    """The steps since the last line."""

    steps: list[TrainStep] = field(default_factory=list)

    def add(self, step: TrainStep) -> None:
        self.steps.append(step)

    def figures(self) -> dict[str, float]:
        if not self.steps:
            return {}
        return {
            "loss": statistics.fmean(step.loss for step in self.steps),
            "grad_norm": statistics.fmean(step.grad_norm for step in self.steps),
            "learning_rate": self.steps[-1].learning_rate,
            "seconds_per_step": statistics.median(step.seconds for step in self.steps),
        }


def routing_figures(routing: Routing, experts: Sequence[str]) -> dict[str, float]:
    """Shares and entropies under the names that metrics.jsonl has."""
    figures = {
        f"weight/{site}/{name}": round(share, 6)
        for site, row in zip(routing.sites, routing.shares.tolist(), strict=True)
        for name, share in zip(experts, row, strict=True)
    }
    return figures | {
        f"entropy/{site}": round(value, 6)
        for site, value in zip(routing.sites, routing.entropy.tolist(), strict=True)
    }


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not know, before any work.

    Raises:
        AfaError: names those that there are.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    for name in names:
        if name not in known:
            raise AfaError(
                "AFA-TRAIN-044", f"A tracker must be one of {', '.join(known)}, came '{name}'."
            )


def _start(name: str, folder: Path, settings: dict[str, Any], first_step: int) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    require_trackers([name])
    kind = next(found for known, found in LOGGER_TYPE_TO_CLASS.items() if str(known) == name)
    try:
        # TensorBoard drops what an earlier run wrote after the checkpoint
        purge = {"purge_step": first_step + 1} if name == "tensorboard" and first_step else {}
        if kind.requires_logging_directory:
            tracker = kind("", folder / "logs", **purge)
        else:
            tracker = kind("afa")
        tracker.start()
    except ImportError as error:
        raise AfaError(
            "AFA-TRAIN-045",
            f"The tracker '{name}' must be installed: {error}. Run: pip install {name}",
        ) from error
    if not kind.requires_logging_directory:
        tracker.store_init_configuration(settings)
    return tracker


def _here() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
        "processor": processor(),
        "devices": devices,
    }
