"""The zoo's networks and their sizes; classes are those of diffusers and transformers if possible.

The models are small versions of Stable Diffusion 1.x, so the same code loads, trains and draws with
the zoo and with real checkpoints.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from afa.aggregators import SABWConfig
from afa.files import write_atomic
from afa.zoo.scenes import BACKGROUNDS, IMAGE_SIZE
from afa.zoo.sprites import OBJECTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

LATENT_SIZE = IMAGE_SIZE // 4
LATENT_CHANNELS = 8
_END = "</w>"  # CLIP's suffix of tokens at the end of a word
_GRAMMAR = "a an on the left and right background ,"  # words of captions besides names
#: all words of captions, and the comma
WORDS = sorted({*_GRAMMAR.split(), *OBJECTS, *BACKGROUNDS})
MAX_TOKENS = 24  # a caption takes 16
TEXT_WIDTH = 96
CLIP_WIDTH = 64
NUM_CLASSES = len(OBJECTS) + 1  # the last class is "no object of the zoo"

#: the settings of the bundled ensemble and of `afa demo`: 1.7 M parameters at 9 sites
AGGREGATOR = SABWConfig(hidden_size=64, num_layers=1, num_heads=4, norm_num_groups=16)


def build_vae() -> AutoencoderKL:
    """The autoencoder, with [8, 16, 16] latents; without attention it can be trained on crops."""
    return AutoencoderKL(
        block_out_channels=(16, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def build_unet(channels: tuple[int, int] = (32, 96)) -> UNet2DConditionModel:
    """The denoiser: convolutions at 16x16, attention at 8x8.

    Args:
        channels: of both resolutions, multiples of 8; 2.0 M parameters by default.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion with its terminal SNR set to zero.

    Plain backgrounds need it: with the usual schedule the mean brightness leaks into the last
    step (Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are Flawed", 2024).
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def _text_settings(tokenizer: CLIPTokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": CLIP_WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The caption encoder: [B, 24] token ids to [B, 24, 96]."""
    return CLIPTextModel(CLIPTextConfig(**_text_settings(tokenizer)))


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The CLIP model, a judge that compares pictures with pictures and with captions."""
    vision = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": CLIP_WIDTH,
    }
    return CLIPModel(
        CLIPConfig(
            text_config=_text_settings(tokenizer), vision_config=vision, projection_dim=CLIP_WIDTH
        )
    )


def build_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """Make a CLIP tokenizer for the words of captions, and save it to `folder`.

    The vocabulary has CLIP's layout: bytes, bytes at the end of a word, merges, and two special
    tokens. Every word of a caption is one token; any other text is split into letters.
    """
    merges = byte_pair_merges(words)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}{_END}" for letter in letters)]
    tokens += [*(first + second for first, second in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "vocab.json", json.dumps({token: n for n, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    write_atomic(folder / "merges.txt", "\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def byte_pair_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair until every word is one token (Sennrich et al., 2016).

    Ties are broken alphabetically, so that the vocabulary is the same in every run; trainers of
    libraries do not guarantee this.
    """
    spellings = [[*word[:-1], word[-1] + _END] for word in sorted(words)]
    merges = []
    while any(len(spelling) > 1 for spelling in spellings):
        counts = Counter(pair for spelling in spellings for pair in pairwise(spelling))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for spelling in spellings:
            place = 0
            while place < len(spelling) - 1:
                if (spelling[place], spelling[place + 1]) == best:
                    spelling[place : place + 2] = ["".join(best)]
                place += 1
    return merges


class ObjectClassifier(nn.Module):
    """Classify the object on one half of a picture.

    The last class is everything that is no object of the zoo: plain background, a mixture of two
    objects, or an incomplete object.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 96):
            layers += [nn.Conv2d(channels, width, 3, padding=1, stride=2), nn.GroupNorm(8, width)]
            layers += [nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * 2, NUM_CLASSES)

    def forward(self, half: torch.Tensor) -> torch.Tensor:
        """Compute logits [B, 49] of halves [B, 3, 64, 32], RGB from -1 to 1."""
        hidden = self.features(half).flatten(2)
        return self.head(torch.cat([hidden.mean(-1), hidden.amax(-1)], dim=1))
