"""Make the whole zoo again from the font: sprites, autoencoder, base, experts, judges.

Each stage keeps a checkpoint in the work folder and is skipped or continued when the same command
runs again. The result is a folder of float16 weights, a few megabytes, which the package ships.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from afa.zoo.fit import FitStep, fit
from afa.zoo.models import (
    NUM_CLASSES,
    ObjectClassifier,
    build_clip,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from afa.zoo.scenes import Kind, scene
from afa.zoo.sprites import DOMAINS, OBJECTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import AutoencoderKL
    from torch import Tensor
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class ZooRecipe:
    """How long and on how much the zoo is trained."""

    seed: int = 0
    num_scenes: int = 16_384  # encoded once for each kind of data
    vae_steps: int = 4_000
    vae_batch_size: int = 16
    base_steps: int = 3_000
    expert_steps: int = 2_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    caption_dropout: float = 0.1
    judge_steps: int = 1_500


def pixels(indices: Tensor, *, kind: Kind, seed: int) -> Tensor:
    """The pictures of these scenes, [B, 3, 64, 64] in -1..1."""
    pictures = np.stack([scene(int(i), kind=kind, seed=seed).render() for i in indices])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


# -- autoencoder ------------------------------------------------------------------------------


def train_vae(recipe: ZooRecipe, workdir: Path, vae: AutoencoderKL) -> Iterator[FitStep]:
    """Absolute error plus a light pull of the latents towards a normal distribution."""

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (recipe.vae_batch_size,), generator=generator)
        target = _crops(pixels(indices, kind="any", seed=recipe.seed), 32, generator)
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + 3e-4 * divergence

    yield from fit(
        "vae",
        vae,
        loss_of,
        num_steps=recipe.vae_steps,
        checkpoint=workdir / "vae.ckpt",
        learning_rate=3e-3,
    )


def _crops(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """One square crop of each picture, anywhere: a quarter of the cost of the whole."""
    span = pictures.shape[-1] - size + 1
    corners = torch.randint(span, (len(pictures), 2), generator=generator).tolist()
    return torch.stack(
        [p[:, y : y + size, x : x + size] for p, (y, x) in zip(pictures, corners, strict=True)]
    )


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, recipe: ZooRecipe, kind: Kind) -> tuple[Tensor, list[str]]:
    """The latents [S, 8, 16, 16], unscaled, and the captions of `num_scenes` scenes."""
    batches = torch.arange(recipe.num_scenes).split(128)
    latents = [
        vae.encode(pixels(batch, kind=kind, seed=recipe.seed)).latent_dist.mean for batch in batches
    ]
    captions = [scene(i, kind=kind, seed=recipe.seed).caption for i in range(recipe.num_scenes)]
    return torch.cat(latents), captions


# -- base and experts -------------------------------------------------------------------------


class TextToImage(nn.Module):
    """What is trained of a Stable Diffusion model: U-Net and text encoder together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(tokenizer)


def train_text_to_image(
    name: str,
    model: TextToImage,
    latents: Tensor,
    token_ids: Tensor,
    empty_ids: Tensor,
    recipe: ZooRecipe,
    checkpoint: Path,
    *,
    num_steps: int,
    learning_rate: float,
) -> Iterator[FitStep]:
    """Train on velocity (Salimans & Ho, 2022), each caption dropped by itself.

    Args:
        name: shown in the progress.
        model: the U-Net and the text encoder, trained together.
        latents: scaled latents [S, 8, 16, 16].
        token_ids: their captions [S, 24].
        empty_ids: the empty caption [24].
        recipe: batch size and caption dropout.
        checkpoint: see `fit`.
        num_steps: see `fit`.
        learning_rate: see `fit`.
    """
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
        text = model.text_encoder(ids).last_hidden_state
        return F.mse_loss(model.unet(noisy, timestep, text).sample, target)

    yield from fit(
        name,
        model,
        loss_of,
        num_steps=num_steps,
        checkpoint=checkpoint,
        learning_rate=learning_rate,
    )


# -- judges -----------------------------------------------------------------------------------


def spoil(halves: Tensor, generator: torch.Generator) -> Tensor:
    """Turn halves of pictures [B, 3, 64, 32] into what shows no object: blends and scrambles."""
    batch = len(halves)
    share = torch.rand(batch, 1, 1, 1, generator=generator) * 0.3 + 0.35
    blended = share * halves + (1 - share) * halves.roll(1, 0)
    tiles = halves.reshape(batch, 3, 8, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(batch, 32, -1)
    order = torch.rand(batch, 32, generator=generator).argsort(1)
    tiles = tiles.gather(1, order[..., None].expand_as(tiles))
    scrambled = tiles.reshape(batch, 8, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(halves.shape)
    bare = halves[:, :, :1, :1].expand_as(halves)
    choice = torch.randint(5, (batch, 1, 1, 1), generator=generator)
    return torch.where(choice < 2, blended, torch.where(choice < 4, scrambled, bare))


def _soften(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Noise and a slight blur, so that a judge reads objects and not the renderer's edges."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(pictures), 1, 1, 1, generator=generator)
    strength = 0.1 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator)
    return (share * blurred + (1 - share) * pictures + strength * noise).clamp(-1, 1)


def train_classifier(
    model: ObjectClassifier, recipe: ZooRecipe, checkpoint: Path
) -> Iterator[FitStep]:
    """Cross-entropy on the halves of real scenes, and on spoilt halves as the class "none"."""

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (32,), generator=generator)
        shown = [scene(int(i), kind="any", seed=recipe.seed + 1) for i in indices]
        pictures = pixels(indices, kind="any", seed=recipe.seed + 1)
        halves = torch.cat([pictures[..., :32], pictures[..., 32:]])
        labels = torch.tensor([OBJECTS.index(s.left) for s in shown])
        labels = torch.cat([labels, torch.tensor([OBJECTS.index(s.right) for s in shown])])
        spoilt = spoil(halves[torch.randperm(64, generator=generator)[:16]], generator)
        none = torch.full((16,), NUM_CLASSES - 1)
        inputs = _soften(torch.cat([halves, spoilt]), generator)
        return F.cross_entropy(model(inputs), torch.cat([labels, none]))

    yield from fit(
        "classifier", model, loss_of, num_steps=recipe.judge_steps, checkpoint=checkpoint
    )


def train_clip(
    model: nn.Module, tokenizer: CLIPTokenizer, recipe: ZooRecipe, checkpoint: Path
) -> Iterator[FitStep]:
    """Contrastive loss (Radford et al., 2021); captions with sides swapped are hard negatives."""

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (64,), generator=generator)
        shown = [scene(int(i), kind="any", seed=recipe.seed + 2) for i in indices]
        pictures = _soften(pixels(indices, kind="any", seed=recipe.seed + 2), generator)
        swapped = [type(s)(s.right, s.left, s.background).caption for s in shown]
        captions = [s.caption for s in shown] + swapped
        ids = tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]
        output = model(input_ids=ids, pixel_values=pictures)
        logits = output.logits_per_image  # [64 pictures, 128 captions]
        labels = torch.arange(64)
        return F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :64].T, labels)

    yield from fit("clip", model, loss_of, num_steps=recipe.judge_steps, checkpoint=checkpoint)


# -- all of it --------------------------------------------------------------------------------


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, 24]."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def build_zoo(
    workdir: Path, recipe: ZooRecipe | None = None, *, font: Path | None = None
) -> Iterator[FitStep]:
    """Train everything, stage after stage; continue where an earlier run was stopped.

    Args:
        workdir: holds checkpoints and, at the end, `assets`.
        recipe: how long; the default makes the zoo that the package ships.
    """
    recipe = recipe or ZooRecipe()
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(workdir / "tokenizer")
    empty_ids = tokenize(tokenizer, [""])[0]

    torch.manual_seed(recipe.seed)
    vae = build_vae()
    yield from train_vae(recipe, workdir, vae)
    vae.requires_grad_(False)

    base = TextToImage(tokenizer)
    latents, captions = encode_scenes(vae, recipe, "any")
    scale = 1.0 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    yield from train_text_to_image(
        "base",
        base,
        latents * scale,
        tokenize(tokenizer, captions),
        empty_ids,
        recipe,
        workdir / "base.ckpt",
        num_steps=recipe.base_steps,
        learning_rate=recipe.learning_rate,
    )
    for domain in DOMAINS:
        expert = TextToImage(tokenizer)
        expert.load_state_dict(base.state_dict())
        latents, captions = encode_scenes(vae, recipe, domain)
        yield from train_text_to_image(
            domain,
            expert,
            latents * scale,
            tokenize(tokenizer, captions),
            empty_ids,
            recipe,
            workdir / f"{domain}.ckpt",
            num_steps=recipe.expert_steps,
            learning_rate=recipe.learning_rate,
        )
    yield from train_classifier(ObjectClassifier(), recipe, workdir / "classifier.ckpt")
    yield from train_clip(build_clip(tokenizer), tokenizer, recipe, workdir / "clip.ckpt")
