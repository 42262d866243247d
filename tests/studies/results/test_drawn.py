"""Pictures of an earlier run are only used if they were made from the same inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from PIL import Image
from safetensors.torch import save_file

from afa.evaluation.cost import Cost
from afa.studies.results.drawn import drawn_job, render_scenes, scenes_job
from afa.studies.results.entrants import Place
from afa.studies.results.rivals.rival import Drawer, Rival
from tests.refusal import refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

CAPTIONS = ["one", "two"]


@dataclass(frozen=True)
class _Grey(Rival):
    level: int = 9
    row: ClassVar[str] = "grey"

    def open(self) -> Drawer:
        return _GreyDrawer(self.level)


class _GreyDrawer(Drawer):
    def __init__(self, level: int) -> None:
        self._level = level

    def draw(
        self, captions: Sequence[str], numbers: Sequence[int], seed: int
    ) -> tuple[list[Image.Image], Cost]:
        pictures = [Image.new("RGB", (4, 4), (self._level,) * 3) for _ in captions]
        return pictures, Cost(1.0, None, 2 * len(captions), "test")


def test_a_rivals_pictures_are_of_its_settings_prompts_seed_and_models(tmp_path: Path) -> None:
    place = Place("main", tmp_path / "main", tmp_path)
    for source in (place.base, *place.experts.values()):
        Path(source).mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, Path(source) / "model.safetensors")
    rival, folder = _Grey(place, 4), tmp_path / "drawn"
    drawn_job("grey", rival, CAPTIONS, 0, folder)
    assert len(list(folder.glob("*.png"))) == 2
    drawn_job("grey", rival, CAPTIONS, 0, folder)
    for other, captions, seed, key in (
        (replace(rival, level=8), CAPTIONS, 0, "level"),
        (replace(rival, num_steps=5), CAPTIONS, 0, "num_steps"),
        (rival, ["one", "three"], 0, "captions"),
        (rival, CAPTIONS, 1, "seed"),
    ):
        with refusal("AFA-EVAL-030", key):
            drawn_job("grey", other, captions, seed, folder)
    save_file({"x": torch.ones(1)}, Path(place.base) / "model.safetensors")
    with refusal("AFA-EVAL-030", "models"):
        drawn_job("grey", rival, CAPTIONS, 0, folder)


def test_real_scenes_are_of_these_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "references"
    scenes_job("scenes", [("cat", "pizza")], 2, folder)
    scenes_job("scenes", [("cat", "pizza")], 2, folder)
    assert len(list(folder.iterdir())) == 2
    with refusal("AFA-EVAL-030", "pairs"):
        scenes_job("scenes", [("dog", "pizza")], 2, folder)


def test_scenes_that_a_killed_process_did_not_render_are_rendered(tmp_path: Path) -> None:
    pairs, folder = [("fox", "pizza"), ("bee", "guitar")], tmp_path / "real"
    render_scenes(pairs, 6, folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "000004.png").unlink()
    (folder / ".000004.png.abcdefgh").write_bytes(b"unfinished")
    render_scenes(pairs, 6, folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == whole
