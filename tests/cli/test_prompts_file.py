"""Files of prompts in the forms of A1111, kohya's scripts, JSON Lines and CSV."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from afa.cli.prompts_file import read_prompts
from afa.cli.wanted import Wanted, parse_seed, parse_size, size_of_options
from afa.recipe import MAX_SEED
from tests.refusal import refusal

if TYPE_CHECKING:
    from pathlib import Path

DEFAULTS = Wanted("", "grey", 3, 50, 7.5, None, None, "ddim")
ALL: dict[str, Any] = {
    "prompt": "a fox",
    "negative_prompt": "blurry, grey",
    "width": 512,
    "height": 768,
    "seed": 5,
    "steps": 30,
    "guidance": 7.0,
    "scheduler": "dpmpp_2m_karras",
}


def read(path: Path, text: str) -> list[Wanted]:
    path.write_text(text, encoding="utf-8")
    return read_prompts(path, DEFAULTS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a1111.txt",
            '--prompt "a fox" --negative_prompt "blurry, grey" --width 512 --height 768 --seed 5 '
            '--steps 30 --cfg_scale 7 --sampler_name "DPM++ 2M Karras"',
        ),
        (
            "kohya.txt",
            "a fox --n blurry, grey --w 512 --h 768 --d 5 --s 30 --l 7 --ss dpmpp_2m karras",
        ),
        (
            "lines.jsonl",
            '{"prompt": "a fox", "negative": "blurry, grey", "size": "512x768", "seed": 5, '
            '"steps": 30, "guidance": 7.0, "sampler": "DPM++ 2M Karras"}',
        ),
        (
            "rows.csv",
            "prompt,negative_prompt,width,height,seed,steps,cfg_scale,sampler\n"
            'a fox,"blurry, grey",512,768,5,30,7,dpmpp_2m_karras',
        ),
    ],
)
def test_every_form_has_all_settings(name: str, text: str, tmp_path: Path) -> None:
    assert read(tmp_path / name, text) == [Wanted(**ALL)]


def test_plain_lines_have_the_settings_of_the_command(tmp_path: Path) -> None:
    text = "\ufeffa fox\n\n# a comment\na bee -- with wings, 3--4 flowers\na cat --s 4 --d random\n"
    plain = replace(DEFAULTS, prompt="a fox")
    first, second, third = read(tmp_path / "prompts.txt", text)
    assert first == plain
    assert second == replace(plain, prompt="a bee -- with wings, 3--4 flowers")
    assert (third.prompt, third.steps) == ("a cat", 4)
    assert 0 <= third.seed <= MAX_SEED


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("x.txt", "a fox\na bee --batch_size 4", "AFA-CLI-037", ("line 2", "batch_size")),
        ("x.txt", "a fox --w wide", "AFA-CLI-038", ("line 1", "wide")),
        ("x.txt", "a fox --s 0", "AFA-CLI-038", ("line 1", "s in")),
        ("x.txt", "a fox --d -4", "AFA-CLI-032", ("line 1", "-4")),
        ("x.txt", "a fox --size big", "AFA-CLI-033", ("line 1", "big")),
        ("x.txt", "a fox --w 8 --w 9", "AFA-CLI-042", ("line 1", "twice")),
        ("x.txt", "a fox --w 8 --width 9", "AFA-CLI-042", ("line 1", "width twice")),
        ("x.txt", "--steps 3", "AFA-CLI-042", ("line 1", "no prompt")),
        ("x.txt", '--prompt "a fox', "AFA-CLI-042", ("line 1", "quot")),
        ("x.txt", "a fox --ss foo", "AFA-DRAW-020", ("foo",)),
        ("x.txt", "# nothing\n", "AFA-CLI-042", ("x.txt", "no prompt")),
        ("x.jsonl", '{"prompt": "a"}\n[1]', "AFA-CLI-042", ("line 2",)),
        ("x.csv", "prompt,colour\na,red", "AFA-CLI-037", ("line 2", "colour")),
        ("x.csv", "prompt\na,red", "AFA-CLI-042", ("line 2", "columns")),
    ],
)
def test_mistakes_name_their_line(
    name: str, text: str, code: str, said: tuple[str, ...], tmp_path: Path
) -> None:
    with refusal(code, *said):
        read(tmp_path / name, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("x.txt", "gone.txt"):
        with refusal("AFA-CLI-035", name):
            read_prompts(tmp_path / name, DEFAULTS)


def test_seeds_and_sizes() -> None:
    assert parse_seed("7") == 7
    assert len({parse_seed("random") for _ in range(9)}) > 1
    assert 0 <= parse_seed("-1") <= MAX_SEED
    for wrong in ("-2", "4294967296", "1.5", ""):
        with refusal("AFA-CLI-032", "--seed"):
            parse_seed(wrong)
    assert parse_size("512x768") == (768, 512)
    assert size_of_options("512 X 768", None, None) == (768, 512)
    assert size_of_options(None, 8, None) == (8, None)
    for wrong in ("512", "x512", "axb"):
        with refusal("AFA-CLI-033", wrong):
            parse_size(wrong)
    with refusal("AFA-CLI-039", "2 processes"):
        parse_seed("random", num_processes=2)
    with refusal("AFA-CLI-034", "--height"):
        size_of_options("512x512", 512, None)
