"""Data in the forms in which people keep it: kohya, SimpleTuner, diffusers, archives and lists."""

from __future__ import annotations

import csv
import json
import os
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from pydantic import ValidationError

from afa.policy import trusting
from afa.reading import BrokenSample
from afa.training.data import CaptionOptions, FolderImages, open_data, open_dataset, remote
from afa.training.data.images import repeated
from afa.training.listing import digest_of
from afa.training.recipe import DataRecipe, DatasetRecipe, load_recipe
from tests.refusal import refusal

ALL = CaptionOptions(several=True)


def picture(place: Path, colour: Any = "red", size: tuple[int, int] = (8, 8)) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(place)
    return place


def pictures(folder: Path, *names: str) -> Path:
    for n, name in enumerate(names):
        picture(folder / name, (40 * n, 9, 9))
    return folder


def as_csv(place: Path, *rows: tuple[str, ...]) -> Path:
    with place.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return place


def as_parquet(place: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), place)
    return place


def read(place: Path, options: CaptionOptions | None = None) -> dict[str, tuple[str, ...]]:
    """The captions of each picture by its file name, all of which can be read."""
    data = FolderImages(place, options=options)
    samples = [data.sample(n) for n in range(len(data))]
    assert [captions for _, captions in samples] == list(data.captions())
    return {Path(data.name(n)).name: captions for n, (_, captions) in enumerate(samples)}


# -- lists of a folder ----------------------------------------------------------------------------


def test_metadata_csv_keeps_every_text_as_it_is(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    rows = [("a.png", 'a "fox", red'), ("b.png", "null"), ("c.png", "1")]
    as_csv(tmp_path / "metadata.csv", ("file_name", "prompt"), *rows)
    assert read(tmp_path) == {name: (text,) for name, text in rows}


def test_metadata_parquet_has_lists_of_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    as_parquet(
        tmp_path / "metadata.parquet",
        file_name=["a.png", "b.png"],
        caption=[["a fox", "an animal", "a fox"], ["a bee"]],
    )
    assert read(tmp_path, ALL) == {"a.png": ("a fox", "an animal"), "b.png": ("a bee",)}
    (warning,) = FolderImages(tmp_path).warnings
    assert "1 picture in " in warning
    assert "data.captions: random" in warning


def test_a_column_is_named_if_two_could_be_meant(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    as_csv(tmp_path / "metadata.csv", ("file_name", "caption", "prompt"), ("a.png", "x", "y"))
    with refusal("AFA-TRAIN-063", "caption, prompt", "data.caption_column"):
        FolderImages(tmp_path)
    assert read(tmp_path, CaptionOptions(columns=("prompt",))) == {"a.png": ("y",)}
    both = CaptionOptions(columns=("prompt", "caption"), several=True)
    assert read(tmp_path, both) == {"a.png": ("y", "x")}
    with refusal("AFA-TRAIN-076", "'words'", "file_name, caption, prompt"):
        FolderImages(tmp_path, options=CaptionOptions(columns=("words",)))


@pytest.mark.parametrize(
    ("header", "code", "said"),
    [
        (("file_name", "label"), "AFA-TRAIN-075", "file_name, label"),
        (("id", "text"), "AFA-TRAIN-062", "data.file_column"),
    ],
)
def test_a_list_without_paths_or_captions_names_its_columns(
    tmp_path: Path, header: tuple[str, ...], code: str, said: str
) -> None:
    pictures(tmp_path, "a.png")
    as_csv(tmp_path / "metadata.csv", header, ("a.png", "x"))
    with refusal(code, said):
        FolderImages(tmp_path)


def test_two_lists_in_one_folder(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    as_csv(tmp_path / "metadata.csv", ("file_name", "text"), ("a.png", "of the csv"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    with refusal("AFA-TRAIN-064", "metadata.jsonl and metadata.csv"):
        FolderImages(tmp_path)
    assert read(tmp_path / "metadata.csv") == {"a.png": ("of the csv",)}


def test_lists_of_subfolders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pictures(tmp_path / name, f"{name}.png")
        as_csv(tmp_path / name / "metadata.csv", ("file_name", "text"), (f"{name}.png", name))
    picture(tmp_path / "else.png")
    assert read(tmp_path) == {"one.png": ("one",), "two.png": ("two",)}
    (warning,) = FolderImages(tmp_path).warnings
    assert "1 file in " in warning
    assert "else.png" in warning


def test_the_training_split_is_used_and_others_are_named(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        pictures(tmp_path / split, f"{split}.png")
        as_csv(tmp_path / split / "metadata.csv", ("file_name", "text"), (f"{split}.png", split))
    (tmp_path / "README.md").write_text("of the data set")
    assert read(tmp_path) == {"train.png": ("train",)}
    warnings = FolderImages(tmp_path).warnings
    assert any("is used, not 'test' and 'validation'" in line for line in warnings)
    assert any("README.md" in line for line in warnings)


def test_a_training_split_with_captions_beside(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / split / f"{split}.png").with_suffix(".txt").write_text(split)
    assert read(tmp_path) == {"train.png": ("train",)}


# -- lists elsewhere ------------------------------------------------------------------------------


def test_kohyas_json_has_captions_and_tags_by_path(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    content = {
        "a": {"caption": "a fox", "tags": "red, outdoors", "train_resolution": [8, 8]},
        "b.png": {"tags": "bee"},
        str(tmp_path / "c.png"): {"caption": "an owl"},
    }
    place = tmp_path / "meta_cap.json"
    place.write_text(json.dumps(content))
    found = {"a.png": ("a fox, red, outdoors",), "b.png": ("bee",), "c.png": ("an owl",)}
    assert read(place) == found
    assert read(tmp_path) == found  # the only list of the folder
    (warning,) = FolderImages(place).warnings
    assert "caption and tags of" in warning
    assert "not train_resolution" in warning


@pytest.mark.parametrize(
    "content",
    [
        {"a.png": "a fox"},
        {"a.png": ["a fox"]},
        [{"image": "./a.png", "caption": "a fox"}],
        [{"path": "a.png", "text": "a fox", "more": 1}],
    ],
)
def test_other_json(tmp_path: Path, content: Any) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "list.json").write_text(json.dumps(content))
    assert read(tmp_path / "list.json") == {"a.png": ("a fox",)}


def test_simpletuners_parquet(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "7.png", "8.png")
    place = as_parquet(tmp_path / "list.parquet", id=["images/7", "images/8"], caption=["x", "y"])
    named = CaptionOptions(file_column="id")
    assert read(place, named) == {"7.png": ("x",), "8.png": ("y",)}
    picture(tmp_path / "images" / "7.jpg")
    with refusal("AFA-TRAIN-072", r"7\.jpg", r"7\.png"):
        FolderImages(place, options=named)


def test_lists_made_on_windows(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "a.png")
    place = as_csv(tmp_path / "list.csv", ("path", "caption"), ("images\\a.png", "a fox"))
    assert read(place) == {"a.png": ("a fox",)}


def test_a_list_names_pictures_elsewhere_only_with_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures(tmp_path / "lists", "b.png"))
    monkeypatch.delenv("AFA_FOLDERS")
    outside = picture(tmp_path / "outside" / "a.png")
    place = as_csv(tmp_path / "lists" / "l.csv", ("path", "caption"), (str(outside), "a fox"))
    with refusal("AFA-POLICY-001", "outside", "--allow-folder"):
        FolderImages(place)
    with trusting(folders=[tmp_path]):
        assert read(place) == {"a.png": ("a fox",)}
    as_csv(place, ("path", "caption"), ("../outside/a.png", "a fox"))
    with refusal("AFA-POLICY-001", "outside"):
        FolderImages(place)
    shutil.move(place, place.with_name("metadata.csv"))
    with refusal("AFA-TRAIN-009", "outside"):
        FolderImages(tmp_path / "lists")


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("l.csv", "path;caption\na.png;x\n", "AFA-TRAIN-065", "no comma"),
        ("l.csv", "path,caption\na.png,x,y\n", "AFA-TRAIN-065", "line 2 has 3 values"),
        ("l.csv", "path,path,caption\n", "AFA-TRAIN-065", "twice"),
        ("l.csv", "path,caption\n", "AFA-TRAIN-012", "empty"),
        ("l.csv", "path,caption\nhttps://x.org/a.png,x\n", "AFA-TRAIN-066", "Line 2.*https"),
        ("l.csv", "path,caption\nb.png,x\n", "AFA-TRAIN-011", "b.png"),
        ("l.csv", "path,image,caption\na.png,a.png,x\n", "AFA-TRAIN-063", "path, image"),
        ("l.json", '{"a": 1}', "AFA-TRAIN-065", "meta|file_name"),
        ("l.json", '[{"path": "a.png", "caption": 7}]', "AFA-TRAIN-066", "Entry 1.*7"),
        ("l.json", '{"a.png": {"caption": "x", "tags": 7}}', "AFA-TRAIN-066", "'a.png'.*tags"),
        ("l.jsonl", '{"path": "a.png", "caption": {"a": 1}}', "AFA-TRAIN-008", "Line 1"),
        ("l.parquet", "no parquet", "AFA-TRAIN-065", "parquet"),
        ("l.toml", "x", "AFA-TRAIN-069", "image_dir"),
        (
            "l.json",
            '[{"id": "a", "instance_data_dir": "pics", "caption_strategy": "textfile"}]',
            *("AFA-TRAIN-101", "'a', set data.folder: 'pics'"),
        ),
        (
            "l.json",
            '[{"id": "a", "instance_data_dir": "pics", "caption_strategy": "parquet", "parquet": '
            '{"path": "l.parquet", "filename_column": "id", "caption_column": "words"}}]',
            *("AFA-TRAIN-101", "'l.parquet', data.file_column: id and data.caption_column: words"),
        ),
        ("l.tar", "x", "AFA-TRAIN-069", "webdataset"),
        ("l.doc", "x", "AFA-TRAIN-069", "a folder, a .zip, or a list"),
        ("l.zip", "x", "AFA-TRAIN-077", "zip archive"),
    ],
)
def test_what_is_not_understood_is_named(
    tmp_path: Path, name: str, content: str, code: str, said: str
) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / name).write_text(content)
    with refusal(code, said):
        FolderImages(tmp_path / name)


def test_a_list_that_is_not_beside_its_pictures_says_where_they_are(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", "7.png")
    place = as_parquet(tmp_path / "l.parquet", id=["7"], text=["a fox"])
    with refusal("AFA-TRAIN-011", r"'.*pictures/7\.png' has that name"):
        FolderImages(place, options=CaptionOptions(file_column="id"))


def test_parquet_with_pictures_inside(tmp_path: Path) -> None:
    content = picture(tmp_path / "a.png").read_bytes()
    place = as_parquet(tmp_path / "l.parquet", image=[{"bytes": content}], text=["a fox"])
    with refusal("AFA-TRAIN-065", "data.dataset: {path: parquet"):
        FolderImages(place)
    found = open_dataset(DatasetRecipe(path="parquet", data_files=[str(place)]), None)
    assert len(found) == 1  # type: ignore[arg-type]


# -- kohya's folders ------------------------------------------------------------------------------


def kohya(folder: Path) -> Path:
    pictures(folder / "10_sks dog", "a.png", "b.png")
    pictures(folder / "5_cat", "c.png")
    (folder / "10_sks dog" / "a.txt").write_text("a dog\n\nan animal\n")
    return folder


def test_repeats_are_honoured_by_choice(tmp_path: Path) -> None:
    kohya(tmp_path)
    data = FolderImages(tmp_path)
    assert repeated(data, range(3)) == range(3)
    assert any("set data.repeats: true" in line for line in data.warnings)
    honoured = open_data(DataRecipe(folder=tmp_path, repeats=True))
    assert isinstance(honoured, FolderImages)
    assert repeated(honoured, range(3)) == [0, 0, 1, 1, 2]  # 10 to 5
    assert not any("repeats" in line for line in honoured.warnings)
    assert digest_of(honoured) == digest_of(data)


def test_names_of_folders_are_captions_by_choice(tmp_path: Path) -> None:
    kohya(tmp_path)
    data = FolderImages(tmp_path)
    assert any("'sks dog', set data.folder_captions: true" in line for line in data.warnings)
    with pytest.raises(BrokenSample):
        data[1]
    options = CaptionOptions(from_folders=True, several=True)
    assert read(tmp_path, options) == {
        "a.png": ("a dog", "an animal"),
        "b.png": ("sks dog",),
        "c.png": ("cat",),
    }
    pictures(tmp_path / "plain", "a.png")
    with refusal("AFA-TRAIN-014", "data.folder_captions needs subfolders"):
        FolderImages(tmp_path / "plain", options=options)
    shutil.rmtree(tmp_path / "plain")
    (tmp_path / "10_sks dog" / "a.txt").unlink()
    with refusal("AFA-TRAIN-014", "'sks dog', set data.folder_captions: true"):
        FolderImages(tmp_path)
    assert read(tmp_path, options)["a.png"] == ("sks dog",)


@pytest.mark.parametrize("key", ["repeats", "from_folders"])
def test_folder_options_are_refused_for_lists(tmp_path: Path, key: str) -> None:
    pictures(tmp_path, "a.png")
    as_csv(tmp_path / "metadata.csv", ("file_name", "text"), ("a.png", "x"))
    options = CaptionOptions(**{key: True})  # type: ignore[arg-type]
    for place in (tmp_path, tmp_path / "metadata.csv"):
        with refusal("AFA-TRAIN-073", "metadata.csv"):
            FolderImages(place, options=options)


def test_columns_are_refused_without_a_list(tmp_path: Path) -> None:
    kohya(tmp_path)
    with refusal("AFA-TRAIN-073", "data.caption_column"):
        FolderImages(tmp_path, options=CaptionOptions(columns=("text",)))


@pytest.mark.parametrize(
    "section",
    [
        {"scenes": {}, "repeats": True},
        {"scenes": {}, "captions": "random"},
        {"dataset": {"path": "x"}, "caption_column": "text"},
        {"dataset": {"path": "x"}, "folder_captions": True},
        {"folder": "x", "caption_column": []},
    ],
)
def test_keys_without_an_effect_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataRecipe.model_validate(section)


def test_hints_at_what_a_folder_has(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "data.zip").write_bytes(b"")
    with refusal("AFA-TRAIN-014", r"set data.folder: '.*data\.zip'"):
        FolderImages(tmp_path / "a")
    (tmp_path / "b").mkdir()
    as_parquet(tmp_path / "b" / "1.parquet", image=[b"x"])
    as_parquet(tmp_path / "b" / "2.parquet", image=[b"x"])
    with refusal("AFA-TRAIN-014", r"\{path: parquet, data_files: '.*/b/\*\*/\*\.parquet'\}"):
        FolderImages(tmp_path / "b")


# -- archives -------------------------------------------------------------------------------------


def zipped(place: Path, folder: Path) -> Path:
    return Path(shutil.make_archive(str(place), "zip", folder.parent, folder.name))


def test_a_zip_is_read_as_its_folder(tmp_path: Path) -> None:
    kohya(tmp_path / "set")
    picture(tmp_path / "set" / "__MACOSX" / "a.png")
    archive = zipped(tmp_path / "set", tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "__MACOSX")
    options = CaptionOptions(from_folders=True, several=True, repeats=True)
    assert read(archive, options) == read(tmp_path / "set", options)
    inside, outside = (FolderImages(p, options=options) for p in (archive, tmp_path / "set"))
    assert digest_of(inside) == digest_of(outside)
    assert repeated(inside, range(3)) == repeated(outside, range(3)) == [0, 0, 1, 1, 2]
    with refusal("AFA-TRAIN-074", "nowhere", "no such folder"):
        FolderImages(archive / "nowhere")


def test_parts_and_lists_of_a_zip(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pictures(tmp_path / "set" / split, f"{split}.png")
        as_csv(
            tmp_path / "set" / split / "metadata.csv", ("file_name", "text"), (f"{split}.png", "x")
        )
    archive = zipped(tmp_path / "set", tmp_path / "set")
    assert read(archive) == {"train.png": ("x",)}
    assert read(archive / "set" / "test") == {"test.png": ("x",)}
    assert read(archive / "set" / "test" / "metadata.csv") == {"test.png": ("x",)}


def written(place: Path, *members: tuple[Any, bytes]) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        for member, content in members:
            archive.writestr(member, content)
    return place


@pytest.mark.parametrize("name", ["../a.txt", "/etc/a.txt", "a/../../b.txt", "link", "twice"])
def test_a_zip_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    members: list[tuple[Any, bytes]] = [(name, b"x")]
    if name == "link":
        link = zipfile.ZipInfo("a.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        members = [(link, b"/etc/passwd")]
    elif name == "twice":
        members = [("a.txt", b"x"), ("./a.txt", b"y")]
    with refusal("AFA-TRAIN-067", "Unpack it"):
        FolderImages(written(tmp_path / "x.zip", *members))
    assert os.listdir(tmp_path) == ["x.zip"]


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afa.training.data.places._MAX_PICTURE", 100)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(101))
        archive.writestr("a.txt", "a fox")
    data = FolderImages(tmp_path / "x.zip")
    with refusal("AFA-TRAIN-068", "101 bytes, the maximum is 100", kind=BrokenSample):
        data[0]
    assert data.stored(0).picture != data.stored(0).caption  # no error: it is reported when read


def test_a_damaged_file_of_a_zip_is_a_broken_sample(tmp_path: Path) -> None:
    content = picture(tmp_path / "a.png").read_bytes()
    place = written(tmp_path / "x.zip", ("a.png", content), ("a.txt", b"a fox"))
    place.write_bytes(place.read_bytes().replace(content[-20:], bytes(20), 1))
    with refusal("AFA-TRAIN-068", "CRC", kind=BrokenSample):
        FolderImages(place)[0]


# -- addresses ------------------------------------------------------------------------------------


def test_addresses_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kohya(tmp_path / "repository" / "data")
    archive = zipped(tmp_path / "repository" / "set", tmp_path / "repository" / "data")
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tmp_path / "repository")

    def download(name: str, file: str, **options: Any) -> str:
        asked.append({"name": name, "file": file, **options})
        return str(archive)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    common = {"repo_type": "dataset", "local_files_only": False}
    folder = remote.located("hf://datasets/me/set@v1/data")
    assert folder == tmp_path / "repository" / "data"
    assert asked.pop() == {
        "name": "me/set",
        "revision": "v1",
        "allow_patterns": ["data/**"],
        **common,
    }
    assert remote.located("hf://datasets/me/set/set.zip") == archive
    assert asked.pop() == {"name": "me/set", "file": "set.zip", "revision": None, **common}
    data = open_data(DataRecipe(folder="hf://datasets/me/set/data"))
    assert isinstance(data, FolderImages)
    assert data.source.startswith("'hf://datasets/me/set/data'")
    with trusting(offline=True):
        remote.located("hf://datasets/me/set")
    assert asked.pop()["local_files_only"] is True
    with refusal("AFA-TRAIN-079", "has no 'nothing'"):
        remote.located("hf://datasets/me/set/nothing")


@pytest.mark.parametrize(
    "address", ["s3://bucket/set", "https://x.org/a.zip", "hf://datasets/only", "ftp://x/a.zip"]
)
def test_addresses_that_are_not_understood(address: str) -> None:
    with refusal("AFA-TRAIN-070", "hf://datasets/user/name"):
        open_data(DataRecipe(folder=address))


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with refusal("AFA-TRAIN-078", "ConnectionError: no route"):
        remote.located("hf://datasets/me/set")
    with trusting(offline=True), refusal("AFA-TRAIN-078", "offline"):
        remote.located("hf://datasets/me/set")


def test_an_address_in_a_recipe_stays_one(tmp_path: Path) -> None:
    place = tmp_path / "r.yaml"
    place.write_text(
        "experts: ['zoo:animals']\ntraining: {num_steps: 1}\n"
        "data: {folder: 'hf://datasets/me/set'}\nvalidation: {folder: ./val}\n"
    )
    recipe = load_recipe(place)
    assert recipe.data.folder == "hf://datasets/me/set"
    assert recipe.validation is not None
    assert recipe.validation.folder == tmp_path / "val"
    assert recipe.model_dump(mode="json")["data"]["folder"] == "hf://datasets/me/set"


# -- data sets of the library ---------------------------------------------------------------------


def test_columns_of_data_sets_are_found_by_name(tmp_path: Path) -> None:
    content = picture(tmp_path / "a.png").read_bytes()
    place = as_parquet(tmp_path / "l.parquet", img=[content], prompt=[["a fox", "an animal"]])
    asked = DatasetRecipe(path="parquet", data_files=[str(place)])
    data = open_dataset(asked, None, several=True)
    assert list(data.captions()) == [("a fox", "an animal")]  # type: ignore[union-attr]
    as_parquet(place, img=[content], prompt=["a fox"], caption=["an owl"])
    with refusal("AFA-TRAIN-018", "img, prompt, caption"):
        open_dataset(asked, None)
    named = asked.model_copy(update={"caption_column": ["prompt", "caption"]})
    first = open_dataset(named.model_copy(update={"image_column": "img"}), None)
    assert list(first.captions()) == [("a fox",)]  # type: ignore[union-attr]
    (warning,) = first.warnings
    assert "data.captions: random" in warning
