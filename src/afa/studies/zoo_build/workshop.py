"""Shared stages of all zoos: scenes as tensors, and the training of a base and its experts."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F

from afa.ensemble.text import hash_weights
from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.studies.zoo_build.fit import FitStep, fit
from afa.zoo.models import build_scheduler, build_text_encoder, build_unet
from afa.zoo.scenes import scene
from afa.zoo.sprites import DOMAINS, hash_sprites

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTokenizer

    from afa.zoo.scenes import Scene
    from afa.zoo.sprites import Sprites


@dataclass(frozen=True)
class ModelsRecipe:
    """Settings of the training of a base and its experts."""

    seed: int = 0
    num_scenes: int = 16_384  # per kind of data, encoded once
    base_steps: int = 3_000
    expert_steps: int = 2_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    caption_dropout: float = 0.1


class Settings(Protocol):
    """What all stages need of a recipe."""

    @property
    def seed(self) -> int:
        """The seed of the scenes."""

    @property
    def num_scenes(self) -> int:
        """The number of scenes of each kind of data."""

    @property
    def batch_size(self) -> int:
        """The number of scenes in a step."""

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""

    @property
    def caption_dropout(self) -> float:
        """The fraction of captions that are dropped."""


Recipe = TypeVar("Recipe", bound=Settings)


@dataclass(frozen=True)
class Workshop(Generic[Recipe]):
    """The inputs of all stages: work folder, recipe, sprites and tokenizer.

    `stream` selects a stream of scenes: 0 trains models, 1 and 2 train the judges.
    """

    folder: Path
    recipe: Recipe
    sprites: Sprites
    tokenizer: Any

    def scene(self, index: int, kind: Any, stream: int = 0) -> Scene:
        """The scene at `index` of a stream."""
        return scene(index, kind=kind, seed=self.recipe.seed + stream)

    def pixels(self, indices: Tensor, kind: str, stream: int = 0) -> Tensor:
        """Render scenes: [B, 3, 64, 64] in -1..1."""
        scenes = [self.scene(int(i), kind, stream) for i in indices]
        pictures = np.stack([shown.render(self.sprites) for shown in scenes])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Tokenize captions: ids [B, 24]."""
        return self.tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        )["input_ids"]

    def fit(
        self,
        name: str,
        model: nn.Module,
        loss_of: Callable[[torch.Generator], Tensor],
        num_steps: int,
        learning_rate: float = 1e-3,
        made_from: str | None = None,
    ) -> Iterator[FitStep]:
        """Train a model with a checkpoint in the folder, see `fit`; made from sprites if None."""
        return fit(
            name,
            model,
            loss_of,
            num_steps=num_steps,
            checkpoint=self.folder / f"{name}.ckpt",
            learning_rate=learning_rate,
            made_from=hash_sprites(self.sprites) if made_from is None else made_from,
        )


@torch.no_grad()
def encode_scenes(shop: Workshop[Any], vae: AutoencoderKL, kind: str) -> tuple[Tensor, Tensor]:
    """Encode `num_scenes` scenes to unscaled latents [S, 8, 16, 16] and token ids [S, 24].

    Stores them in the work folder with a hash of their inputs, so that a resumed run reuses them.
    """
    file = shop.folder / f"scenes-{kind}.safetensors"
    digest = hashlib.sha256(f"{hash_weights(vae)} {hash_sprites(shop.sprites)}".encode())
    if file.exists():
        with safe_open(file, framework="pt") as opened:
            made_from = opened.metadata().get("made_from")
        if made_from == digest.hexdigest():
            tensors = load_file(file)
            return tensors["latents"], tensors["token_ids"]
    batches = torch.arange(shop.recipe.num_scenes).split(128)
    latents = [vae.encode(shop.pixels(batch, kind)).latent_dist.mean for batch in batches]
    captions = [shop.scene(i, kind).caption for i in range(shop.recipe.num_scenes)]
    tensors = {"latents": torch.cat(latents).contiguous(), "token_ids": shop.tokenize(captions)}
    write_atomic(file, save(tensors, metadata={"made_from": digest.hexdigest()}))
    return tensors["latents"], tensors["token_ids"]


class TextToImage(nn.Module, ABC):
    """The trained parts of a model: its denoiser and its text encoder."""

    @abstractmethod
    def forward(self, noisy: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        """Predict the velocity [B, 8, 16, 16] of noisy latents for captions [B, 24]."""

    @abstractmethod
    def pipeline(self, tokenizer: Any, vae: AutoencoderKL) -> DiffusionPipeline:
        """Assemble the pipeline of this model."""


Model = TypeVar("Model", bound=TextToImage)


def train_models(
    shop: Workshop[Any], vae: AutoencoderKL, build: Callable[[], Model], made_from: str = ""
) -> Generator[FitStep, None, dict[str, Model]]:
    """Train a base on all pairs of objects, then fine-tune it to one expert per domain.

    Args:
        shop: the recipe and the folder of the checkpoints.
        vae: the autoencoder, with its scaling factor in the configuration.
        build: builds the base with random weights.
        made_from: a hash of what `build` uses besides the recipe.

    Returns:
        `base` and the experts, by name.
    """
    scale = vae.config.scaling_factor
    latents, token_ids = encode_scenes(shop, vae, "any")
    torch.manual_seed(shop.recipe.seed)
    models = {"base": build()}
    scenes_from = f"{hash_weights(vae)} {hash_sprites(shop.sprites)}"
    scenes_from = f"{scenes_from} {made_from}" if made_from else scenes_from
    recipe, base = shop.recipe, models["base"]
    yield from train_text_to_image(
        shop, "base", base, latents * scale, token_ids, recipe.base_steps, scenes_from
    )
    base_from = f"{scenes_from} {hash_weights(base)}"
    for domain in DOMAINS:
        expert = models[domain] = copy.deepcopy(base)
        latents, token_ids = encode_scenes(shop, vae, domain)
        yield from train_text_to_image(
            shop, domain, expert, latents * scale, token_ids, recipe.expert_steps, base_from
        )
    return models


def train_text_to_image(
    shop: Workshop[Any],
    name: str,
    model: TextToImage,
    latents: Tensor,
    token_ids: Tensor,
    num_steps: int,
    made_from: str = "",
    learning_rate: float | None = None,
) -> Iterator[FitStep]:
    """Train a model on velocity (Salimans & Ho, 2022), with independent caption dropout.

    Args:
        shop: the recipe and the folder of the checkpoint.
        name: name of the checkpoint and of the progress.
        model: the model; all parameters are trained.
        latents: scaled latents [S, 8, 16, 16].
        token_ids: token ids of their captions [S, 24].
        num_steps: see `fit`.
        made_from: see `fit`.
        learning_rate: see `fit`; None uses the recipe's.
    """
    recipe, empty_ids = shop.recipe, shop.tokenize([""])[0]
    scheduler = build_scheduler()

    def loss_of(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(latents), (recipe.batch_size,), generator=generator)
        clean = latents[pick]
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(1000, (len(pick),), generator=generator)
        dropped = torch.rand(len(pick), generator=generator) < recipe.caption_dropout
        ids = torch.where(dropped[:, None], empty_ids, token_ids[pick])
        noisy = scheduler.add_noise(clean, noise, timestep)
        target = scheduler.get_velocity(clean, noise, timestep)
        return F.mse_loss(model(noisy, timestep, ids), target)

    rate = recipe.learning_rate if learning_rate is None else learning_rate
    yield from shop.fit(name, model, loss_of, num_steps, rate, made_from)


def require_same_recipe(path: Path, settings: Mapping[str, Any]) -> None:
    """Require that the checkpoints in a work folder were made by this recipe; stores the recipe.

    Raises:
        AfaError: if they were made by another recipe, or their recipe is missing.
    """
    is_foreign = any(path.parent.glob("*.ckpt")) and not path.exists()
    if is_foreign or (path.exists() and read_json(path) != settings):
        raise AfaError(
            "AFA-STUDY-008",
            f"The work folder '{path.parent}' contains checkpoints of another recipe: '{path}' "
            f"{'is missing' if is_foreign else 'differs'}. Pass another folder.",
        )
    write_atomic(path, json.dumps(settings, indent=2) + "\n")


class StableDiffusion(TextToImage):
    """The U-Net and the text encoder of a Stable Diffusion model.

    Args:
        tokenizer: for the vocabulary.
        unet: with random weights; None builds that of the bundled models.
    """

    def __init__(self, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel | None = None) -> None:
        super().__init__()
        self.unet = build_unet() if unet is None else unet
        self.text_encoder = build_text_encoder(tokenizer)

    def forward(self, noisy: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        """See `TextToImage.forward`."""
        text = self.text_encoder(token_ids).last_hidden_state
        return self.unet(noisy, timestep, text).sample

    def pipeline(self, tokenizer: Any, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """See `TextToImage.pipeline`."""
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=tokenizer,
            unet=self.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
