"""A family that one file adds is loaded, drawn with, trained and read from single files."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

import afa
from afa.denoisers import FAMILIES, register_family, run_alone
from afa.denoisers.family import COMPONENTS
from afa.denoisers.kinds import conditioning_of
from afa.loading.inspection import describe
from afa.zoo.models import build_tokenizer
from tests.denoisers.toy import Toy, ToyPipeline, toy_blocks, toy_family
from tests.refusal import refusal
from tests.tiny_pipelines import saved_experts, tiny_clip, tiny_vae
from tests.training.runs import SMALL, recipe, steps_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("toys")
    tokenizer = build_tokenizer(root / "tokenizer")
    for seed in range(2):
        torch.manual_seed(seed)
        ToyPipeline(
            vae=tiny_vae(4),
            text_encoder=tiny_clip(tokenizer, 8),
            tokenizer=tokenizer,
            unet=Toy().eval(),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(root / f"expert{seed}")
    return [root / "expert0", root / "expert1"]


@pytest.fixture(autouse=True)
def family(folders: list[Path]) -> Iterator[Any]:
    toy = toy_family(folders[0])
    register_family(toy)
    yield toy
    FAMILIES.remove(toy)


def draw(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline(
        "a fox", num_inference_steps=2, height=16, width=16, generator=noise, output_type="np"
    )[0]


def test_its_coroutine_is_its_forward_pass() -> None:
    model = Toy().eval()
    call: dict[str, Any] = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 3, 8),
    }
    with torch.no_grad():
        assert torch.equal(run_alone(toy_blocks(model, **call)), model(**call).sample)


def test_an_ensemble_in_its_pipeline(folders: list[Path], tmp_path: Path) -> None:
    pipeline: Any = afa.load_pipeline(folders, SMALL)
    assert type(pipeline) is ToyPipeline
    assert [site.name for site in pipeline.unet.sites] == ["embed", "block.0", "block.1", "out"]
    drawn = draw(pipeline)
    afa.save_ensemble(pipeline, tmp_path / "saved")
    assert np.array_equal(draw(afa.load_ensemble(tmp_path / "saved")), drawn)


def test_one_expert_alone(folders: list[Path]) -> None:
    parts: Any = afa.load_pipeline(folders[:1], None).components
    stock = ToyPipeline(**{**parts, "unet": Toy.from_pretrained(folders[0] / "unet")})
    assert np.array_equal(draw(afa.load_pipeline(folders[:1], None)), draw(stock))


def test_training(folders: list[Path], tmp_path: Path) -> None:
    data = {"scenes": {"num_samples": 8}, "resolution": 16, "cache": False}
    steps = list(steps_of(recipe(folders, data, num_steps=2), tmp_path))
    assert len(steps) == 2
    assert all(np.isfinite(step.loss) for step in steps)
    assert draw(afa.load_ensemble(tmp_path)).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("is_original", [False, True], ids=["diffusers", "original"])
def test_single_files(is_original: bool, folders: list[Path], tmp_path: Path) -> None:
    pipeline: Any = afa.load_pipeline(folders[:1], None)
    expert = Toy.from_pretrained(folders[0] / "unet").state_dict()
    if is_original:
        names = {name: name.replace("conv_in.", "stem.") for name in expert}
        expert = {f"model.diffusion_model.{names[name]}": t for name, t in expert.items()}
    encoder = pipeline.text_encoder.encoders[0].state_dict()
    parts = {
        "cond_stage_model.transformer.": encoder,
        "first_stage_model.": pipeline.vae.state_dict(),
    }
    tensors = expert | {
        start + name: t for start, part in parts.items() for name, t in part.items()
    }
    file = tmp_path / "toy.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    layout = "original layout" if is_original else "diffusers layout"
    assert describe(file)["layout"] == f"Toy, {layout}"
    assert np.array_equal(draw(afa.load_pipeline([file], None)), draw(pipeline))


# -- what is known of a family is in its own file ---------------------------------------------

SOURCES = Path(afa.__file__).parent
#: `afa zoo build --family dit` names a zoo that is trained, not a family
EXCEPTIONS = {("cli/zoo.py", "dit")}


def test_no_other_module_names_a_family() -> None:
    own = {Path(f.blocks.__code__.co_filename).stem for f in FAMILIES} | {"stable_diffusion"}
    names = {f.name for f in FAMILIES} | {kind.name for f in FAMILIES for kind in f.pipelines}
    found = set()
    for file in SOURCES.rglob("*.py"):
        if file.parent.name == "denoisers" and file.stem in own:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in names - set(COMPONENTS):
                found.add((file.relative_to(SOURCES).as_posix(), str(node.value)))
    assert found == EXCEPTIONS


def test_no_module_asks_for_a_name() -> None:
    """`unet` names a part of pipelines too: no name of a family or kind is compared with a text."""
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Compare):
                continue
            asked = [ast.unparse(side) for side in (node.left, *node.comparators)]
            is_text = [isinstance(s, ast.Constant) for s in (node.left, *node.comparators)]
            is_name = [a.endswith(("kind.name", "kind.family", "family.name")) for a in asked]
            assert not (any(is_text) and any(is_name)), f"{file}:{node.lineno}"


def test_a_kind_without_prompts_cannot_be_trained(tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(saved_experts("dit", tmp_path, count=1), None)
    with refusal("AFA-MODEL-007"):
        conditioning_of(pipeline)
