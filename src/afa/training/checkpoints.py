"""Checkpoints of a training run, each in one safetensors file."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from afa.errors import AfaError
from afa.loading.tensor_files import write_file
from afa.machine.damaged import Unreadable, loading, metadata_json

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_NAME = re.compile(r"step-(\d{8})\.safetensors")
_META = "afa"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` steps: named tensors, and notes as JSON."""

    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with `name` and a dot, without this prefix."""
        prefix = f"{name}."
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}


def step_in_name(place: Path) -> int | None:
    """Return the step of a checkpoint by the name of its file; None for another file."""
    found = _NAME.fullmatch(place.name)
    return None if found is None else int(found[1])


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in a folder; 0 if there is none."""
    return max(Checkpoints(folder).steps(), default=0)


class Checkpoints:
    """The checkpoints in a folder, written atomically; only the newest are kept.

    Args:
        folder: created with the first checkpoint.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self._keep = folder, keep

    def places(self) -> list[Path]:
        """Return the files of all checkpoints, the newest last."""
        if not self.folder.is_dir():
            return []
        return sorted(place for place in self.folder.iterdir() if _NAME.fullmatch(place.name))

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, the newest last."""
        return [step for place in self.places() if (step := step_in_name(place)) is not None]

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then delete the oldest ones.

        Raises:
            AfaError: if it cannot be written, for example because the disk is full.
        """
        notes = json.dumps({"step": checkpoint.step, **checkpoint.notes})
        place = self.folder / f"step-{checkpoint.step:08d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(place, checkpoint.tensors, {_META: notes})
        except OSError as error:
            raise AfaError(
                "AFA-TRAIN-004",
                f"The checkpoint of step {checkpoint.step} cannot be written: {error}. "
                f"{self.intact()} Free disk space and run the same command again to resume.",
            ) from error
        for old in self.places()[: -self._keep]:
            with suppress(OSError):
                old.unlink()

    def intact(self) -> str:
        """Name the last intact checkpoint in a sentence."""
        places = self.places()
        if not places:
            return "There is no earlier checkpoint."
        return f"The last checkpoint, '{places[-1]}', is intact."

    def read(self, step: int | None = None) -> Checkpoint | None:
        """Read the newest checkpoint, or that of a step; None if there is none.

        Raises:
            AfaError: if it is damaged.
        """
        places = [each for each in self.places() if step in (None, step_in_name(each))]
        if not places:
            return None
        place = places[-1]
        remedy = "Delete it to restart from the first step."
        if len(places) > 1:
            remedy = f"Delete it to resume from '{places[-2].name}'."
        with (
            loading(f"The checkpoint '{place}' must be complete", remedy),
            safe_open(place, framework="pt") as file,
        ):
            notes = metadata_json(file, _META)
            if not isinstance(notes, dict) or not isinstance(notes.get("step"), int):
                raise Unreadable("its metadata has no step")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Checkpoint(notes.pop("step"), tensors, notes)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer whose state is only tensors, such as AdamW, by `N.NAME`."""
    return {
        f"{number}.{name}": tensor
        for number, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of `optimizer_tensors` into an optimizer of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
