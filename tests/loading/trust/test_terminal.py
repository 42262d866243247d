"""Names in files from strangers, shown on a terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from afa.cli.console import printable
from afa.errors import AfaError
from tests.cli.test_cli import run, write_recipe

HOSTILE = "\x1b[2J\x1b]0;title\x07[red]x[/red]\r\n\u202e[/]"


def test_nothing_steers_the_terminal() -> None:
    shown = printable(HOSTILE)
    assert shown.isprintable()
    assert "[red]x[/red]" in shown


def test_an_error_is_one_line_whatever_is_in_it() -> None:
    text = str(AfaError("AFA-FILE-001", "a\nb\rc\u2028d\x85e\x1cf"))
    assert len(text.splitlines()) == 1
    assert text == "a b c d e f"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_inspect(
    options: list[str], experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(experts[0], tmp_path / "copy"))
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = HOSTILE
    (folder / "model_index.json").write_text(json.dumps(index))
    save_file({HOSTILE: torch.zeros(1)}, tmp_path / "a.safetensors")
    for place in (folder, tmp_path / "a.safetensors"):
        assert run("inspect", place, *options) in (0, 2)
        said = capsys.readouterr()
        for line in (said.out + said.err).splitlines():
            assert line.isprintable(), line


def test_check_and_errors(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[/bold]\x1b[31m"
    recipe = write_recipe(tmp_path, [experts[0], tmp_path / name])
    for command in (["check", recipe], ["train", recipe, "--output", tmp_path / "[red]"]):
        assert run(*command) == 2
        said = capsys.readouterr()
        assert "[/bold]" in said.out + said.err
        assert "\x1b" not in said.out + said.err
