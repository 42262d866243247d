"""The zoo's training loop and its stages."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import afa
from afa.cli import main
from afa.studies.zoo_build.build import ZooRecipe, build_zoo, spoil, train_vae
from afa.studies.zoo_build.evaluate import draw_pictures
from afa.studies.zoo_build.fit import FitStep, fit
from afa.studies.zoo_build.transformer import (
    PixArt,
    TransformerRecipe,
    build_t5,
    build_t5_tokenizer,
    build_transformer_zoo,
)
from afa.studies.zoo_build.workshop import Workshop
from afa.zoo.models import build_vae
from afa.zoo.scenes import evaluation_prompts
from afa.zoo.sprites import load_sprites
from tests.refusal import refusal


def steps_of(
    model: nn.Linear, checkpoint: Path, num_steps: int = 20, made_from: str = ""
) -> list[FitStep]:
    def loss_of(generator: torch.Generator) -> torch.Tensor:
        inputs = torch.randn(8, 2, generator=generator)
        return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()

    return list(
        fit(
            "line",
            model,
            loss_of,
            num_steps=num_steps,
            checkpoint=checkpoint,
            learning_rate=0.1,
            num_warmup_steps=2,
            ema_decay=0.5,
            checkpoint_every=5,
            made_from=made_from,
        )
    )


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def test_it_learns_and_holds_the_average(tmp_path: Path) -> None:
    model = line()
    steps = steps_of(model, tmp_path / "line.ckpt", 100)
    assert steps[-1].loss < 0.05 * steps[0].loss
    assert not model.training
    state = torch.load(tmp_path / "line.ckpt", weights_only=True)
    assert torch.equal(model.weight, state["average"]["weight"])
    assert not torch.equal(model.weight, state["model"]["weight"])


def test_stopped_and_continued_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    whole, parts = line(), line()
    expected = [s.loss for s in steps_of(whole, tmp_path / "whole.ckpt")]

    def stopped(generator: torch.Generator) -> torch.Tensor:
        inputs = torch.randn(8, 2, generator=generator)
        return (parts(inputs) - inputs.sum(1, keepdim=True)).square().mean()

    first = fit(
        "line",
        parts,
        stopped,
        num_steps=20,
        checkpoint=tmp_path / "parts.ckpt",
        learning_rate=0.1,
        num_warmup_steps=2,
        ema_decay=0.5,
        checkpoint_every=5,
    )
    assert [s.loss for s in islice(first, 7)] == expected[:7]
    parts = line()
    rest = steps_of(parts, tmp_path / "parts.ckpt")
    assert [(s.step, s.loss) for s in rest] == list(enumerate(expected, start=1))[5:]
    assert torch.equal(whole.weight, parts.weight)
    # and once more changes nothing
    again = line()
    assert steps_of(again, tmp_path / "parts.ckpt") == []
    assert torch.equal(whole.weight, again.weight)


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "line.ckpt").write_bytes(b"not what torch writes")
    with refusal("AFA-MACHINE-002", "line.ckpt"):
        steps_of(line(), tmp_path / "line.ckpt")


def test_a_stage_that_an_earlier_one_was_made_again_for(tmp_path: Path) -> None:
    """A finished checkpoint of other data, or of another autoencoder, is not taken for this."""
    steps_of(line(), tmp_path / "line.ckpt", made_from="an autoencoder")
    assert steps_of(line(), tmp_path / "line.ckpt", made_from="an autoencoder") == []
    with refusal("AFA-STUDY-007", "line.ckpt"):
        steps_of(line(), tmp_path / "line.ckpt", made_from="another")


def test_other_sprites_are_another_zoo(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, ZooRecipe(vae_steps=1, vae_batch_size=1), load_sprites(), None)
    list(train_vae(shop, build_vae()))
    name = next(iter(shop.sprites))
    other = replace(shop, sprites={**shop.sprites, name: shop.sprites[name] * np.float32(0.5)})
    with refusal("AFA-STUDY-007", "vae.ckpt"):
        list(train_vae(other, build_vae()))


def test_spoilt_halves_are_no_halves() -> None:
    halves = torch.rand(20, 3, 64, 32)
    spoilt = spoil(halves, torch.Generator().manual_seed(0))
    assert spoilt.shape == halves.shape
    assert not any(torch.equal(a, b) for a, b in zip(halves, spoilt, strict=True))


@pytest.mark.nightly
def test_the_whole_zoo_in_few_steps(tmp_path: Path) -> None:
    recipe = ZooRecipe(
        num_scenes=64,
        vae_steps=2,
        vae_batch_size=2,
        base_steps=2,
        expert_steps=2,
        batch_size=2,
        judge_steps=2,
        ensemble_steps=2,
        ensemble_batch_size=2,
        num_graded=2,
    )
    stages = [s.name for s in build_zoo(tmp_path / "work", recipe)]
    order = ["vae", "classifier", "clip", "base", "animals", "food", "things", "ensemble", "grades"]
    assert list(dict.fromkeys(stages)) == order
    made = tmp_path / "work" / "assets"
    assert {p.name for p in made.iterdir()} == {
        "base",
        "animals",
        "food",
        "things",
        "shared",
        "judges",
        "ensemble",
        "report.json",
    }
    with refusal("AFA-STUDY-008", "recipe.json"):
        next(build_zoo(tmp_path / "work", replace(recipe, seed=1)))
    # only the grades are given again, everything else is done
    assert {s.name for s in build_zoo(tmp_path / "work", recipe)} == {"grades"}
    config = (made / "ensemble" / "config.json").read_text()
    assert '"source": "zoo:animals"' in config
    base, fox = (
        load_file(made / n / "unet" / "diffusion_pytorch_model.safetensors")
        for n in ("base", "animals")
    )
    assert base.keys() == fox.keys()
    assert not torch.equal(base["conv_in.weight"], fox["conv_in.weight"])


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = build_t5_tokenizer()
    caption = evaluation_prompts(1)[0]
    words = caption.replace(",", " ,").split()
    ids = tokenizer(caption).input_ids
    assert len(ids) == len(words) + 1  # and the end
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.unk_token_id not in tokenizer("quartz, a zebra").input_ids


def test_an_untrained_t5_tells_the_left_object_from_the_right_one() -> None:
    torch.manual_seed(0)
    tokenizer = build_t5_tokenizer()
    captions = [
        "a fox on the left and a pizza on the right, blue background",
        "a pizza on the left and a fox on the right, blue background",
    ]
    ids = tokenizer(captions, return_tensors="pt").input_ids
    with torch.no_grad():
        features = build_t5(tokenizer).eval()(ids).last_hidden_state
    fox = tokenizer.convert_tokens_to_ids("▁fox")
    left, right = features[ids == fox]
    # with biases as the library starts them it is 0.03
    assert (left - right).norm() > 0.1 * left.norm()


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    tokenizer = build_t5_tokenizer()
    model = PixArt(tokenizer).eval()
    noisy, timestep = torch.randn(1, 8, 16, 16), torch.tensor([5])
    outputs = []
    for length in (24, 40):
        ids = tokenizer(
            ["a fox"], padding="max_length", max_length=length, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            outputs.append(model(noisy, timestep, ids))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


@pytest.mark.nightly
def test_a_zoo_of_transformers_in_few_steps(tmp_path: Path) -> None:
    recipe = TransformerRecipe(
        num_scenes=64, base_steps=2, expert_steps=2, batch_size=2, num_graded=2
    )
    folder = tmp_path / "zoo"
    stages = [s.name for s in islice(build_transformer_zoo(folder, recipe), 5)]
    assert stages == ["base", "base", "animals", "animals", "food"]
    # stopped, it goes on with what is left
    rest = [s.name for s in build_transformer_zoo(folder, recipe)]
    assert list(dict.fromkeys(rest)) == ["food", "things", "grades"]
    with refusal("AFA-STUDY-008", "recipe.json"):
        next(build_transformer_zoo(folder, replace(recipe, seed=1)))
    pipeline = afa.load_pipeline([folder / name for name in ("animals", "food", "things")])
    assert type(pipeline).__name__ == "PixArtAlphaPipeline"
    assert len(draw_pictures(pipeline, evaluation_prompts(2), num_steps=1)) == 2
    with pytest.raises(SystemExit) as stop:
        main(["zoo", "build", str(tmp_path / "x"), "--family", "dit", "--font", "x.ttf"])
    assert stop.value.code == 2
