"""The nodes themselves, as ComfyUI executes them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy_api.latest import io
from PIL import Image
from safetensors.torch import load_file, save_file

from afa.ensemble.caching.plan import save_plan
from afa.errors import AfaError
from integrations.comfyui import comfy_entrypoint
from integrations.comfyui.ensemble import ensemble_model, runner_of
from integrations.comfyui.folders import MEAN, ensembles, find_ensemble, plans
from integrations.comfyui.nodes.ensemble import AfaEnsemble
from integrations.comfyui.nodes.load import AfaLoadEnsemble
from integrations.comfyui.nodes.merge import AfaMerge, recipe_of
from integrations.comfyui.nodes.recipe import KEY, AfaSaveRecipe
from integrations.comfyui.nodes.speed import AfaSpeed
from integrations.comfyui.nodes.steer import AfaSteer
from integrations.comfyui.nodes.text import AfaClip, AfaTextEncode
from integrations.comfyui.nodes.weights import AfaWeights
from integrations.comfyui.settings import Settings
from integrations.comfyui.tests.models import patcher
from integrations.comfyui.tests.test_ensemble import sample, saved
from integrations.comfyui.texts import EnsembleClip
from tests.ensemble.caching.test_plan import plan_of
from tests.refusal import refusal

EXAMPLES = Path(__file__).parents[1] / "example_workflows"


@pytest.fixture
def experts() -> list[Any]:
    return [patcher("sd15", seed) for seed in range(3)]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ComfyUI's models, with a folder of ensembles."""
    folder = tmp_path / "models"
    (folder / "afa").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    places = {
        name: ([str(folder / name)], {".safetensors", ".json"}) for name in ("afa", "checkpoints")
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", places)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folder


@pytest.fixture
def extension() -> Any:
    return asyncio.run(comfy_entrypoint())


def nodes_of(extension: Any) -> list[Any]:
    return list(asyncio.run(extension.get_node_list()))


def test_every_node_has_a_valid_schema(models: Path, extension: Any) -> None:
    listed = nodes_of(extension)
    ids = [node.GET_SCHEMA().node_id for node in listed]
    assert len(set(ids)) == len(ids) == 9
    for node in listed:
        info = node.GET_NODE_INFO_V1()
        assert info["category"] == "afa"
        assert info["description"]


@pytest.mark.parametrize("name", ["three checkpoints", "who did what", "LoRAs and speed"])
def test_example_workflows_fit_the_nodes(name: str, models: Path, extension: Any) -> None:
    known = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in nodes_of(extension)}
    workflow = json.loads((EXAMPLES / f"api/{name}.json").read_text())
    used = 0
    for each in workflow.values():
        if (schema := known.get(each["class_type"])) is None:
            continue
        used += 1
        inputs = {given.id: given for given in schema.inputs}
        assert each["inputs"].keys() <= inputs.keys()
        required = {key for key, given in inputs.items() if not given.optional}
        assert required <= each["inputs"].keys()
        for value in each["inputs"].values():
            if isinstance(value, list):
                assert value[0] in workflow
    assert used > 2
    page = json.loads((EXAMPLES / f"{name}.json").read_text())
    assert sorted(node["type"] for node in page["nodes"]) == sorted(
        each["class_type"] for each in workflow.values()
    )


def test_ensembles_are_found_and_watched(models: Path, experts: list[Any]) -> None:
    saved("sd15", experts, models / "afa/mine/one")
    assert list(ensembles()) == ["mine/one"]
    assert find_ensemble(MEAN) is None
    schema = AfaEnsemble.define_schema()
    (chosen,) = (each for each in schema.inputs if each.id == "ensemble")
    assert chosen.options == ["mine/one", MEAN]
    before = AfaEnsemble.fingerprint_inputs("mine/one")
    assert AfaEnsemble.fingerprint_inputs("mine/one") == before
    assert AfaLoadEnsemble.fingerprint_inputs("mine/one") == before
    assert AfaEnsemble.fingerprint_inputs("mine/one", record_weights=True) != before
    weights = models / "afa/mine/one/aggregators.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, weights)
    assert AfaEnsemble.fingerprint_inputs("mine/one") != before
    with refusal("AFA-COMFY-017", "other"):
        find_ensemble("other")


def test_linked_folders_are_found(models: Path, experts: list[Any], tmp_path: Path) -> None:
    twin = saved("sd15", experts, tmp_path / "elsewhere/one")
    save_plan(plan_of(twin, {}), tmp_path / "elsewhere/plan.json")
    (models / "afa/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(models / "afa")  # a circle
    assert list(ensembles()) == ["linked/one"]
    assert list(plans()) == ["linked/plan.json"]


def test_ensemble_node(models: Path, experts: list[Any]) -> None:
    saved("sd15", experts, models / "afa/one")
    given = {f"model_{n}": model for n, model in enumerate(experts, start=1)}
    (model,) = AfaEnsemble.execute(ensemble="one", **given).result
    expected = sample(ensemble_model(experts, models / "afa/one"), 3)
    assert torch.equal(sample(model, 3), expected)
    (mean,) = AfaEnsemble.execute(ensemble=MEAN, **given).result
    assert torch.equal(sample(mean, 3), sample(ensemble_model(experts, None), 3))
    with refusal("AFA-COMFY-018"):
        AfaEnsemble.execute(ensemble=MEAN, model_1=experts[0], model_3=experts[2])


def test_steering_adds_up(experts: list[Any]) -> None:
    model = ensemble_model(experts, None)
    (once,) = AfaSteer.execute(model, "2", "all", 1.5).result
    (twice,) = AfaSteer.execute(once, "model_2", "up", -0.5).result
    (third,) = AfaSteer.execute(twice, "3", "mid", 1.0).result
    assert runner_of(third).settings.bias == {
        "1": {"down": 1.5, "mid": 1.5, "up": 1.5},
        "model_2": {"down": 0.0, "mid": 0.0, "up": -0.5},
        "2": {"down": 0.0, "mid": 1.0, "up": 0.0},
    }
    assert not torch.equal(sample(once, 3), sample(model, 3))
    with refusal("AFA-ENSEMBLE-055", "fox"):
        AfaSteer.execute(model, "fox", "all", 1.0)


def test_speed_node(models: Path, experts: list[Any]) -> None:
    twin = saved("sd15", experts, models / "afa/one")
    save_plan(plan_of(twin, {}, {"mid": [0, 2]}), models / "afa/plan.json")
    (chosen,) = (each for each in AfaSpeed.define_schema().inputs if each.id == "plan")
    assert chosen.options == ["none", "plan.json"]
    model = ensemble_model(experts, models / "afa/one")
    (fast,) = AfaSpeed.execute(model, "fast", "plan.json").result
    assert runner_of(fast).settings.preset == "fast"
    assert runner_of(fast).denoiser.plan is not None
    before = AfaSpeed.fingerprint_inputs("fast", "plan.json")
    save_plan(plan_of(twin, {}, {"mid": [0]}), models / "afa/plan.json")
    assert AfaSpeed.fingerprint_inputs("fast", "plan.json") != before
    with refusal("AFA-COMFY-025", "gone.json"):
        AfaSpeed.execute(model, "fast", "gone.json")


def test_weights_node(experts: list[Any]) -> None:
    model = ensemble_model(experts, None, Settings(records=True))
    latent = {"samples": sample(model, 3)}
    images = torch.rand(2, 40, 64, 3)
    figure, steps = AfaWeights.execute(model, latent, images).result
    assert figure.ndim == 4
    assert figure.shape[-1] == 3
    assert steps.shape == (3 * 2, 40, 64, 3)
    large = AfaWeights.execute(model, latent, torch.rand(2, 700, 1400, 3)).result[1]
    assert large.shape == (3 * 2, 256, 512, 3)
    with refusal("AFA-COMFY-026", "1 images"):
        AfaWeights.execute(model, latent, images[:1])
    with refusal("AFA-COMFY-012"):
        AfaWeights.execute(ensemble_model(experts, None), latent, images)


def test_saved_recipe(
    experts: list[Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("sd15", experts, models / "afa/one")
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model = ensemble_model(experts, models / "afa/one")
    (steered,) = AfaSteer.execute(model, "2", "all", 1.5).result
    hidden = {
        io.Hidden.prompt: {"1": "a prompt"},
        io.Hidden.extra_pnginfo: {"workflow": {"nodes": []}},
    }
    node = AfaSaveRecipe.PREPARE_CLASS_CLONE(hidden)
    node.execute(torch.rand(1, 8, 8, 3), steered, "afa")
    (file,) = tmp_path.glob("afa*.png")
    with Image.open(file) as picture:
        text = {key: json.loads(value) for key, value in picture.text.items()}  # type: ignore[attr-defined]
    assert text["prompt"] == {"1": "a prompt"}
    assert text["workflow"] == {"nodes": []}
    assert text[KEY]["experts"][1] == {"name": "expert-1", "sha256": "1"}
    assert len(text[KEY]["aggregators"]) == 64
    assert text[KEY]["experts_are_checked"] is False
    assert text[KEY]["loras"] is False
    assert text[KEY]["bias"] == {"1": {"down": 1.5, "mid": 1.5, "up": 1.5}}


class Clip:
    """A text encoder with ComfyUI's interface, whose embedding depends on its number."""

    def __init__(self, number: int) -> None:
        self.number, self.patches, self.layer = number, 0.0, 0
        self.cond_stage_model, self.tokenizer = torch.nn.Linear(1, 1), "tokenizer"

    def clone(self) -> Clip:
        other = Clip(self.number)
        other.patches, other.layer = self.patches, self.layer
        return other

    def add_patches(self, patches: Any, strength: float = 1.0) -> list[str]:
        self.patches += strength
        return list(patches)

    def clip_layer(self, layer: int) -> None:
        self.layer = layer

    def tokenize(self, text: str) -> dict[str, Any]:
        return {"l": [len(text)]}

    def encode_from_tokens(self, tokens: Any, return_pooled: Any, return_dict: bool) -> Any:
        value = 100 * self.number + tokens["l"][0] + self.patches + 0.5 * self.layer
        return {"cond": torch.full((1, 3, 4), value), "pooled_output": torch.full((1, 2), value)}

    def encode_from_tokens_scheduled(self, tokens: Any, add_dict: Any = None) -> Any:
        found = self.encode_from_tokens(tokens, True, True)
        return [[found.pop("cond"), {**found, **(add_dict or {})}]]


def test_clips_of_all_experts() -> None:
    clips = [Clip(n) for n in (1, 2)]
    (joined,) = AfaClip.execute(clip_1=clips[0], clip_2=clips[1]).result
    ((text, entries),) = AfaTextEncode.execute("a fox", clip_1=clips[0], clip_2=clips[1]).result[0]
    assert text.tolist()[0][0] == [105.0] * 4 + [205.0] * 4
    assert entries["pooled_output"].tolist() == [[105.0] * 2 + [205.0] * 2]
    tokens = joined.tokenize("a fox")
    ((scheduled, more),) = joined.encode_from_tokens_scheduled(tokens, add_dict={"width": 8})
    assert torch.equal(scheduled, text)
    assert more["width"] == 8
    assert torch.equal(joined.encode("a fox"), text)
    _, pooled = joined.encode_from_tokens(tokens, return_pooled=True)
    assert torch.equal(pooled, entries["pooled_output"])
    assert torch.equal(joined.encode_from_tokens(tokens, return_dict=True)["cond"], text)
    patched = joined.clone()
    assert patched.add_patches({"a": 1}, 0.25) == ["a"]
    patched.clip_layer(-2)
    assert patched.encode("a fox").tolist()[0][0] == [104.25] * 4 + [204.25] * 4
    assert torch.equal(joined.encode("a fox"), text)
    with refusal("AFA-COMFY-014"):
        _ = joined.patcher
    clips[1].cond_stage_model = torch.nn.Conv2d(1, 1, 1)  # type: ignore[assignment]
    with refusal("AFA-COMFY-013", "Conv2d"):
        EnsembleClip(clips)


def test_texts_of_other_lengths_are_refused() -> None:
    class Longer(Clip):
        def encode_from_tokens_scheduled(self, tokens: Any, add_dict: Any = None) -> Any:
            return [[torch.zeros(1, 5, 4), {}]]

    class Twice(Clip):
        def encode_from_tokens_scheduled(self, tokens: Any, add_dict: Any = None) -> Any:
            return 2 * super().encode_from_tokens_scheduled(tokens, add_dict)

    with refusal("AFA-COMFY-016", "3, 5"):
        AfaTextEncode.execute("a fox", clip_1=Clip(1), clip_2=Longer(2))
    with refusal("AFA-COMFY-015"):
        AfaTextEncode.execute("a fox", clip_1=Clip(1), clip_2=Twice(2))


@pytest.fixture
def checkpoints(models: Path) -> list[str]:
    names = [f"{n}.safetensors" for n in range(3)]
    for n, name in enumerate(names):
        tensors = {"model.diffusion_model.out.2.weight": torch.full((4, 8, 3, 3), float(n + 1))}
        save_file(tensors, models / "checkpoints" / name)
    return names


def test_merge_node(models: Path, checkpoints: list[str]) -> None:
    given = {"method": "weighted", "name": "new", "weights": "0.25, 0.75"}
    given |= {"checkpoint_1": checkpoints[0], "checkpoint_2": checkpoints[1]}
    (file,) = AfaMerge.execute(**given).result
    assert file == str(models / "checkpoints/new.safetensors")
    assert float(load_file(file)["model.diffusion_model.out.2.weight"].mean()) == 1.75
    with pytest.raises(AfaError, match="exists"):
        AfaMerge.execute(**given)
    before = AfaMerge.fingerprint_inputs(**given)
    assert AfaMerge.fingerprint_inputs(**given) == before
    Path(file).unlink()
    assert AfaMerge.fingerprint_inputs(**given) != before
    ties = {
        "method": "ties",
        "base": checkpoints[2],
        "density": 0.5,
        "checkpoint_1": "0.safetensors",
    }
    assert recipe_of(ties).density == 0.5
    with refusal("AFA-COMFY-027", "base"):
        recipe_of({**ties, "base": "none"})
    with refusal("AFA-COMFY-028", "half"):
        recipe_of({**given, "weights": "half, half"})
    for name in ("../new", "", ".new", "a/b"):
        with refusal("AFA-COMFY-029"):
            AfaMerge.execute(**{**given, "name": name})


def test_interrupted_merge_leaves_nothing(models: Path, checkpoints: list[str]) -> None:
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        AfaMerge.execute(method="weighted", name="new", checkpoint_1=checkpoints[0])
    assert sorted(file.name for file in (models / "checkpoints").iterdir()) == checkpoints


def test_several_ensembles_and_unloading(experts: list[Any], tmp_path: Path) -> None:
    saved("sd15", experts, tmp_path / "one")
    first, second = ensemble_model(experts, tmp_path / "one"), ensemble_model(experts[::-1], None)
    expected = sample(first, 3), sample(second, 3), sample(experts[1])
    assert torch.equal(sample(first, 3), expected[0])
    assert torch.equal(sample(experts[1]), expected[2])
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(second, 3), expected[1])
    assert torch.equal(sample(first, 3), expected[0])


def test_weights_of_eight_bits() -> None:
    stored = [patcher("sd15", seed, dtype=torch.float8_e4m3fn) for seed in range(3)]
    assert stored[0].model.diffusion_model.dtype == torch.float8_e4m3fn
    expected = sample(stored[0])
    assert torch.equal(sample(ensemble_model(stored[:1], None)), expected)
    # ComfyUI computes with the same weights in full
    whole = [patcher("sd15", seed) for seed in range(3)]
    for model, small in zip(whole, stored, strict=True):
        state = small.model.diffusion_model.state_dict()
        model.model.diffusion_model.load_state_dict({k: v.float() for k, v in state.items()})
    came, asked = (sample(ensemble_model(models, None)) for models in (stored, whole))
    torch.testing.assert_close(came, asked, rtol=1e-5, atol=1e-5 * float(asked.abs().max()))
