"""What every zoo is made with: scenes as tensors, and the training of a base and its experts."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
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
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from diffusers import AutoencoderKL
    from torch import Tensor
    from transformers import CLIPTokenizer

    from afa.zoo.scenes import Kind, Scene
    from afa.zoo.sprites import Sprites


@dataclass(frozen=True)
class ModelsRecipe:
    """How long and on how much a base and its experts are trained."""

    seed: int = 0
    num_scenes: int = 16_384  # encoded once for each kind of data
    base_steps: int = 3_000
    expert_steps: int = 2_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    caption_dropout: float = 0.1


Recipe = TypeVar("Recipe", bound=ModelsRecipe)


@dataclass(frozen=True)
class Workshop(Generic[Recipe]):
    """What every stage needs: the folder it writes to, how much to do, what to draw with.

    Streams of scenes are told apart by `stream`: 0 trains models, 1 and 2 the judges.
    """

    folder: Path
    recipe: Recipe
    sprites: Sprites
    tokenizer: Any

    def scene(self, index: int, kind: Kind, stream: int = 0) -> Scene:
        """The scene at `index` of a stream."""
        return scene(index, kind=kind, seed=self.recipe.seed + stream)

    def pixels(self, indices: Tensor, kind: Kind, stream: int = 0) -> Tensor:
        """The pictures of these scenes, [B, 3, 64, 64] in -1..1."""
        scenes = [self.scene(int(i), kind, stream) for i in indices]
        pictures = np.stack([shown.render(self.sprites) for shown in scenes])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids [B, 24]."""
        return self.tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        )["input_ids"]


@torch.no_grad()
def encode_scenes(shop: Workshop[Any], vae: AutoencoderKL, kind: Kind) -> tuple[Tensor, Tensor]:
    """`num_scenes` scenes as latents [S, 8, 16, 16], unscaled, and token ids [S, 24].

    Kept in the work folder, so that going on after a stop is quick, with what they were made from.
    """
    kept = shop.folder / f"scenes-{kind}.safetensors"
    digest = hashlib.sha256(f"{hash_weights(vae)} {hash_sprites(shop.sprites)}".encode())
    if kept.exists():
        with safe_open(kept, framework="pt") as file:
            made_from = file.metadata().get("made_from")
        if made_from == digest.hexdigest():
            tensors = load_file(kept)
            return tensors["latents"], tensors["token_ids"]
    batches = torch.arange(shop.recipe.num_scenes).split(128)
    latents = [vae.encode(shop.pixels(batch, kind)).latent_dist.mean for batch in batches]
    captions = [shop.scene(i, kind).caption for i in range(shop.recipe.num_scenes)]
    tensors = {"latents": torch.cat(latents).contiguous(), "token_ids": shop.tokenize(captions)}
    write_atomic(kept, save(tensors, metadata={"made_from": digest.hexdigest()}))
    return tensors["latents"], tensors["token_ids"]


class TextToImage(nn.Module, ABC):
    """What is trained of a model: its denoiser and its text encoder together."""

    @abstractmethod
    def forward(self, noisy: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        """The velocity [B, 8, 16, 16] of noisy latents, for captions [B, 24]."""


Model = TypeVar("Model", bound=TextToImage)


def train_models(
    shop: Workshop[Any], vae: AutoencoderKL, build: Callable[[], Model]
) -> Generator[FitStep, None, dict[str, Model]]:
    """Train a base on all pairs of objects, then an expert from it for every domain.

    Args:
        shop: how long, and where the checkpoints lie.
        vae: with its scaling factor registered.
        build: makes the base with random weights.

    Returns: `base` and the experts, by name.
    """
    scale = vae.config.scaling_factor
    latents, token_ids = encode_scenes(shop, vae, "any")
    torch.manual_seed(shop.recipe.seed)
    models = {"base": build()}
    scenes_from = f"{hash_weights(vae)} {hash_sprites(shop.sprites)}"
    yield from train_text_to_image(
        shop,
        "base",
        models["base"],
        latents * scale,
        token_ids,
        shop.recipe.base_steps,
        scenes_from,
    )
    base_from = f"{scenes_from} {hash_weights(models['base'])}"
    for domain in DOMAINS:
        models[domain] = copy.deepcopy(models["base"])
        latents, token_ids = encode_scenes(shop, vae, domain)
        yield from train_text_to_image(
            shop,
            domain,
            models[domain],
            latents * scale,
            token_ids,
            shop.recipe.expert_steps,
            base_from,
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
) -> Iterator[FitStep]:
    """Train on velocity (Salimans & Ho, 2022), each caption dropped by itself.

    Args:
        shop: batch size, learning rate, caption dropout, and where the checkpoint lies.
        name: of the checkpoint, and shown in the progress.
        model: all of it is trained.
        latents: scaled latents [S, 8, 16, 16].
        token_ids: their captions [S, 24].
        num_steps: see `fit`.
        made_from: see `fit`.
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

    yield from fit(
        name,
        model,
        loss_of,
        num_steps=num_steps,
        checkpoint=shop.folder / f"{name}.ckpt",
        learning_rate=recipe.learning_rate,
        made_from=made_from,
    )


def require_same_recipe(path: Path, recipe: ModelsRecipe) -> None:
    """Checkpoints are only good for the recipe that they were made by."""
    asked = asdict(recipe)
    is_foreign = any(path.parent.glob("*.ckpt")) and not path.exists()
    if is_foreign or (path.exists() and read_json(path) != asked):
        raise AfaError(
            "AFA-STUDY-008",
            f"The work folder '{path.parent}' must be new or of the same recipe; '{path}' is "
            f"{'missing' if is_foreign else 'another one'}. Name another folder.",
        )
    write_atomic(path, json.dumps(asked, indent=2) + "\n")


class StableDiffusion(TextToImage):
    """U-Net and text encoder of a Stable Diffusion model."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(tokenizer)

    def forward(self, noisy: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        """See `TextToImage.forward`."""
        text = self.text_encoder(token_ids).last_hidden_state
        return self.unet(noisy, timestep, text).sample
