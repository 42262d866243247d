"""Checkpoints: whole or not at all, the newest few, and nothing lost on a full disk."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from afa.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
)
from tests.refusal import refusal


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    tensors = {"a.x": torch.randn(3), "a.y.z": torch.arange(2), "b.x": torch.zeros(())}
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.read() is None
    checkpoints.write(Checkpoint(7, tensors, {"hashes": ["f"]}))
    found = checkpoints.read()
    assert found is not None
    assert (found.step, found.notes) == (7, {"hashes": ["f"]})
    assert all(torch.equal(found.tensors[key], tensors[key]) for key in tensors)
    assert set(found.part("a")) == {"x", "y.z"}


def test_tensors_may_share_memory(tmp_path: Path) -> None:
    tensor = torch.randn(4, 4)
    Checkpoints(tmp_path).write(Checkpoint(1, {"a": tensor, "b": tensor, "c": tensor.T}))
    found = Checkpoints(tmp_path).read()
    assert found is not None
    assert torch.equal(found.tensors["c"], tensor.T)


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "step-mine.safetensors").write_text("a user's own file")
    for step in (1, 2, 10, 9):
        checkpoints.write(Checkpoint(step, {"a": torch.zeros(1)}))
    assert [place.name for place in checkpoints.places()] == [
        "step-00000009.safetensors",
        "step-00000010.safetensors",
    ]
    assert (tmp_path / "step-mine.safetensors").exists()


@pytest.mark.fault(
    "full disk",
    "train, at a checkpoint",
    how="writing the checkpoint fails with ENOSPC",
    holds="one line that names the last checkpoint, which is intact",
)
def test_a_full_disk_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as full:
        full.setattr("afa.training.checkpoints.write_file", no_room)
        with refusal("AFA-TRAIN-004"):
            checkpoints.write(Checkpoint(1, {"a": torch.zeros(1)}))
    checkpoints.write(Checkpoint(1, {"a": torch.ones(1)}))
    monkeypatch.setattr("afa.training.checkpoints.write_file", no_room)
    with refusal("AFA-TRAIN-004", "2", "step-00000001"):
        checkpoints.write(Checkpoint(2, {"a": torch.zeros(1)}))
    found = checkpoints.read()
    assert found is not None
    assert found.tensors["a"].item() == 1
    assert len(list(tmp_path.iterdir())) == 1


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_optimizer_goes_on_bit_for_bit() -> None:
    def trained(stops: bool) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for step in range(6):
            if stops and step == 3:
                tensors = {k: t.clone() for k, t in optimizer_tensors(optimizer).items()}
                optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
                load_optimizer_tensors(optimizer, tensors)
            layer(torch.ones(2, 3) * step).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight.detach()

    assert torch.equal(trained(stops=False), trained(stops=True))
