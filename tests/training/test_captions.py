"""Folders of pictures as people have them: captions beside pictures, none, empty ones, and more."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import afa
from afa.evaluation.prompts import PromptsRecipe, load_prompts, source_warnings
from afa.loading.truncation import limits_of
from afa.loading.vocabulary import read_words
from afa.reading import BrokenSample, Conversion
from afa.reading.broken import MissingCaption
from afa.training import CacheProgress, train
from afa.training.data import DatasetImages, FolderImages, Part, open_data, open_dataset
from afa.training.data.rows import CaptionOptions
from afa.training.data.survey import caption_warnings, survey
from afa.training.listing import row_of
from afa.training.recipe import DataRecipe, DatasetRecipe
from tests.refusal import refusal
from tests.training.runs import recipe, steps_of

LONG = "a fox on the left " * 8


def picture(place: Path, size: tuple[int, int] = (32, 32), **options: Any) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, options.pop("colour", "red")).save(place, **options)
    return place


def beside(place: Path, caption: str | None, **options: Any) -> Path:
    """A picture with its caption in a `.txt`."""
    picture(place, **options)
    if caption is not None:
        place.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return place


def listed(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


# -- captions beside pictures -------------------------------------------------------------------


def test_captions_beside_pictures_in_subfolders(tmp_path: Path) -> None:
    beside(tmp_path / "10_fox" / "b.PNG", "a fox\n")
    beside(tmp_path / "10_fox" / "a.v2.jpg", "\ufeff  a second fox \r\n")
    picture(tmp_path / "10_bee" / "c.webp").with_suffix(".caption").write_text("a bee")
    (tmp_path / ".hidden").mkdir()
    beside(tmp_path / ".hidden" / "x.png", "hidden")
    beside(tmp_path / "._d.png", "of macOS")
    data = FolderImages(tmp_path)
    assert [Path(data.name(n)).name for n in range(3)] == ["c.webp", "a.v2.jpg", "b.PNG"]
    assert list(data.captions()) == [("a bee",), ("a second fox",), ("a fox",)]
    assert (len(data), data[2][1], data.warnings) == (3, "a fox", [])


def test_one_of_captions_and_pictures_is_missing(tmp_path: Path) -> None:
    beside(tmp_path / "a.png", "a fox")
    beside(tmp_path / "b.png", None)
    (tmp_path / "c.txt").write_text("of no picture")
    (tmp_path / "a.npz").write_bytes(b"latents of a trainer")
    data = FolderImages(tmp_path)
    with refusal("AFA-TRAIN-024", r"b\.png", kind=MissingCaption):
        data[1]
    (warning,) = data.warnings
    assert warning.startswith("2 files in ")
    assert "a.npz, c.txt" in warning


def test_kohyas_repeats_are_named_where_they_would_matter(tmp_path: Path) -> None:
    beside(tmp_path / "10_fox" / "a.png", "a fox")
    assert FolderImages(tmp_path).warnings == []
    beside(tmp_path / "3_bee" / "b.png", "a bee")
    (warning,) = FolderImages(tmp_path).warnings
    assert "(10_fox, 3_bee)" in warning
    assert "are ignored: all pictures are used equally often" in warning


@pytest.mark.parametrize(
    ("folder", "options", "said"),
    [
        ("", {}, "'10_fox' are not used, because"),
        ("", {"repeats": True}, "img'."),
        ("img/10_fox", {"repeats": True}, "img'."),
        ("plain", {"repeats": True, "from_folders": True}, "data.folder_captions have no effect"),
    ],
)
def test_kohyas_folders_at_another_level_are_named(
    tmp_path: Path, folder: str, options: dict[str, Any], said: str
) -> None:
    beside(tmp_path / "img" / "10_fox" / "a.png", "a fox")
    beside(tmp_path / "img" / "3_bee" / "b.png", "a bee")
    beside(tmp_path / "plain" / "c.png", "a cat")
    (warning,) = FolderImages(tmp_path / folder, options=CaptionOptions(**options)).warnings
    assert said in warning
    assert FolderImages(tmp_path / "img" / "10_fox").warnings == []


def test_further_lines_of_captions_are_named(tmp_path: Path) -> None:
    beside(tmp_path / "a.png", "\na fox\nand more\n")
    data = FolderImages(tmp_path)
    assert data[0][1] == "a fox"
    assert data.warnings == [
        "1 caption file with several lines: a.txt. Only the first line is used. Put each caption "
        "on one line; or, if each line is a caption of its own, set data.captions: random."
    ]


def test_two_captions_and_captions_in_other_encodings(tmp_path: Path) -> None:
    beside(tmp_path / "a.png", "a fox")
    (tmp_path / "a.caption").write_text("a fox\n")
    assert FolderImages(tmp_path)[0][1] == "a fox"
    (tmp_path / "a.caption").write_text("a bee")
    with refusal("AFA-TRAIN-015"):
        FolderImages(tmp_path)
    (tmp_path / "a.caption").write_bytes("a bée".encode("latin-1"))
    with refusal("AFA-TRAIN-016", r"a\.caption", "UTF-8"):
        FolderImages(tmp_path)


def test_a_folder_that_links_to_itself_has_an_end(tmp_path: Path) -> None:
    beside(tmp_path / "a.png", "a fox")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(FolderImages(tmp_path)) == 1


def test_pictures_without_any_caption_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with refusal("AFA-TRAIN-014"):
        FolderImages(tmp_path)


# -- lists --------------------------------------------------------------------------------------


def test_files_that_no_line_names_are_warned_of(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "sub/c.png"):
        picture(tmp_path / name)
    listed(tmp_path, [{"file_name": "./a.png", "text": "a fox"}])
    data = FolderImages(tmp_path)
    assert [path.name for path in data.unused] == ["b.png", "c.png"]
    (warning,) = data.warnings
    assert warning.startswith("metadata.jsonl does not list 2 files in ")
    assert warning.endswith(": b.png, sub/c.png.")


@pytest.mark.parametrize("row", [{"text": None}, {}])
def test_a_null_caption_is_a_broken_sample(tmp_path: Path, row: dict[str, Any]) -> None:
    picture(tmp_path / "a.png")
    data = FolderImages(listed(tmp_path, [{"file_name": "a.png", **row}]))
    with refusal("AFA-TRAIN-024", r"a\.png", kind=BrokenSample):
        data[0]
    with refusal("AFA-EVAL-002", r"'a\.png'"):
        load_prompts(PromptsRecipe(folder=tmp_path))


def parquet(folder: Path, **columns: Any) -> DatasetImages:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
    asked = DatasetRecipe(path="parquet", data_files=[str(folder / "rows.parquet")])
    data = open_dataset(asked, None)
    assert isinstance(data, DatasetImages)
    return data


def test_rows_without_picture_or_caption_are_broken_samples(tmp_path: Path) -> None:
    content = picture(tmp_path / "a.png").read_bytes()
    data = parquet(tmp_path, image=[content, None, content], text=["a", "b", None])
    assert list(data.captions()) == [("a",), ("b",), ()]
    assert list(Part(data, range(1, 3)).captions() or ()) == [("b",), ()]
    with refusal("AFA-TRAIN-022", "row 1 of ", "'image'", kind=BrokenSample):
        data[1]
    with refusal("AFA-TRAIN-021", "row 2 of ", "'text'", kind=BrokenSample):
        data[2]


def test_several_captions_of_a_picture_are_named(tmp_path: Path) -> None:
    content = picture(tmp_path / "a.png").read_bytes()
    data = parquet(tmp_path, image=[content], text=[["a fox", "an animal"]])
    assert data[0][1] == "a fox"
    (warning,) = data.warnings
    assert "'text' has lists of captions; only the first" in warning


# -- backgrounds --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_a_run_keeps_the_words_of_its_captions(
    cache: bool, experts: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(3):
        Image.new("RGB", (32, 32), (80 * n, 9, 9)).save(folder / f"{n}.png")
    listed(folder, [{"file_name": f"{n}.png", "text": f"a fox{'es' * n}"} for n in range(3)])
    data = {"folder": str(folder), "cache": cache, "cache_folder": str(tmp_path / "cache")}
    asked = recipe(experts, data)
    list(steps_of(asked, tmp_path / "run"))
    assert set(read_words(tmp_path / "run") or ()) == {"fox", "foxes", "foxeses"}


def test_the_background_is_used_and_part_of_what_data_is(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(tmp_path / "a.png")
    listed(tmp_path, [{"file_name": "a.png", "text": "a"}])
    on = {
        colour: open_data(DataRecipe(folder=tmp_path, background=colour))
        for colour in ("white", "#ffffff", "black")
    }
    assert len({data.fingerprint for data in on.values() if data is not None}) == 2
    black, white = on["black"], open_data(DataRecipe(folder=tmp_path))
    assert isinstance(black, FolderImages) and isinstance(white, FolderImages)  # noqa: PT018
    assert (black[0][0].getpixel((0, 0)), white[0][0].getpixel((0, 0))) == ((0,) * 3, (255,) * 3)
    with pytest.raises(ValueError, match="nocolour"):
        DataRecipe(folder=tmp_path, background="nocolour")


# -- what is said of all of it --------------------------------------------------------------------


def mixed(folder: Path) -> Path:
    """Pictures with everything that there is to say of them."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for n in range(8):
        picture(folder / f"{n}.png", colour=(30 * n, 0, 0))
        rows.append({"file_name": f"{n}.png", "text": f"a fox {n}"})
    rows[1]["text"], rows[2]["text"], rows[3]["text"] = LONG, None, ""
    picture(folder / "4.png", size=(10, 32))
    Image.new("RGBA", (32, 32)).save(folder / "5.png")
    Image.new("I;16", (32, 32)).save(folder / "6.png")
    picture(folder / "extra.png")
    return listed(folder, rows)


def test_a_survey_counts_everything(experts: list[Path], tmp_path: Path) -> None:
    limits = limits_of(afa.load_pipeline(experts[:1]))
    done: list[tuple[int, int]] = []
    data = FolderImages(mixed(tmp_path / "data"))
    found = survey(data, limits, 16, lambda *at: done.append(at))
    assert found.summary == (
        f"8 pictures, 1 broken, 2 without caption, 1 caption longer than {limits[0].num_tokens} "
        "tokens, 1 smaller than the resolution, 1 file not listed"
    )
    assert found.tally.counts == {
        Conversion.ALPHA: 1,
        Conversion.DEPTH: 1,
        Conversion.ENLARGED: 1,
    }
    assert done[-1] == (8, 8)
    assert len(found.warnings) == 5
    assert any("Empty captions: 1 picture" in line for line in found.warnings)
    assert any(line.startswith("Duplicates") for line in found.warnings)  # both are black


def test_captions_that_are_all_empty_are_warned_of() -> None:
    assert caption_warnings(["a", ""], []) == caption_warnings([], []) == []
    (warning,) = caption_warnings(["", " ", None], [])
    assert warning.startswith("All 2 captions are empty")


@pytest.mark.parametrize("cache", [True, False])
def test_a_training_says_all_of_it_once(experts: list[Path], tmp_path: Path, cache: bool) -> None:
    data: dict[str, Any] = {
        "folder": str(mixed(tmp_path / "data")),
        "cache": cache,
        "cache_folder": str(tmp_path / "cache"),
        "max_broken": 0.2,
        "resolution": 16,
    }
    changes: dict[str, Any] = {"num_steps": 8, "checkpoint_every": 50}
    asked = recipe(experts[:2], data, **changes)
    events = list(train(asked, tmp_path / "run"))
    notes = [note for event in events for note in event.notes]

    def said(text: str) -> int:
        return sum(text in note for note in notes)

    assert said("2.png' has no caption") == 1
    assert said("truncated to") == said("Square crops cut off") == 1
    assert said("1 of ") == 2
    assert said("does not use it: extra.png") == 1
    counts = ("1 with more than 8 bits", "1 transparent", "1 smaller than the resolution")
    assert [said(text) for text in counts] == [1, 1, 1]
    if cache:  # before the first step
        before = [note for e in events if isinstance(e, CacheProgress) for note in e.notes]
        assert any("1 transparent" in note for note in before)
    else:
        assert said("5.png' is the first picture transparent") == 1


def test_missing_captions_count_towards_max_broken(experts: list[Path], tmp_path: Path) -> None:
    for n in range(4):
        beside(tmp_path / "data" / f"{n}.png", None if n == 2 else "a fox")
    data = {"folder": str(tmp_path / "data"), "cache_folder": str(tmp_path / "cache")}
    with refusal("AFA-TRAIN-031", "1", "4", r"2\.png"):
        list(train(recipe(experts[:2], data), tmp_path / "run"))


def test_a_limit_keeps_what_the_folder_says(tmp_path: Path) -> None:
    for n in range(3):
        picture(tmp_path / f"{n}.png")
    listed(tmp_path, [{"file_name": f"{n}.png", "text": "a fox"} for n in range(2)])
    data = open_data(DataRecipe(folder=tmp_path, limit=1))
    assert isinstance(data, Part)
    found = survey(data)
    assert found.summary == "1 picture, 1 file not listed"
    assert any("2.png" in warning for warning in found.warnings)


def test_prompts_of_a_folder_say_what_training_says(tmp_path: Path) -> None:
    beside(tmp_path / "a.png", "a fox\na second line")
    (tmp_path / "notes.md").write_text("of no picture")
    asked = PromptsRecipe(folder=tmp_path)
    assert [prompt.text for prompt in load_prompts(asked)] == ["a fox"]
    assert source_warnings(asked) == FolderImages(tmp_path).warnings
    assert len(source_warnings(asked)) == 2


def test_a_listed_pipe_is_called_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    listed(tmp_path, [{"file_name": "x.png", "text": "a fox"}])
    with refusal("AFA-TRAIN-010", "x.png"):
        FolderImages(tmp_path)


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a link to nowhere"])
def test_a_list_that_cannot_be_read_is_not_passed_over(tmp_path: Path, kind: str) -> None:
    """Captions beside pictures would be taken in its place, which are others perhaps."""
    beside(tmp_path / "a.png", "a fox")
    place = tmp_path / "metadata.jsonl"
    if kind == "a folder":
        place.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / "nowhere")
    with refusal("AFA-TRAIN-007", "metadata.jsonl", "UTF-8"):
        FolderImages(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "a.png", "text": "a fox", "text": "a bee"}',
        '{"file_name": "a\\u0000.png", "text": "a fox"}',
    ],
)
def test_lines_that_could_mean_two_things_are_refused(tmp_path: Path, line: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with refusal("AFA-TRAIN-008", "1"):
        FolderImages(tmp_path)


def test_keys_of_a_list_that_nobody_uses_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    listed(tmp_path, [{"file_name": "a.png", "text": "a fox", "caption": "red", "mask": 1}])
    (warning,) = FolderImages(tmp_path).warnings
    assert warning.endswith("are used, not caption, mask.")


def test_captions_with_zero_bytes_are_utf_16(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_bytes("a fox".encode("utf-16-le"))
    with refusal("AFA-TRAIN-016", "a.txt", "UTF-8", "UTF-16"):
        FolderImages(tmp_path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    (tmp_path / name).symlink_to("nowhere")
    (tmp_path / name).with_suffix(".txt").write_text("a fox")
    data = FolderImages(tmp_path)
    with pytest.raises(BrokenSample):
        data[0]
    assert row_of(data.stored(0))[2] == bytes(16)
