"""The command line: what each command leaves behind, and one line and exit code 2 for mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import afa
from afa.cli import main
from afa.drafting import OwnDrafts
from afa.drafting.own import keep_drafts
from afa.drawing.recorded import read_picture
from afa.loading.expert_source import ExpertSource
from afa.loading.single_file.load import Companions
from afa.loading.vocabulary import write_words
from tests.tiny import tiny_pipeline

pytestmark = pytest.mark.slow

AGGREGATOR = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "norm_num_groups": 4}
COMMANDS = (
    *("train", "generate", "app", "weights", "inspect", "merge", "search", "evaluate", "demo"),
    *("zoo build", "zoo export", "zoo results"),
)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def write_recipe(folder: Path, experts: list[Path], **changes: Any) -> Path:
    recipe = {
        "experts": [str(expert) for expert in experts],
        "data": {"scenes": {"num_samples": 10}},
        "aggregator": AGGREGATOR,
        "training": {"num_steps": 2, "batch_size": 2, "device": "cpu"},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def trained(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert run("train", write_recipe(folder, experts), "--output", folder / "ensemble") == 0
    return folder / "ensemble"


@pytest.fixture
def ensemble(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "ensemble")


def test_train_writes_an_ensemble_and_goes_on(
    ensemble: Path, experts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"config.json", "aggregators.safetensors", "README.md"} <= {
        file.name for file in ensemble.iterdir()
    }
    longer = {"num_steps": 3, "batch_size": 2, "device": "cpu"}
    recipe = write_recipe(ensemble.parent, experts, training=longer)
    assert run("train", recipe, "--output", ensemble) == 0
    assert "3/3" in capsys.readouterr().out


def test_generate_writes_pictures_with_their_settings(ensemble: Path, tmp_path: Path) -> None:
    output = tmp_path / "pictures"
    command = ["generate", ensemble, "A fox!", "a bee", "--output", output, "--steps", 2]
    assert run(*command, "--num-images", 2, "--seed", 5, "--guidance", 3, "--weights") == 0
    assert sorted(file.name for file in output.iterdir()) == [
        "00-a-fox-seed5-weights.png",
        "00-a-fox-seed5.png",
        "00-a-fox-seed6-weights.png",
        "00-a-fox-seed6.png",
        "01-a-bee-seed5-weights.png",
        "01-a-bee-seed5.png",
        "01-a-bee-seed6-weights.png",
        "01-a-bee-seed6.png",
    ]
    with Image.open(output / "00-a-fox-seed6.png") as picture:
        settings = json.loads(picture.info["afa"])["recipe"]
    assert settings["prompt"] == "A fox!"
    assert (settings["seed"], settings["steps"], settings["guidance"]) == (6, 2, 3)


@pytest.mark.nightly
def test_generate_weighted_prompts(
    ensemble: Path, experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, weighted = "a (fox:1.3) BREAK [a pizza]", ("--prompt-syntax", "weighted")
    asked = ("generate", ensemble, prompt, "--steps", 1, "--device", "cpu")
    assert run(*asked, *weighted, "--output", tmp_path / "weighted") == 0
    assert "as words" not in capsys.readouterr().out
    assert run(*asked, "--output", tmp_path / "plain") == 0
    assert "warning: '(fox:1.3)' is drawn as words" in " ".join(capsys.readouterr().out.split())
    (picture,), (plain,) = ((tmp_path / n).glob("*.png") for n in ("weighted", "plain"))
    made = read_picture(picture)
    assert (made.recipe.prompt, made.recipe.prompt_syntax) == (prompt, "weighted")
    assert made.pixels != read_picture(plain).pixels
    assert run("generate", "--from-image", picture, "--output", tmp_path / "again") == 0
    (again,) = (tmp_path / "again").glob("*.png")
    assert read_picture(again).pixels == made.pixels

    new = ("--output", tmp_path / "new")
    for changes, code in (
        ((ensemble, "a [fox|bee]", *weighted), "AFA-DRAW-038"),
        ((ensemble, "a fox", *weighted, "--negative-prompt", "(a"), "AFA-DRAW-036"),
        ((ensemble, "a fox", "--prompt-syntax", "compel"), "AFA-CLI-008"),
    ):
        assert run("generate", *changes, *new) == 2
        assert code in capsys.readouterr().err
    small = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)
    fused = afa.load_pipeline([experts[0]] * 2, small, fuse="predictions", allow_duplicates=True)
    folder = afa.save_ensemble(fused, tmp_path / "fused")
    assert run("generate", folder, "a fox", *weighted, *new, "--no-check") == 2
    assert "AFA-ENSEMBLE-075" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_generate_takes_a_speed_and_a_plan(
    ensemble: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, plan = tmp_path / "prompts.txt", tmp_path / "plans" / "plan.json"
    prompts.write_text("a fox\na bee\n")
    command = ["prune", ensemble, "--keep", 0.5, "--steps", 3, "--ranges", 2, "--prompts", prompts]
    assert run(*command, "--output", plan) == 0
    assert "of the expert evaluations remain" in " ".join(capsys.readouterr().out.split())
    pictures = {}
    speeds: dict[str, list[Any]] = {
        "exact": [],
        "fast": ["--speed", "fast"],
        "pruned": ["--plan", plan],
        "both": ["--speed", "fast", "--plan", plan],
    }
    for name, options in speeds.items():
        output = tmp_path / name
        assert run("generate", ensemble, "a fox", "--output", output, "--steps", 20, *options) == 0
        with Image.open(output / "00-a-fox-seed0.png") as picture:
            pictures[name] = picture.tobytes()
            settings = json.loads(picture.info["afa"])["recipe"]
        assert ("acceleration" in settings) == (name in ("fast", "both"))
        assert ("plan" in settings) == (name in ("pruned", "both"))
    assert len(set(pictures.values())) == 4


def test_generate_makes_a_picture_again(
    ensemble: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["--steps", 3, "--seed", 9, "--bias", "1=+2", "--bias", "0@up=-1", "--weights"]
    assert run("generate", ensemble, "a fox", "--output", first, *options) == 0
    picture = first / "00-a-fox-seed9.png"
    asked = ("generate", "--from-image", picture, "--output", again, "--weights", "--allow-pickle")
    assert run(*asked) == 0
    assert "The picture is identical, bit for bit." in capsys.readouterr().out
    assert {file.name for file in again.iterdir()} == {file.name for file in first.iterdir()}
    one, other = (Image.open(folder / picture.name) for folder in (first, again))
    assert one.tobytes() == other.tobytes()
    assert one.info["afa"] == other.info["afa"]

    moved = tmp_path / "moved"
    ensemble.rename(moved)
    new = tmp_path / "new"
    for command, code, value in [
        (("--from-image", picture), "AFA-DRAW-004", str(ensemble)),
        (("--from-image", picture, "--steps", 3), "AFA-CLI-012", "--steps"),
        (("--from-image", picture, "--compile"), "AFA-CLI-012", "--compile"),
        (("--from-image", picture, "--no-check"), "AFA-CLI-012", "--check"),
        ((moved, "a fox", "--from-image", picture), "AFA-CLI-012", "prompts"),
        ((moved, "a fox", "--bias", "fox"), "AFA-ENSEMBLE-056", "'fox'"),
        ((moved, "a fox", "--bias", "fox=1"), "AFA-ENSEMBLE-055", "'fox'"),
        ((moved,), "AFA-CLI-007", "--from-image"),
        ((), "AFA-CLI-007", "--from-image"),
        ((moved, "a" * 20_001), "AFA-DRAW-002", "20000"),
    ]:
        line = fails(capsys, "generate", *command, "--output", new)
        assert code in line
        assert value in line
    assert not new.exists()
    assert run("generate", moved, "--from-image", picture, "--output", new) == 0


@pytest.mark.nightly
def test_weights_draws_figures(
    ensemble: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, figures = tmp_path / "pictures", tmp_path / "figures"
    assert run("generate", ensemble, "a fox", "--output", pictures, "--steps", 2) == 0
    picture = pictures / "00-a-fox-seed0.png"
    assert run("weights", picture, "--output", figures) == 0
    kinds = ("sites", "places", "steps")
    assert {f.name for f in figures.iterdir()} == {f"00-a-fox-seed0-{k}.png" for k in kinds}
    others = tmp_path / "others"
    options = ["--prompt", "a fox", "--prompt", "a bee", "--steps", 2]
    assert (
        run("weights", ensemble, *options, "--format", "svg", "--format", "png", "--output", others)
        == 0
    )
    names = {f"00-a-fox-{k}" for k in kinds} | {f"01-a-bee-{k}" for k in kinds} | {"comparison"}
    assert {f.stem for f in others.iterdir()} == names
    assert len(list(others.iterdir())) == 14
    new = tmp_path / "new"
    for command, code, value in [
        ((ensemble,), "AFA-CLI-021", "--prompt TEXT"),
        ((ensemble, picture), "AFA-CLI-019", str(picture)),
        ((ensemble, ensemble), "AFA-CLI-019", str(ensemble)),
        ((picture, "--prompt", "a fox"), "AFA-CLI-020", "--prompt"),
        ((picture, "--no-drafts"), "AFA-CLI-020", "--no-drafts"),
        ((picture, "--format", "jpg"), "AFA-CLI-018", "'jpg'"),
        ((others / "comparison.png",), "AFA-DRAW-007", "comparison.png"),
    ]:
        line = fails(capsys, "weights", *command, "--output", new)
        assert code in line
        assert value in line
    assert not new.exists()


def test_what_prune_and_speed_refuse(
    ensemble: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.json"
    there.write_text("{}")
    output = tmp_path / "new"
    drawing = ("generate", ensemble, "a fox", "--output", output)
    pruning = ("prune", ensemble, "--output")
    for command, code, value in [
        ((*drawing, "--speed", "quick"), "AFA-ENSEMBLE-015", "'quick'"),
        ((*drawing, "--plan", there), "AFA-ENSEMBLE-011", "num_experts"),
        ((*pruning, there), "AFA-CLI-014", "there.json"),
        ((*pruning, output), "AFA-CLI-016", "--prompts"),
        ((*pruning, output, "--keep", 0), "AFA-CLI-015", "got 0"),
    ]:
        line = fails(capsys, *command)
        assert code in line
        assert value in line
    assert not output.exists()


def test_the_same_command_draws_the_same_picture(ensemble: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert run("generate", ensemble, "a fox", "--output", tmp_path / name, "--steps", 2) == 0
    pictures = [Image.open(tmp_path / n / "00-a-fox-seed0.png") for n in ("first", "second")]
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_inspect_says_what_it_is(
    ensemble: Path, experts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("inspect", ensemble, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "ensemble"
    assert len(facts["experts"]) == 3
    assert run("inspect", ensemble) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert all(expert["sha256"] in shown for expert in facts["experts"])  # whole, if narrow
    assert run("inspect", experts[0]) == 0
    assert "pipeline folder" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--help") == 0
    assert f"afa {command}" in " ".join(capsys.readouterr().out.split())


# -- mistakes ---------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistaken command prints."""
    capsys.readouterr()
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed
    assert lines[0].startswith("afa: error [AFA-")
    return lines[0]


def truncated(experts: list[Path], folder: Path) -> Path:
    tiny = folder / "truncated"
    tiny_pipeline(folder / "tokenizer").save_pretrained(tiny)
    weights = tiny / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return tiny


def pickled(experts: list[Path], folder: Path) -> Path:
    path = folder / "model.ckpt"
    path.write_bytes(b"\x80\x04K\x01.")
    return path


def wider(experts: list[Path], folder: Path) -> Path:
    path = folder / "wider"
    tiny_pipeline(folder / "tokenizer", block_out_channels=(8, 32)).save_pretrained(path)
    return path


def missing(experts: list[Path], folder: Path) -> Path:
    return folder / "nowhere"


@pytest.mark.parametrize(
    ("make", "code", "value"),
    [
        (missing, "AFA-LOAD-079", "nowhere'"),
        (pickled, "AFA-LOAD-096", "model.ckpt'"),
        (truncated, "AFA-LOAD-092", "truncated"),
        (wider, "AFA-LOAD-004", "(8, 32)"),
    ],
)
def test_wrong_experts(
    make: Any,
    code: str,
    value: str,
    experts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(tmp_path, [experts[0], make(experts, tmp_path)])
    before = sorted(tmp_path.iterdir())
    line = fails(capsys, "train", recipe, "--output", tmp_path / "run")
    assert code in line
    assert value in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "code", "value"),
    [
        ({"training": {"num_steps": 2, "batchsize": 2}}, "AFA-RECIPE-002", "'batch_size'?"),
        ({"data": {"folder": "empty"}}, "AFA-TRAIN-014", "metadata.jsonl"),
        ({"aggregator": {"hidden_size": 30}}, "AFA-RECIPE-002", "hidden_size"),
        ({"training": {"num_steps": 2, "device": "quantum"}}, "AFA-TRAIN-030", "'quantum'"),
    ],
)
def test_wrong_recipes(
    changes: dict[str, Any],
    code: str,
    value: str,
    experts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    recipe = write_recipe(tmp_path, experts, **changes)
    line = fails(capsys, "train", recipe, "--output", tmp_path / "run")
    assert code in line
    assert value in line
    assert not (tmp_path / "run").exists()


def test_output_folders_that_exist_are_left_alone(
    ensemble: Path, experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    recipe = write_recipe(tmp_path, experts)
    for command, code in [
        (["train", recipe, "--output", taken], "AFA-TRAIN-046"),
        (["generate", ensemble, "a fox", "--output", taken], "AFA-CLI-010"),
        (["demo", "--output", taken], "AFA-CLI-006"),
        (["zoo", "export", taken], "AFA-CLI-006"),
    ]:
        line = fails(capsys, *command)
        assert code in line
        assert str(taken) in line
    assert [file.name for file in taken.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "code", "value"),
    [
        ("generate {ensemble} fox --output {new} --steps 0", "AFA-CLI-024", "--steps"),
        ("generate {ensemble} fox --output {new} --dtype int8", "AFA-CLI-008", "--dtype"),
        ("generate {ensemble} fox --output {new} --height 17", "AFA-CLI-013", "--height"),
        ("generate {new} fox --output {new}2", "AFA-LOAD-061", "config.json"),
        ("generate {ensemble} fox", "AFA-CLI-024", "--output"),
        ("inspect {new}", "AFA-LOAD-079", "new"),
        ("train {new}.yaml --output {new}", "AFA-RECIPE-005", "new.yaml"),
        ("paint", "AFA-CLI-024", "paint"),
        ("weights {ensemble} --output {new} --zzz 3", "AFA-CLI-024", "--zzz. Try --help."),
        ("weights {ensemble} fox --output {new}", "AFA-CLI-019", "--prompt"),
    ],
)
def test_wrong_arguments(
    arguments: str,
    code: str,
    value: str,
    ensemble: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word.format(ensemble=ensemble, new=tmp_path / "new") for word in arguments.split()]
    line = fails(capsys, *words)
    assert code in line
    assert value in line
    assert not (tmp_path / "new").exists()


def test_the_program_starts_without_loading_torch() -> None:
    code = (
        "import sys\n"
        "from afa.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.nightly
def test_nothing_but_the_error_reaches_the_terminal(experts: list[Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [experts[0], tmp_path / "nowhere"])
    command = [sys.executable, "-m", "afa", "train", str(recipe), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("afa: error [AFA-")
    assert done.stderr.count("\n") == 1


def test_generate_with_drafts_makes_a_picture_again(
    ensemble: Path, experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(experts[2], judge)
    drafted, plain, again = (tmp_path / name for name in ("drafted", "plain", "again"))
    options = ["--steps", 2, "--weights"]
    assert run("generate", ensemble, "a fox", "--output", plain, *options) == 0
    asked = ("generate", ensemble, "a fox", "--output", drafted, *options, "--drafts", judge)
    assert run(*asked) == 0
    picture = drafted / "00-a-fox-seed0.png"
    with Image.open(picture) as one, Image.open(plain / picture.name) as other:
        assert one.tobytes() != other.tobytes()
    assert run("generate", "--from-image", picture, "--output", again) == 0
    assert "The picture is identical, bit for bit." in capsys.readouterr().out
    shutil.rmtree(judge)
    shutil.copytree(experts[1], judge)
    line = fails(capsys, "generate", "--from-image", picture, "--output", tmp_path / "new")
    assert "AFA-DRAW-016" in line
    assert str(judge) in line


def test_generate_uses_the_drafts_of_an_ensemble_for_unknown_words(
    ensemble: Path, experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(ensemble, tmp_path / "own")
    pipeline = afa.load_ensemble(ensemble)
    judge = shutil.copytree(experts[2], tmp_path / "judge")
    drafts = OwnDrafts(judge=ExpertSource(str(judge)), prompts="unknown_words")
    keep_drafts(pipeline, drafts, Companions(torch.float32))
    afa.save_ensemble(pipeline, own, exist_ok=True)
    write_words(["fox"], own)
    prompts = ["a fox", "a zebra"]
    drafted, without, plain, again = (tmp_path / n for n in ("drafted", "no", "plain", "again"))
    assert run("generate", own, *prompts, "--output", drafted, "--steps", 2) == 0
    said = capsys.readouterr().out
    assert "No training caption has 'zebra'" in said
    assert "warning" not in said
    off = ("--steps", 2, "--no-drafts")
    assert run("generate", own, *prompts, "--output", without, *off) == 0
    assert "warning: No training caption" in capsys.readouterr().out
    assert run("generate", ensemble, *prompts, "--output", plain, "--steps", 2) == 0

    def pixels(folder: Path, name: str) -> bytes:
        with Image.open(folder / name) as picture:
            return picture.tobytes()

    fox, zebra = "00-a-fox-seed0.png", "01-a-zebra-seed0.png"
    assert pixels(drafted, fox) == pixels(without, fox) == pixels(plain, fox)
    assert pixels(drafted, zebra) != pixels(without, zebra)
    assert pixels(without, zebra) == pixels(plain, zebra)
    assert read_picture(drafted / fox).recipe.drafts is None
    assert read_picture(drafted / zebra).recipe.drafts is not None
    capsys.readouterr()
    assert run("generate", "--from-image", drafted / zebra, "--output", again) == 0
    assert "The picture is identical, bit for bit." in capsys.readouterr().out
    assert run("generate", own, *prompts, "--output", drafted, "--steps", 2) == 0
    assert "2 pictures in" in capsys.readouterr().out, "nothing is drawn again"
    # a judge that was moved, together with an ensemble that names its new place
    moved = shutil.move(judge, tmp_path / "moved")
    line = fails(capsys, "generate", "--from-image", drafted / zebra, "--output", tmp_path / "x")
    assert "AFA-DRAW-017" in line
    config = json.loads((own / "config.json").read_text())
    config["judge"]["source"] = str(moved)
    (own / "config.json").write_text(json.dumps(config))
    assert run("generate", "--from-image", drafted / zebra, "--output", tmp_path / "x") == 0
    assert "The picture is identical, bit for bit." in capsys.readouterr().out
    # what excludes drafts is drawn without them, with a warning
    masked = tmp_path / "masked"
    mask = ("--output", masked, "--steps", 2, "--on-nonfinite", "mask")
    assert run("generate", own, *prompts, *mask) == 0
    assert "drafts cannot be combined with --on-nonfinite mask" in capsys.readouterr().out
    assert pixels(masked, zebra) == pixels(plain, zebra)
    figures = tmp_path / "figures"
    asked = ("--prompt", "a zebra", "--output", figures, "--steps", 2)
    assert run("weights", own, *asked) == 0
    assert "No training caption has 'zebra'" in capsys.readouterr().out
    both = ("--drafts", experts[2], "--no-drafts")
    line = fails(capsys, "generate", own, "a fox", "--output", tmp_path / "new", *both)
    assert "AFA-CLI-027" in line
