"""Merges that are refused give one line and leave no files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afa.merging import merge_checkpoints, plan_merge
from tests.merging.test_merge_checkpoints import copied, merge, recipe
from tests.refusal import refusal


@pytest.mark.parametrize(
    ("tensors", "code", "value"),
    [
        (
            {"conv_in.bias": torch.zeros(3)},
            "AFA-MERGE-010",
            r"'unet.conv_in.bias' .*\(8,\).*\(3,\)",
        ),
        ({"new.bias": torch.zeros(3)}, "AFA-MERGE-009", r"'unet.new.bias' .*\(3,\) in .* missing"),
        ({"conv_in.bias": torch.full((8,), torch.nan)}, "AFA-MERGE-036", "'unet.conv_in.bias' in"),
        ({"conv_in.bias": torch.full((8,), torch.inf)}, "AFA-MERGE-036", "infinity"),
        ({"conv_in.bias": torch.full((8,), 1e6)}, "AFA-MERGE-035", "5e.05.* torch.float16"),
        (
            {"conv_in.weight": torch.zeros(8, 4, dtype=torch.uint8)},
            "AFA-MERGE-032",
            "'unet.conv_in.weight' in .*uint8",
        ),
    ],
)
def test_refusals_leave_nothing_behind(
    tensors: dict[str, Tensor], code: str, value: str, experts: list[Path], tmp_path: Path
) -> None:
    wrong = copied(tmp_path / "wrong", experts[1], tensors)
    with refusal(code, value):
        merge(tmp_path / "new" / "merged", [experts[0], wrong], dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


def test_mixed_objectives_are_refused(experts: list[Path], tmp_path: Path) -> None:
    shutil.copytree(experts[1], tmp_path / "v")
    config = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v"}))
    with refusal("AFA-MERGE-024"):
        plan_merge(recipe([experts[0], tmp_path / "v"]), tmp_path / "merged")


def test_too_little_space_is_said_before(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with refusal("AFA-MERGE-029", "0.00"):
        plan_merge(recipe(experts), tmp_path / "a" / "merged")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_merge_leaves_nothing(
    stop: type[BaseException], experts: list[Path], tmp_path: Path
) -> None:
    progress = merge_checkpoints(recipe(experts), tmp_path / "merged")
    while next(progress).num_tensors < 5:
        pass
    assert list(tmp_path.iterdir())
    with pytest.raises(stop):
        progress.throw(stop())  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())
