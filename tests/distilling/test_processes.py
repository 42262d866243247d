"""Several processes record together, and train together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distilling.students import as_written
from tests.warm import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def run(asked: dict[str, Any], output: Path, num_processes: int) -> list[Any]:
    place = output.with_suffix(".yaml")
    place.write_text(yaml.safe_dump(asked))
    return run_ranks(["distill", place, "--output", output, "--no-check"], num_processes, {})


def figures(folder: Path, key: str) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


@pytest.mark.parametrize("what", [{}, {"what": "lora", "rank": 4}], ids=["full", "lora"])
def test_two_processes_are_one_with_twice_the_batch(
    what: dict[str, Any], experts: list[Path], tmp_path: Path
) -> None:
    """The recorded bytes are the same; the steps differ by the order of float32 sums."""
    for name, count, size in (("one", 1, 4), ("two", 2, 2)):
        asked = as_written(
            experts,
            tmp_path / "prompts.txt",
            student={"init": str(experts[0]), **what},
            training={"batch_size": size, "log_every": 1},
            validation={"num_samples": 4, "every": 2},
        )
        ranks = run(asked, tmp_path / name, count)
        assert [code for code, *_ in ranks] == [0] * count, ranks
    one, two = (tmp_path / name for name in ("one", "two"))
    shards = sorted(one.rglob("recorded/*/*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        assert shard.read_bytes() == (two / shard.relative_to(one)).read_bytes()
    for key in ("loss", "validation_loss"):
        assert figures(two, key) == pytest.approx(figures(one, key), rel=1e-4)
    file = "lora.safetensors" if what else "unet/diffusion_pytorch_model.safetensors"
    for name, tensor in load_file(one / file).items():
        torch.testing.assert_close(load_file(two / file)[name], tensor, rtol=1e-2, atol=1e-3)


def test_text_encoders_are_trained_by_one(experts: list[Path], tmp_path: Path) -> None:
    student = {"init": str(experts[0]), "text_encoder": True}
    asked = as_written(experts, tmp_path / "prompts.txt", student=student)
    ranks = run(asked, tmp_path / "out", 2)
    assert any("AFA-DISTILL-014" in str(rank) for rank in ranks), ranks
