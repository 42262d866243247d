"""Readers of the public weights, on tiny random ones in the same file formats."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from afa.metrics import (
    MetricRecipe,
    ReferenceScorer,
    SetMetric,
    cosine_scores,
    frechet_distance,
    open_metric,
    open_metrics,
)
from afa.metrics.clip import ClipScorer
from afa.metrics.hpsv2 import open_clip_config
from afa.metrics.imagereward import MEAN, STD, ImageRewardScorer, blip_configs
from afa.policy import trusting
from tests.metrics.tiny import (
    MED_CONFIG,
    PROMPTS,
    blip_tensors,
    head_tensors,
    open_clip_tensors,
    pictures,
    shake,
    tiny_blip,
    tiny_clip,
    write_bert_tokenizer,
    write_clip,
    write_processor,
)
from tests.refusal import refusal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import CLIPModel

    from afa.metrics import ImageScorer
    from afa.metrics.recipe import MetricName


def open_scorer(recipe: MetricRecipe) -> ImageScorer:
    metric = open_metric(recipe)
    assert not isinstance(metric, ReferenceScorer | SetMetric)
    return metric


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    return folder, write_clip(folder)


@torch.no_grad()
def stock_embeddings(folder: Path, model: CLIPModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-length embeddings by transformers' own forward, in one padded batch."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    output = model(**tokens, pixel_values=pixels)
    return output.image_embeds, output.text_embeds


def stock_pixels(folder: Path) -> Tensor:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(pictures(), return_tensors="pt")["pixel_values"]


def torchvision_pixels(folder: Path) -> Tensor:
    """The same with the margins of the crop rounded, as by the authors' torchvision."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    side, found = processor.crop_size["height"], []
    for picture in pictures():
        whole = processor(picture, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
        top, left = (round((size - side) / 2) for size in whole.shape[1:])
        found.append(whole[:, top : top + side, left : left + side])
    return torch.stack(found)


def test_clip_t_is_the_cosine_of_transformers(clip: tuple[Path, CLIPModel]) -> None:
    folder, model = clip
    image, text = stock_embeddings(folder, model, stock_pixels(folder))
    metric = open_scorer(MetricRecipe(name="clip_t", weights=str(folder)))
    scores = metric.score(pictures(), PROMPTS)
    assert scores == pytest.approx((image * text).sum(1).tolist(), abs=1e-5)
    assert max(scores) - min(scores) > 0.01


def test_a_long_prompt_is_cut(clip: tuple[Path, CLIPModel]) -> None:
    metric = open_scorer(MetricRecipe(name="clip_t", weights=str(clip[0])))
    long = ", ".join(["a fox on the left"] * 40)
    assert metric.score(pictures(1), [long]) == metric.score(pictures(1), [f"{long}, a pizza"])
    assert metric.score(pictures(1), [long]) != metric.score(pictures(1), ["a fox on the left"])


def test_clip_features_are_those_of_transformers(clip: tuple[Path, CLIPModel]) -> None:
    folder, model = clip
    image, _ = stock_embeddings(folder, model, stock_pixels(folder))
    names: tuple[MetricName, ...] = ("clip_i", "cmmd", "fid", "kid")
    metrics = open_metrics([MetricRecipe(name=name, weights=str(folder)) for name in names])
    first = metrics[0]
    assert isinstance(first, ReferenceScorer)
    features = first.extractor.features(pictures())
    assert features.dtype == torch.float32
    torch.testing.assert_close(F.normalize(features), image, rtol=0, atol=1e-5)
    for metric in metrics[1:]:
        assert isinstance(metric, SetMetric)
        assert metric.extractor is first.extractor


def test_pickscore_is_the_scaled_cosine(clip: tuple[Path, CLIPModel], tmp_path: Path) -> None:
    folder, model = clip
    model = copy.deepcopy(model)
    model.logit_scale.data.fill_(4.587)
    model.save_pretrained(tmp_path)
    image, text = stock_embeddings(folder, model, stock_pixels(folder))
    recipe = MetricRecipe(name="pickscore", weights=str(tmp_path), processor=str(folder))
    scores = open_scorer(recipe).score(pictures(), PROMPTS)
    expected = model.logit_scale.exp().item() * (image * text).sum(1)
    assert scores == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_hpsv2_is_the_cosine_of_the_same_clip(tmp_path: Path, suffix: str) -> None:
    model = tiny_clip(write_processor(tmp_path / "processor"))
    tensors = open_clip_tensors(model)
    file = tmp_path / f"HPS_v2.1_compressed{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    image, text = stock_embeddings(
        tmp_path / "processor", model, torchvision_pixels(tmp_path / "processor")
    )
    for weights in (file, tmp_path):
        recipe = MetricRecipe(
            name="hpsv2",
            weights=str(weights),
            processor=str(tmp_path / "processor"),
        )
        with trusting(allow_pickle=suffix == ".pt"):
            scores = open_scorer(recipe).score(pictures(), PROMPTS)
        assert scores == pytest.approx((image * text).sum(1).tolist(), abs=1e-5)


def test_hpsv2_weights_arrive_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_clip(write_processor(tmp_path))
    torch.save({"state_dict": open_clip_tensors(model)}, tmp_path / "HPS_v2.1_compressed.pt")
    recipe = MetricRecipe(name="hpsv2", weights=str(tmp_path), processor=str(tmp_path))
    with trusting(allow_pickle=True):
        metric = open_metric(recipe)
    assert isinstance(metric, ClipScorer)
    read = metric.encoder.model.state_dict()
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in model.state_dict().items())


def test_the_published_sizes_have_sixteen_heads() -> None:
    """Shapes do not tell the heads of ViT-H/14 and of BLIP's ViT-L."""

    def shape(*sizes: int) -> Tensor:
        return torch.empty(sizes, device="meta")

    hpsv2 = open_clip_config(
        {
            "token_embedding.weight": shape(49_408, 1024),
            "positional_embedding": shape(77, 1024),
            "text_projection": shape(1024, 1024),
            "transformer.resblocks.0.mlp.c_fc.bias": shape(4096),
            "visual.conv1.weight": shape(1280, 3, 14, 14),
            "visual.positional_embedding": shape(257, 1280),
            "visual.transformer.resblocks.0.mlp.c_fc.bias": shape(5120),
        }
    )
    assert hpsv2.text_config.num_attention_heads == 16
    assert hpsv2.vision_config.num_attention_heads == 16
    assert hpsv2.vision_config.image_size == 224
    see = "blip.visual_encoder."
    blip, _ = blip_configs(
        {
            f"{see}patch_embed.proj.weight": shape(1024, 3, 16, 16),
            f"{see}pos_embed": shape(1, 197, 1024),
            f"{see}blocks.0.mlp.fc1.bias": shape(4096),
        },
        {**MED_CONFIG, "vocab_size": 30_524},
    )
    assert (blip.num_attention_heads, blip.image_size) == (16, 224)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aes_is_linear_in_the_unit_embedding(
    clip: tuple[Path, CLIPModel], tmp_path: Path, suffix: str
) -> None:
    folder, model = clip
    tensors = head_tensors(24, "layers.")
    file = tmp_path / f"sac+logos+ava1-l14-linearMSE{suffix}"
    torch.save(tensors, file) if suffix == ".pth" else save_file(tensors, file)
    expected, _ = stock_embeddings(folder, model, stock_pixels(folder))
    for number in (0, 2, 4, 6, 7):
        weight, bias = (tensors[f"layers.{number}.{part}"] for part in ("weight", "bias"))
        expected = expected @ weight.T + bias
    recipe = MetricRecipe(name="aes", weights=str(file), clip=str(folder))
    with trusting(allow_pickle=suffix == ".pth"):
        metric = open_scorer(recipe)
    scores = metric.score(pictures(), PROMPTS)
    assert scores == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    assert metric.score(pictures(), PROMPTS[::-1]) == scores


def test_imagereward_is_blip_and_a_head(tmp_path: Path) -> None:
    tokenizer = write_bert_tokenizer(tmp_path / "bert")
    vision, text = tiny_blip(len(tokenizer) + 2)  # BLIP adds two tokens to BERT's
    head = head_tensors(36, "mlp.layers.")
    torch.save(blip_tensors(vision, text, head), tmp_path / "ImageReward.pt")
    settings = {**MED_CONFIG, "vocab_size": len(tokenizer) + 2, "encoder_width": 768}
    (tmp_path / "med_config.json").write_text(json.dumps(settings))
    recipe = MetricRecipe(
        name="imagereward",
        weights=str(tmp_path),
        processor=str(tmp_path / "bert"),
    )
    with trusting(allow_pickle=True):
        metric = open_metric(recipe)
    assert isinstance(metric, ImageRewardScorer)
    for mine, theirs in ((metric.vision, vision), (metric.text, text)):
        read = mine.state_dict()
        assert read.keys() == theirs.state_dict().keys()
        assert all(torch.equal(read[key], tensor) for key, tensor in theirs.state_dict().items())

    prompts = ["a fox on the left", "an odd pizza", "z " * 60]
    write_processor(tmp_path / "processor", size=32)
    with torch.no_grad():
        seen = vision(torchvision_pixels(tmp_path / "processor")).last_hidden_state
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        reward = text(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
        ).last_hidden_state[:, 0]
    for number in (0, 2, 4, 6, 7):
        weight, bias = (head[f"mlp.layers.{number}.{part}"] for part in ("weight", "bias"))
        reward = reward @ weight.T + bias
    expected = ((reward[:, 0] - MEAN) / STD).tolist()
    scores = metric.score(pictures(), prompts)
    assert scores == pytest.approx(expected, abs=1e-4)
    assert all(abs(first - second) > 1e-3 for first, second in pairwise(scores))
    assert metric.score(pictures()[:1], [prompts[1]]) != pytest.approx(scores[:1], abs=1e-3)


def test_a_vision_transformer_gives_its_class_token(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = shake(Dinov2Model(config))
    model.save_pretrained(tmp_path)
    write_processor(tmp_path)
    metric = open_metric(MetricRecipe(name="fid", weights=str(tmp_path)))
    assert isinstance(metric, SetMetric)
    features = metric.extractor.features(pictures())
    with torch.no_grad():
        expected = model(stock_pixels(tmp_path)).pooler_output
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert metric.compute(features, features + 1) == pytest.approx(24, rel=1e-5)
    assert metric.compute(features[:2], features) == frechet_distance(features[:2], features)


def test_a_batch_changes_no_bit(clip: tuple[Path, CLIPModel]) -> None:
    shown = pictures(5)
    prompts = [*PROMPTS, *PROMPTS[:2]]
    clip_t = open_scorer(MetricRecipe(name="clip_t", weights=str(clip[0])))
    clip_i = open_metric(MetricRecipe(name="clip_i", weights=str(clip[0])))
    assert isinstance(clip_i, ReferenceScorer)
    together = clip_i.extractor.features(shown)
    apart = torch.cat([clip_i.extractor.features(shown[:2]), clip_i.extractor.features(shown[2:])])
    assert torch.equal(together, apart)
    scores = clip_t.score(shown, prompts)
    alone = [
        clip_t.score([picture], [prompt])[0] for picture, prompt in zip(shown, prompts, strict=True)
    ]
    assert scores == alone
    references = together.roll(1, 0)
    pairs = [clip_i.score(together[i : i + 1], references[i : i + 1])[0] for i in range(len(shown))]
    assert clip_i.score(together, references) == pairs == cosine_scores(together, references)


def test_inception_without_its_libraries() -> None:
    names: tuple[MetricName, ...] = ("fid", "kid", "is")
    for name in names:
        with refusal("AFA-METRIC-010", r"'afa\[inception\]'") as caught:
            open_metric(MetricRecipe(name=name))
        assert "\n" not in str(caught.value)
