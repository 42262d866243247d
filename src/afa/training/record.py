"""Records of a run: metrics.jsonl, trackers and environment.json."""

from __future__ import annotations

import json
import platform
import statistics
import time
from contextlib import suppress
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
#: key of the line about the end of a training by early stopping
EARLY = "early_stopping"
_ENVIRONMENT = "environment.json"
_OF_CURVES = ("loss", "validation_loss", "learning_rate")
_PACKAGES = ("afa", "torch", "diffusers", "transformers", "accelerate", "safetensors", "datasets")


class Recorder:
    """Writes the metrics of a training; only the main process has one.

    Args:
        folder: the run's folder.
        trackers: names of accelerate's trackers; `tensorboard` writes into the subfolder `logs`.
        settings: the recipe, for trackers that store it.
        first_step: number of steps that are done; lines of later steps are removed.

    Raises:
        AfaError: if the package of a tracker is not installed.
    """

    def __init__(
        self, folder: Path, trackers: Sequence[str], settings: dict[str, Any], first_step: int
    ) -> None:
        self._path = folder / METRICS
        #: lines of the run with losses, for its curves
        self.losses: list[dict[str, Any]] = []
        self._keep_up_to(first_step)
        #: steps from which the run was started
        self.starts: list[int] = []
        #: messages for the user about the start, one line each
        self.notes = self._note_environment(folder / _ENVIRONMENT, first_step)
        self._trackers: list[Any] = []
        try:
            for name in trackers:
                self._trackers.append(_start(name, folder, settings, first_step))
        except BaseException:
            self.close()  # ends the threads of trackers that have started
            raise
        self._since: list[TrainStep] = []

    def _keep_up_to(self, step: int) -> None:
        """Remove the lines of steps after the checkpoint."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                if entry["step"] <= step:
                    kept.append(line)
                    self._remember(entry)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # an incomplete line of an interrupted run
        write_atomic(self._path, "".join(f"{line}\n" for line in kept))

    def _remember(self, entry: dict[str, Any]) -> None:
        found = {key: entry[key] for key in _OF_CURVES if key in entry}
        if found:
            self.losses.append({"step": entry["step"], **found})

    def _note_environment(self, place: Path, first_step: int) -> list[str]:
        starts = read_json(place)["starts"] if place.exists() else []
        here = _here()
        before = starts[-1].get("versions", {}) if starts and first_step else here["versions"]
        starts.append({"step": first_step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | here)
        write_atomic(place, json.dumps({"starts": starts}, indent=2) + "\n")
        self.starts = [start["step"] for start in starts]
        changed = [
            f"{name} {here['versions'].get(name, 'none')} (before: {before.get(name, 'none')})"
            for name in sorted(before.keys() | here["versions"].keys())
            if before.get(name) != here["versions"].get(name)
        ]
        if not changed:
            return []
        return [
            f"Package versions have changed since this run was last started: {', '.join(changed)}. "
            "Its steps may differ from those of an uninterrupted run."
        ]

    def step(self, step: TrainStep) -> None:
        """Include a step in the next line of means."""
        self._since.append(step)

    def flush(self, step: int) -> None:
        """Write a line of means over the steps since the last one."""
        steps, self._since = self._since, []
        figures = {
            "loss": statistics.fmean(step.loss for step in steps),
            "grad_norm": statistics.fmean(step.grad_norm for step in steps),
            "learning_rate": steps[-1].learning_rate,
            "seconds_per_step": statistics.median(step.seconds for step in steps),
        }
        self.write(step, figures)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl, and its numbers to the trackers."""
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        self._remember({"step": step, **figures})
        numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            if numbers:
                tracker.log(numbers, step=step)

    def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Log pictures to the trackers that support it."""
        import numpy as np

        for tracker in self._trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                arrays = np.stack([np.asarray(picture) for picture in pictures])
                tracker.log_images({"previews": arrays}, step, **layout)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def entries_of(folder: Path, key: str) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics that have a key, without an incomplete last line."""
    path, found = folder / METRICS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if isinstance(entry, dict) and key in entry:
                found.append(entry)
    return found


def routing_figures(routing: Routing, experts: Sequence[str]) -> dict[str, float]:
    """Fusion weights and entropies, named as in metrics.jsonl."""
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
    """Check that accelerate knows the trackers.

    Raises:
        AfaError: if it does not.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise AfaError(
                "AFA-TRAIN-044",
                f"training.trackers has '{name}', which accelerate does not know. Use names of "
                f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}.",
            )


def _start(name: str, folder: Path, settings: dict[str, Any], first_step: int) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    try:
        # TensorBoard then removes the steps after the checkpoint
        purge = {"purge_step": first_step + 1} if name == "tensorboard" and first_step else {}
        if kind.requires_logging_directory:
            tracker = kind("", folder / "logs", **purge)
        else:
            tracker = kind("afa")
        tracker.start()
    except ImportError as error:
        raise AfaError(
            "AFA-TRAIN-045",
            f"The tracker '{name}' is not installed: {error}. Run: pip install {name}",
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
