"""A second zoo, of diffusion transformers, to evaluate SABW on them.

Trains a base of the PixArt family and three experts in resumable stages. The package does not
include the result. Scenes, autoencoder and judges are those of the bundled zoo, so that results of
both zoos are comparable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from afa.machine.ownership import owned
from afa.studies.zoo_build.other_zoo import train_other_zoo
from afa.studies.zoo_build.workshop import (
    ModelsRecipe,
    TextToImage,
    Workshop,
    require_same_recipe,
)
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
_POSITION_STD = 2.0  # makes a head prefer some distances by factors of e^2
_LETTERS = "abcdefghijklmnopqrstuvwxyz,"


@dataclass(frozen=True)
class TransformerRecipe(ModelsRecipe):
    """Settings of the training; the base has as many steps as that of the U-Nets.

    With twice the steps, the base draws all mixed prompts correctly and leaves no room for
    improvement.
    """

    expert_steps: int = 1_000
    num_graded: int = 96  # prompts of each kind for each model


class PixArt(TextToImage):
    """The transformer and the text encoder of a PixArt model with 2.9 M parameters."""

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

    def pipeline(self, tokenizer: Any, vae: AutoencoderKL) -> PixArtAlphaPipeline:
        """See `TextToImage.pipeline`."""
        return PixArtAlphaPipeline(
            tokenizer=tokenizer,
            text_encoder=self.text_encoder,
            vae=vae,
            transformer=self.transformer,
            scheduler=build_scheduler(),
        )


def build_transformer() -> PixArtTransformer2DModel:
    """Build the denoiser: 8x8 patches of 2x2 latents, six blocks, no learned variance."""
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
    """Build the text encoder: token ids [B, L] to [B, L, 96].

    T5 encodes word order only in its relative position biases. The default initialization is near
    zero, and a learning rate of 1e-3 changes it by 0.001 per step, so for thousands of steps the
    model could not assign "on the left" to an object. A wide initialization avoids this.
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
    """Build a unigram tokenizer with all words of captions, and letters for other text."""
    pieces = ["▁", *(f"▁{word}" for word in WORDS), *_LETTERS]
    scores = [-float(len(pieces) + 1)] + [-1.0] * len(WORDS) + [-10.0] * len(_LETTERS)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0)]
    vocab = [*special, *zip(pieces, scores, strict=True)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)


def build_transformer_zoo(
    folder: Path, recipe: TransformerRecipe | None = None
) -> Iterator[FitStep]:
    """Train all stages, and resume an earlier run.

    Args:
        folder: output folder of checkpoints, and at the end of `base`, `animals`, `food` and
            `things` as diffusers pipelines, and of `report.json`.
        recipe: settings; None uses the defaults.

    Yields:
        The progress.

    Raises:
        AfaError: if the folder belongs to another recipe.
    """
    recipe = recipe or TransformerRecipe()
    with owned(folder):
        require_same_recipe(folder / "recipe.json", asdict(recipe))
        tokenizer = build_t5_tokenizer()
        shop = Workshop(folder, recipe, load_sprites(), tokenizer)
        yield from train_other_zoo(shop, lambda: PixArt(tokenizer), recipe.num_graded)
