"""Weights that are missing, damaged, incomplete or pickled are one line that says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afa.errors import AfaError
from afa.metrics import MetricRecipe, ReferenceScorer, SetMetric, open_metric
from afa.policy import trusting
from afa.recipe import read_recipe
from tests.metrics.tiny import (
    MED_CONFIG,
    blip_tensors,
    head_tensors,
    open_clip_tensors,
    pictures,
    tiny_blip,
    tiny_clip,
    write_bert_tokenizer,
    write_clip,
    write_processor,
)

if TYPE_CHECKING:
    from pathlib import Path

PUBLIC_CLIP = "Public ones: openai/clip-vit-large-patch14"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    write_clip(folder)
    return folder


def refusal(**recipe: Any) -> str:
    """The code and the message of the error, in one line."""
    settings = {key: str(value) for key, value in recipe.items()}
    with pytest.raises(AfaError) as caught:
        open_metric(MetricRecipe.model_validate(settings))
    assert "\n" not in str(caught.value)
    return f"{caught.value.code}: {caught.value}"


@pytest.mark.parametrize(
    ("recipe", "public"),
    [
        ({"name": "clip_t"}, "openai/clip-vit-large-patch14"),
        ({"name": "cmmd"}, "openai/clip-vit-large-patch14-336"),
        ({"name": "pickscore"}, "yuvalkirstain/PickScore_v1"),
        ({"name": "hpsv2", "processor": "x/y"}, "xswu/HPSv2"),
        ({"name": "imagereward", "processor": "x/y"}, "zai-org/ImageReward"),
        ({"name": "fid"}, "inception"),
    ],
)
def test_nothing_there(recipe: dict[str, Any], public: str) -> None:
    said = refusal(**recipe, weights="./nowhere")
    assert said.startswith(f"AFA-METRIC-017: The weights of '{recipe['name']}'")
    assert "'./nowhere'" in said
    assert said.endswith(f" {public}.")
    said = refusal(**recipe, weights="nobody/nothing")  # the tests are offline
    assert said.startswith("AFA-METRIC-018")
    assert "'nobody/nothing'" in said
    assert said.endswith(f" {public}.")


def test_aes_needs_its_file_and_its_clip(clip: Path, tmp_path: Path) -> None:
    said = refusal(name="aes", weights=tmp_path / "missing.pth", clip="./nowhere")
    assert said.startswith("AFA-METRIC-017: The clip of 'aes'")
    assert "'./nowhere'" in said
    said = refusal(name="aes", weights=tmp_path / "missing.pth", clip=clip)
    assert "missing.pth'" in said
    assert "sac+logos+ava1-l14-linearMSE.pth of" in said


def test_a_clip_folder_that_is_none(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    said = refusal(name="clip_t", weights=tmp_path)
    assert said.startswith("AFA-METRIC-002")
    assert f"'{tmp_path}' is bert. {PUBLIC_CLIP}" in said
    assert "is a file" in refusal(name="clip_t", weights=clip / "model.safetensors")
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(clip / "config.json", folder)
    assert "AFA-METRIC-022" in refusal(name="clip_t", weights=folder)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("preprocessor_config.json", " preprocessor_config.json; "),
        ("tokenizer", " tokenizer.json or vocab.json or vocab.txt; "),
    ],
)
def test_a_clip_without_its_processor(clip: Path, tmp_path: Path, missing: str, said: str) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    for name in ("tokenizer.json", "vocab.json") if missing == "tokenizer" else (missing,):
        (folder / name).unlink()
    told = refusal(name="clip_t", weights=folder)
    assert told.startswith("AFA-METRIC-020")
    assert said in told
    assert "processor" in told.rpartition(". ")[2]
    recipe = MetricRecipe(name="clip_i", weights=str(folder), processor=str(clip))
    metric = open_metric(recipe)
    assert isinstance(metric, ReferenceScorer)
    assert metric.extractor.name == f"clip({folder}, {clip})"


def test_a_processor_of_another_model(clip: Path, tmp_path: Path) -> None:
    write_processor(tmp_path, size=32)
    said = refusal(name="clip_t", weights=clip, processor=tmp_path)
    assert said.startswith("AFA-METRIC-003: The processor of 'clip_t'")
    assert "28x28" in said
    assert "(32, 32)" in said
    model = tiny_clip(vocab_size=100)
    model.save_pretrained(tmp_path / "model")
    said = refusal(name="clip_t", weights=tmp_path / "model", processor=clip)
    assert said.startswith("AFA-METRIC-023")
    assert " 100 " in said


def test_incomplete_and_damaged_clips(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = refusal(name="clip_i", weights=folder)
    assert said.startswith("AFA-METRIC-021")
    assert "visual_projection.weight" in said
    tensors["visual_projection.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"The weights of 'clip_i' in '{folder}'" in refusal(name="clip_i", weights=folder)
    whole = (clip / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    assert "AFA-LOAD-092" in refusal(name="clip_i", weights=folder)


def test_pickles_only_where_they_are_allowed(clip: Path, tmp_path: Path) -> None:
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(head_tensors(24, "layers."), file)
    said = refusal(name="aes", weights=file, clip=clip)
    assert said.startswith("AFA-METRIC-019")
    assert "--allow-pickle" in said
    said = refusal(name="aes", weights=tmp_path, clip=clip)
    assert said.startswith("AFA-METRIC-020")
    assert "--allow-pickle" in said
    with trusting(allow_pickle=True):
        for weights in (file, tmp_path):
            open_metric(MetricRecipe(name="aes", weights=str(weights), clip=str(clip)))
    assert "AFA-METRIC-019" in refusal(name="aes", weights=file, clip=clip)


@pytest.mark.parametrize("value", [True, False])
def test_a_recipe_cannot_allow_pickles_itself(value: bool) -> None:
    contexts: list[AbstractContextManager[None]] = [nullcontext(), trusting(allow_pickle=True)]
    for allowing in contexts:
        with allowing, pytest.raises(ValidationError) as error:
            MetricRecipe.model_validate({"name": "fid", "allow_pickle": value})
        assert f"got {value}".lower() in str(error.value)
        assert "Remove that key and pass --allow-pickle" in str(error.value)


class Intruder:
    """Runs code when it is unpickled, if that is let happen."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Intruder, "ran", True)


def test_a_pickles_code_is_never_run(clip: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": Intruder()}, tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert Intruder.ran
    Intruder.ran = False
    with trusting(allow_pickle=True):
        said = refusal(name="aes", weights=tmp_path / "evil.pth", clip=clip)
    assert f"'{tmp_path / 'evil.pth'}'" in said
    assert "setattr" in said
    assert not Intruder.ran


@pytest.mark.parametrize("content", [b"", b"not a pickle", None])
def test_damaged_pickles(clip: Path, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "broken.pth"
    if content is None:
        torch.save([1, 2, 3], file)
    else:
        file.write_bytes(content)
    with trusting(allow_pickle=True):
        said = refusal(name="aes", weights=file, clip=clip)
    assert f"The weights of 'aes' in '{file}'" in said


def test_aes_files_that_lack_something(clip: Path, tmp_path: Path) -> None:
    file = tmp_path / "aes.safetensors"
    tensors = head_tensors(24, "layers.")
    save_file({k: t for k, t in tensors.items() if k != "layers.4.bias"}, file)
    assert "layers.4.bias" in refusal(name="aes", weights=file, clip=clip)
    save_file({"weight": torch.zeros(1)}, file)
    assert "layers.0.weight" in refusal(name="aes", weights=file, clip=clip)
    save_file(head_tensors(25, "layers."), file)
    said = refusal(name="aes", weights=file, clip=clip)
    assert said.startswith("AFA-METRIC-001")
    assert "25" in said
    assert "24" in said


def test_hpsv2_files_that_lack_something(tmp_path: Path) -> None:
    tensors = open_clip_tensors(tiny_clip(write_processor(tmp_path)))
    file = tmp_path / "hps.safetensors"
    for key in ("visual.conv1.weight", "visual.ln_post.bias", "transformer.resblocks.1.ln_1.bias"):
        save_file({k: t for k, t in tensors.items() if k != key}, file)
        said = refusal(name="hpsv2", weights=file, processor=tmp_path)
        assert said.startswith("AFA-METRIC-021")
        assert said.endswith(" xswu/HPSv2.")


def test_imagereward_files_that_lack_something(tmp_path: Path) -> None:
    num_tokens = len(write_bert_tokenizer(tmp_path))
    vision, text = tiny_blip(num_tokens)
    tensors = blip_tensors(vision, text, head_tensors(36, "mlp.layers."))
    file = tmp_path / "ImageReward.safetensors"
    save_file(tensors, file)
    said = refusal(name="imagereward", weights=tmp_path, processor=tmp_path)
    assert "med_config.json'" in said
    (tmp_path / "med_config.json").write_text("{}")
    said = refusal(name="imagereward", weights=tmp_path, processor=tmp_path)
    assert said.startswith("AFA-METRIC-012")
    assert "vocab_size, hidden_size," in said
    (tmp_path / "med_config.json").write_text(json.dumps({**MED_CONFIG, "vocab_size": num_tokens}))
    open_metric(MetricRecipe(name="imagereward", weights=str(tmp_path), processor=str(tmp_path)))
    for key in (
        "blip.visual_encoder.norm.bias",
        "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
        "mlp.layers.7.weight",
    ):
        save_file({k: t for k, t in tensors.items() if k != key}, file)
        said = refusal(name="imagereward", weights=tmp_path, processor=tmp_path)
        assert said.startswith("AFA-METRIC-021")
        assert said.endswith(" zai-org/ImageReward.")


def test_only_what_is_needed_is_downloaded(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked[name] = allow_patterns
        return str(clip if name == "someone/clip" else tmp_path)

    monkeypatch.setattr("afa.loading.sources.snapshot_download", download)
    open_metric(MetricRecipe(name="clip_t", weights="someone/clip"))
    assert "model.safetensors" in asked["someone/clip"]
    assert not any(".bin" in p or ".pt" in p or p.startswith("*") for p in asked["someone/clip"])
    refusal(name="hpsv2", weights="someone/hps", processor="someone/clip")
    assert asked["someone/hps"] == ["HPS_v2.1_compressed.safetensors"]
    with trusting(allow_pickle=True):
        refusal(name="hpsv2", weights="someone/hps", processor="someone/clip")
        refusal(name="imagereward", weights="someone/ir", processor="someone/clip")
    assert "HPS_v2.1_compressed.pt" in asked["someone/hps"]
    assert {"ImageReward.pt", "med_config.json"} < set(asked["someone/ir"])


class StandIn(nn.Module):
    """Takes the place of torch-fidelity's network: same call, another computation."""

    paths: ClassVar[list[str | None]] = []

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None
    ) -> None:
        super().__init__()
        self.width = {"2048": 3, "logits_unbiased": 6}[features_list[0]]
        self.paths.append(feature_extractor_weights_path)

    def forward(self, levels: Tensor) -> tuple[Tensor]:
        assert levels.dtype == torch.uint8
        assert levels.shape[:2] == (1, 3)
        return (levels.float().mean((2, 3)).repeat(1, self.width // 3),)


def test_inception_gets_raw_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module: Any = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fid = open_metric(MetricRecipe(name="fid"))
    assert isinstance(fid, SetMetric)
    features = fid.extractor.features(pictures(2))
    assert features.shape == (2, 3)
    red = [np.asarray(picture)[..., 0].mean() for picture in pictures(2)]
    assert features[:, 0].tolist() == pytest.approx(red, rel=1e-5)
    score = open_metric(MetricRecipe(name="is"))
    assert isinstance(score, SetMetric)
    assert score.extractor.features(pictures(1)).shape == (1, 6)
    assert score.extractor.name != fid.extractor.name
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, file)
    assert "AFA-METRIC-019" in refusal(name="fid", weights=file)
    with trusting(allow_pickle=True):
        open_metric(MetricRecipe(name="fid", weights=str(file)))
    assert StandIn.paths == [None, None, str(file)]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"name": "clip_t"}, "requires weights, .* openai/clip-vit-large-patch14"),
        ({"name": "cmmd"}, "requires weights, .* openai/clip-vit-large-patch14-336"),
        ({"name": "hpsv2", "weights": "a"}, "requires processor, .* laion/CLIP-ViT-H-14"),
        ({"name": "imagereward", "weights": "a"}, "requires processor, .* google-bert/bert-base"),
        ({"name": "aes", "weights": "a"}, "requires clip, .* openai/clip-vit-large-patch14"),
        ({"name": "aes", "weights": "a", "clip": "b", "processor": "c"}, "aes .*processor"),
        ({"name": "fid", "processor": "c"}, "fid .*processor"),
        ({"name": "kid", "weights": "zoo:clip", "processor": "c"}, "kid .*processor"),
        ({"name": "clip_t", "weights": "a", "clip": "b"}, "clip_t .*clip. Remove it"),
        ({"name": "fid", "subset_size": 5}, "fid .*subset_size"),
        ({"name": "clip_t", "weights": "zoo:classifier"}, "clip_t .*zoo:classifier; use zoo:clip"),
        ({"name": "is", "weights": "zoo:clip"}, "use zoo:classifier"),
        ({"name": "pickscore", "weights": "zoo:clip"}, "pickscore .*zoo:clip; the zoo has none"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        MetricRecipe(**recipe)
    file = tmp_path / "metric.yaml"
    file.write_text("".join(f"{key}: {str(value).lower()}\n" for key, value in recipe.items()))
    with pytest.raises(AfaError) as caught:
        read_recipe(file, MetricRecipe)
    assert "\n" not in str(caught.value)


def test_a_recipe_reads_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "metric.yaml"
    file.write_text("name: kid\nweights: zoo:clip\nsubset_size: 50\n")
    recipe = read_recipe(file, MetricRecipe)
    assert recipe == MetricRecipe(name="kid", weights="zoo:clip", subset_size=50)


def test_importing_the_package_imports_no_metric_library() -> None:
    code = (
        "import sys, afa, afa.metrics; "
        "print([m for m in ('torchmetrics', 'torch_fidelity', 'torchvision') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
