"""A second zoo, of transformers: the same scenes and judges, for who wants to check SABW on them.

A base of PixArt's kind and its three experts, made in stages that go on where they were stopped.
Nothing of it ships. Autoencoder, sprites and judges are those of the shipped zoo, so that figures
of the two can be set beside each other.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from afa.files import owned, staged, write_atomic
from afa.studies.zoo_build.evaluate import grade
from afa.studies.zoo_build.workshop import (
    ModelsRecipe,
    TextToImage,
    Workshop,
    require_same_recipe,
    train_models,
)
from afa.zoo import expert_folder
from afa.zoo.judges import load_classifier
from afa.zoo.models import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    MAX_TOKENS,
    TEXT_WIDTH,
    WORDS,
    build_scheduler,
)
from afa.zoo.sprites import load_sprites

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from afa.studies.zoo_build.fit import FitStep

_WIDTH, _NUM_HEADS, _NUM_LAYERS = 160, 5, 6
_POSITION_STD = 2.0  # a head then prefers a few distances to others by factors of e^2
_LETTERS = "abcdefghijklmnopqrstuvwxyz,"
#: what the models' pictures were judged to be
REPORT = "report.json"


@dataclass(frozen=True)
class TransformerRecipe(ModelsRecipe):
    """How long the transformers are trained; the base as long as that of U-Nets.

    With twice the steps it draws every mixed prompt right, and there is nothing to be gained.
    """

    expert_steps: int = 1_000
    num_graded: int = 96  # prompts of each kind for each model


class PixArt(TextToImage):
    """Transformer and text encoder of a PixArt model, 2.9 M parameters."""

    def __init__(self, tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.pad = tokenizer.pad_token_id
        self.transformer = build_transformer()
        self.text_encoder = build_t5(tokenizer)

    def forward(self, noisy: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        """See `TextToImage.forward`."""
        mask = token_ids != self.pad
        return self.transformer(
            noisy,
            encoder_hidden_states=self.text_encoder(token_ids, mask).last_hidden_state,
            encoder_attention_mask=mask.to(noisy.dtype),
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample


def build_transformer() -> PixArtTransformer2DModel:
    """The denoiser: 8x8 patches of 2x2 latents, six blocks, no learned variance."""
    return PixArtTransformer2DModel(
        num_attention_heads=_NUM_HEADS,
        attention_head_dim=_WIDTH // _NUM_HEADS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=_NUM_LAYERS,
        patch_size=2,
        sample_size=LATENT_SIZE,
        cross_attention_dim=_WIDTH,
        caption_channels=TEXT_WIDTH,
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The caption encoder: [B, L] token ids to [B, L, 96].

    T5 knows the order of words by its relative position biases alone. They start near zero, and a
    rate of 1e-3 moves them by a thousandth a step: for thousands of steps "on the left" would
    belong to either object. Started wide, every head looks at places of its own from the first.
    """
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 4,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    )
    for name, parameter in encoder.named_parameters():
        if name.endswith("relative_attention_bias.weight"):
            nn.init.normal_(parameter, std=_POSITION_STD)
    return encoder


def build_t5_tokenizer() -> T5Tokenizer:
    """A unigram vocabulary with every word of a caption, and letters for any other text."""
    pieces = ["▁", *(f"▁{word}" for word in WORDS), *_LETTERS]
    scores = [-float(len(pieces) + 1)] + [-1.0] * len(WORDS) + [-10.0] * len(_LETTERS)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0)]
    vocab = [*special, *zip(pieces, scores, strict=True)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)


def build_transformer_zoo(
    folder: Path, recipe: TransformerRecipe | None = None
) -> Iterator[FitStep]:
    """Train everything, stage after stage; continue where an earlier run was stopped.

    Args:
        folder: gets checkpoints, and at the end `base`, `animals`, `food` and `things` as stock
            pipelines, and `report.json`.
        recipe: how long.

    Raises:
        AfaError: the folder is of another recipe.
    """
    recipe = recipe or TransformerRecipe()
    with owned(folder):
        require_same_recipe(folder / "recipe.json", recipe)
        tokenizer = build_t5_tokenizer()
        shop = Workshop(folder, recipe, load_sprites(), tokenizer)
        vae = AutoencoderKL.from_pretrained(expert_folder("base") / "vae").requires_grad_(False)
        models = yield from train_models(shop, vae, lambda: PixArt(tokenizer))
        folders = {name: folder / name for name in models}
        for name, made in folders.items():
            if made.exists() and not _is_of(models[name], made):
                shutil.rmtree(made)
            if not made.exists():
                with staged(made) as partial:
                    _pipeline(models[name], tokenizer, vae).save_pretrained(partial)
        report = yield from grade(folders, load_classifier(), num_prompts=recipe.num_graded)
        write_atomic(folder / REPORT, json.dumps(report, indent=2) + "\n")


def _is_of(model: Any, folder: Path) -> bool:
    """Whether a pipeline's folder has this model's weights, and not those of an earlier one."""
    kept = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    own = model.transformer.state_dict()
    return kept.keys() == own.keys() and all(torch.equal(kept[key], own[key]) for key in kept)


def _pipeline(model: Any, tokenizer: T5Tokenizer, vae: AutoencoderKL) -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder,
        vae=vae,
        transformer=model.transformer,
        scheduler=build_scheduler(),
    )
