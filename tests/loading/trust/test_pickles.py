"""Pickles: never loaded where one is not allowed, and then for their tensors alone."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import afa
from afa.cli import app
from afa.errors import AfaError
from afa.files import cache_folder
from afa.loading.trust.pickles import folder_as_safetensors
from afa.machine.hashes import hash_file
from afa.policy import trusting
from tests.cli.test_cli import AGGREGATOR, run
from tests.refusal import refusal
from tests.single_file import original_layout
from tests.tiny import tiny_pipeline

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


class Evil:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.place),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """Where something will be if a pickle was loaded."""
    return tmp_path / "pickle-was-loaded"


def evil(place: Path, trap: Path, kind: str = "torch") -> Path:
    if kind == "torch":
        torch.save({"state_dict": {"a": Evil(trap)}}, place)
    else:
        place.write_bytes(pickle.dumps({"state_dict": {"a": Evil(trap)}}))
    return place


@pytest.mark.parametrize("kind", ["torch", "plain"])
def test_the_trap_works(kind: str, tmp_path: Path, trap: Path) -> None:
    """Without this the tests below would say nothing."""
    place = evil(tmp_path / "evil.ckpt", trap, kind)
    if kind == "torch":
        torch.load(place, weights_only=False)
    else:
        pickle.loads(place.read_bytes())
    assert trap.exists()


@pytest.mark.parametrize("kind", ["torch", "plain"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_allowed_or_not_no_code_is_run(suffix: str, kind: str, tmp_path: Path, trap: Path) -> None:
    place = evil(tmp_path / f"evil{suffix}", trap, kind)
    with refusal("AFA-LOAD-096", "--allow-pickle"):
        afa.load_pipeline([place])
    with trusting(allow_pickle=True), refusal("AFA-LOAD-098"):
        afa.load_pipeline([place])
    assert not trap.exists()


def test_a_pickle_by_another_name(tmp_path: Path, trap: Path) -> None:
    place = evil(tmp_path / "evil.safetensors", trap)
    with trusting(allow_pickle=True), refusal("AFA-LOAD-092"):
        afa.load_pipeline([place])
    assert not trap.exists()


def recipes(experts: list[Path], wrong: Path) -> dict[str, dict[str, Any]]:
    """Recipes that name a pickle in every place that takes weights."""
    names, training = [str(expert) for expert in experts], {"num_steps": 1, "device": "cpu"}
    train: dict[str, Any] = {
        "experts": names,
        "data": {"scenes": {"num_samples": 4}},
        "aggregator": AGGREGATOR,
        "training": training,
    }
    lora = {"base": names[0], "lora": str(wrong)}
    zoo = {"zoo": {"kinds": {"mixed": 1}}}
    compare: dict[str, Any] = {
        "experts": names,
        "prompts": zoo,
        "methods": [{"name": "a", "model": str(wrong)}],
        "sampling": {"num_steps": 1, "device": "cpu"},
        "metrics": ["scenes"],
    }
    merge: dict[str, Any] = {"method": "weighted", "experts": [names[0], str(wrong)]}
    distill: dict[str, Any] = {
        "teacher": {"model": names[0]},
        "student": {"init": names[0]},
        "trajectories": {"prompts": zoo, "number": 1},
        "training": training,
    }
    return {
        "train expert": {**train, "experts": [names[0], str(wrong)]},
        "train lora": {**train, "experts": [names[0], lora]},
        "train vae": {**train, "vae": str(wrong)},
        "evaluate model": compare,
        "distill teacher": {**distill, "teacher": {"model": str(wrong)}},
        "distill lora": {**distill, "teacher": {"model": lora}},
        "distill student": {**distill, "student": {"init": str(wrong)}},
        "evaluate lora": {**compare, "methods": [{"name": "a", "model": [lora]}]},
        "evaluate expert": {
            **compare,
            "experts": [names[0], str(wrong)],
            "methods": [{"name": "a", "merge": {"method": "weighted"}}],
        },
        "evaluate metric": {
            **compare,
            "methods": [{"name": "a", "model": names[0]}],
            "metrics": [{"name": "fid", "weights": str(wrong)}],
        },
        "merge expert": merge,
        "merge base": {"method": "add_difference", "experts": names, "base": str(wrong)},
        "search expert": {
            "experts": [names[0], str(wrong)],
            "prompts": zoo,
            "sampling": {"num_steps": 1, "device": "cpu"},
            "metric": "scenes",
            "num_trials": 1,
        },
    }


@pytest.mark.fault(
    "a hostile pickle",
    "train, evaluate, merge, search, check",
    how="a pickle that creates a file when it is loaded, in every place, also with --allow-pickle",
    holds="exit code 2 and one line; the file is not created",
)
@pytest.mark.parametrize("allowed", [False, True])
def test_every_command_that_takes_a_recipe(
    allowed: bool,
    experts: list[Path],
    tmp_path: Path,
    trap: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = evil(tmp_path / "evil.ckpt", trap)
    for name, recipe in recipes(experts, wrong).items():
        command = name.split()[0]
        place = tmp_path / "recipe.yaml"
        place.write_text(yaml.safe_dump(recipe))
        options = ["--allow-pickle"] if allowed else []
        code = run(command, place, "--output", tmp_path / "output", *options)
        said = capsys.readouterr().err
        assert (code, trap.exists()) == (2, False), name
        if name == "evaluate metric" and allowed:  # it reads a state dictionary by itself
            assert "it requests " in said, said
        else:
            assert ("AFA-LOAD-098" if allowed else "is a pickle") in said, (name, said)
        assert len(said.splitlines()) == 1, name
        assert not (tmp_path / "output" / "aggregators.safetensors").exists()
        shutil.rmtree(tmp_path / "output", ignore_errors=True)
        assert run("check", place, *options) in (0, 2), name
        assert not trap.exists(), name
        capsys.readouterr()


@pytest.mark.fault(
    "a hostile pickle",
    "generate, weights, prune, app, inspect, check, export",
    how="the same pickle as the path itself, in an ensemble, and in a model folder",
    holds="exit code 2; the file is not created",
)
@pytest.mark.parametrize("options", [[], ["--allow-pickle"]])
def test_every_command_that_takes_a_model(
    options: list[str],
    experts: list[Path],
    tmp_path: Path,
    trap: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the path itself, and inside an ensemble's and a model's folder."""
    wrong = evil(tmp_path / "evil.ckpt", trap)
    train = {**recipes(experts, wrong)["train expert"], "experts": [str(e) for e in experts]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(train))
    ensemble = tmp_path / "ensemble"
    assert run("train", tmp_path / "recipe.yaml", "--output", ensemble) == 0
    config = json.loads((ensemble / "config.json").read_text())
    config["experts"][1]["source"] = str(wrong)
    (ensemble / "config.json").write_text(json.dumps(config))
    folder = Path(shutil.copytree(experts[0], tmp_path / "folder"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    evil(folder / "unet" / "diffusion_pytorch_model.bin", trap)
    output = tmp_path / "output"
    for arguments in (
        *(["generate", place, "a fox", "--output", output] for place in (wrong, ensemble, folder)),
        *(["weights", place, "--prompt", "x", "--output", output] for place in (wrong, ensemble)),
        *(["prune", place, "--output", output] for place in (wrong, ensemble)),
        *(["app", place, "--port", "0"] for place in (wrong, ensemble)),
        *(["inspect", place] for place in (wrong, folder)),
        *(["check", place] for place in (wrong, ensemble)),
        *(["export-checkpoint", place, "--output", output] for place in (wrong, folder)),
        *(
            ["export", p, "--output", tmp_path / "output.safetensors"]
            for p in (wrong, ensemble, folder)
        ),
        ["generate", ensemble, "a fox", "--plan", wrong, "--output", output],
        ["prune", ensemble, "--prompts", wrong, "--output", output],
        ["generate", "--from-image", wrong, "--output", output],
    ):
        capsys.readouterr()
        code = run(*arguments, *options)
        said = capsys.readouterr().err
        assert (code, trap.exists()) == (2, False), arguments
        if arguments[0] != "check" or wrong in arguments:  # what it finds is its answer
            assert len(said.splitlines()) == 1, (arguments, said)
        assert not output.exists(), arguments
        assert not output.with_suffix(".safetensors").exists(), arguments
    # these load no expert
    assert run("runs", tmp_path) == 0
    assert run("export-checkpoint", ensemble, "--output", output) == 0
    assert not trap.exists()


def test_no_command_is_left_out() -> None:
    """Those that read files of others are above; the rest write, from what is shipped."""
    named = {command.name for command in app.registered_commands}
    named |= {group.name for group in app.registered_groups}
    with_recipes = {"train", "distill", "evaluate", "merge", "search"}
    with_models = {"generate", "weights", "prune", "app", "inspect", "check", "export"}
    with_models |= {"runs", "export-checkpoint"}
    assert named - {"demo", "zoo"} == with_recipes | with_models


# -- what an honest pickle gives --------------------------------------------------------------


def test_a_checkpoint_draws_as_its_safetensors_twin(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "tokenizer")
    pipeline.save_pretrained(tmp_path / "config")
    tensors = original_layout(pipeline)
    # as training programs write them: nested, with numbers and texts beside
    torch.save({"state_dict": tensors, "epoch": 3, "note": "x"}, tmp_path / "model.ckpt")
    with trusting(allow_pickle=True):
        loaded = afa.load_pipeline([tmp_path / "model.ckpt"], config=tmp_path / "config")
    reference = loaded.unet.provenance.experts[0]
    assert reference.source == str(tmp_path / "model.ckpt")
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, loaded.unet.experts[0].get_parameter(name))
    with refusal("AFA-LOAD-096", "--allow-pickle"):
        afa.load_pipeline([tmp_path / "model.ckpt"], config=tmp_path / "config")


def test_a_folder_of_bin_files(experts: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(experts[0], tmp_path / "folder"))
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):  # in two shards
        place = unet.with_name(f"diffusion_pytorch_model-0000{number}-of-00002.bin")
        torch.save({name: tensors[name] for name in part}, place)
    unet.with_name("diffusion_pytorch_model.bin.index.json").write_text("{}")
    unet.unlink()
    text = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    with refusal("AFA-LOAD-101"):
        afa.load_pipeline([folder])
    with trusting(allow_pickle=True):
        loaded = afa.load_pipeline([folder])
    assert loaded.unet.provenance.experts[0].source == str(folder)
    own = afa.load_pipeline([experts[0]])
    for name, parameter in own.unet.experts[0].named_parameters():
        assert torch.equal(parameter, loaded.unet.experts[0].get_parameter(name))
    assert not list(folder.rglob("*.safetensors.tmp"))


def pickled_unet(folder: Path, files: dict[str, float]) -> Path:
    """A pipeline's folder whose U-Net is in pickles, `conv_in.weight` filled with these values."""
    part = folder / "unet"
    part.mkdir(parents=True)
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    (part / "config.json").write_text("{}")
    for name, value in files.items():
        torch.save({"conv_in.weight": torch.full((2,), value)}, part / name)
    return folder


def value_read(folder: Path) -> float:
    with trusting(allow_pickle=True):
        (file,) = (folder_as_safetensors(folder) / "unet").glob("*.safetensors")
    return float(load_file(file)["conv_in.weight"][0])


W = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("names", "main"),
    [
        ([f"{W}.bin", f"{W}.non_ema.bin", f"{W}.fp16.bin"], f"{W}.bin"),
        ([f"{W}.non_ema.bin", f"{W}.fp16.bin"], f"{W}.fp16.bin"),
        ([f"{W}.bin", "training_args.bin", "optimizer.bin"], f"{W}.bin"),
        ([f"{W}.bin", f"{W}-00001-of-00001.bin"], f"{W}.bin"),
        ([f"{W}-00001-of-00001.bin", f"{W}.non_ema.bin"], f"{W}-00001-of-00001.bin"),
        ([f"{W}-00001-of-00001.bin", f"{W}-00001-of-00001.fp16.bin"], f"{W}-00001-of-00001.bin"),
        ([f"{W}.bin", "pytorch_model.bin"], f"{W}.bin"),
        (["pytorch_model.bin"], "pytorch_model.bin"),
    ],
)
def test_the_main_weights_of_several_are_read(names: list[str], main: str, tmp_path: Path) -> None:
    values = {name: float(number) for number, name in enumerate(names)}
    assert value_read(pickled_unet(tmp_path / "folder", values)) == values[main]


@pytest.mark.parametrize(
    ("files", "code", "value"),
    [
        ({"unet_ema.bin": 1.0}, "AFA-LOAD-093", "unet_ema.bin"),
        ({f"{W}-00001-of-00002.bin": 1.0}, "AFA-LOAD-094", "00001-of-00002"),
        (
            {f"{W}-00001-of-00002.bin": 1.0, f"{W}-00002-of-00002.bin": 2.0},
            "AFA-LOAD-095",
            "'conv_in.weight'",
        ),
        (
            {f"{W}-00001-of-00002.bin": 1.0, f"{W}-00002-of-00003.bin": 2.0},
            "AFA-LOAD-094",
            "00002-of-00003",
        ),
    ],
)
def test_pickles_that_leave_open_what_the_weights_are(
    files: dict[str, float], code: str, value: str, tmp_path: Path
) -> None:
    folder = pickled_unet(tmp_path / "folder", files)
    with trusting(allow_pickle=True), refusal(code, value):
        folder_as_safetensors(folder)


def test_a_copy_that_mixed_variants_is_not_used_again(tmp_path: Path) -> None:
    folder = pickled_unet(tmp_path / "folder", {f"{W}.bin": 1.0, f"{W}.non_ema.bin": 2.0})
    digest = hashlib.sha256()  # as copies were named before they had a version
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(f"{hash_file(file)}  {file.relative_to(folder).as_posix()}\n".encode())
    old = cache_folder() / "from-pickles" / digest.hexdigest() / "unet"
    old.mkdir(parents=True)
    save_file({"conv_in.weight": torch.full((2,), 2.0)}, old / f"{W}.safetensors")
    assert value_read(folder) == 1.0


def test_pickles_beside_a_models_parts_are_left_alone(tmp_path: Path) -> None:
    folder = pickled_unet(tmp_path / "folder", {f"{W}.bin": 1.0})
    (folder / "checkpoint-500").mkdir()
    torch.save({"state": 1}, folder / "checkpoint-500" / "optimizer.bin")
    assert value_read(folder) == 1.0


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}, {"state_dict": {}}])
def test_a_pickle_without_tensors(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    with trusting(allow_pickle=True), refusal("AFA-LOAD-099"):
        afa.load_pipeline([tmp_path / "model.ckpt"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04.", b"x" * 100])
def test_a_damaged_pickle(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(content)
    with trusting(allow_pickle=True), pytest.raises(AfaError, match=r"model\.ckpt' ") as error:
        afa.load_pipeline([tmp_path / "model.ckpt"])
    assert "\n" not in str(error.value)


def test_a_lora_in_a_pickle(experts: list[Path], tmp_path: Path, trap: Path) -> None:
    lora = {"base": str(experts[0]), "lora": str(evil(tmp_path / "evil.pt", trap))}
    with refusal("AFA-LOAD-096"):
        afa.load_pipeline([experts[1], lora])
    with trusting(allow_pickle=True), refusal("AFA-LOAD-098"):
        afa.load_pipeline([experts[1], lora])
    assert not trap.exists()
