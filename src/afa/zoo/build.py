"""Make the whole zoo again from the font: sprites, autoencoder, base, experts, judges, ensemble.

Each stage keeps a checkpoint in the work folder and is skipped or continued when the same command
runs again. The result is the folder `assets` of float16 weights, which the package ships.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import shutil
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F

from afa.checkpoint import save_ensemble
from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.pipeline import load_pipeline
from afa.text import hash_weights
from afa.training import Checkpoints, SceneImages, TrainingRecipe, seeded, train_aggregators
from afa.zoo import copy_as, export_zoo
from afa.zoo.fit import FitStep, fit
from afa.zoo.models import (
    AGGREGATOR,
    NUM_CLASSES,
    ObjectClassifier,
    build_clip,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from afa.zoo.pack import grade_zoo, pack_zoo
from afa.zoo.scenes import scene
from afa.zoo.sprites import DOMAINS, OBJECTS, cut_atlas, extract_sprites, load_sprites

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffusers import AutoencoderKL
    from torch import Tensor
    from transformers import CLIPTokenizer

    from afa.zoo.scenes import Kind, Scene
    from afa.zoo.sprites import Sprites


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
    ensemble_steps: int = 1_000
    ensemble_batch_size: int = 16
    ensemble_learning_rate: float = 1e-3
    num_graded: int = 96  # prompts of each kind for each model


@dataclass(frozen=True)
class Workshop:
    """What every stage needs: the folder it writes to, how much to do, what to draw with.

    Streams of scenes are told apart by `stream`: 0 trains models, 1 and 2 the judges.
    """

    folder: Path
    recipe: ZooRecipe
    sprites: Sprites
    tokenizer: CLIPTokenizer

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


# -- autoencoder ------------------------------------------------------------------------------


def train_vae(shop: Workshop, vae: AutoencoderKL) -> Iterator[FitStep]:
    """Absolute error plus a light pull of the latents towards a normal distribution."""

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (shop.recipe.vae_batch_size,), generator=generator)
        target = _crops(shop.pixels(indices, "any"), 32, generator)
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + 3e-4 * divergence

    yield from fit(
        "vae",
        vae,
        loss_of,
        num_steps=shop.recipe.vae_steps,
        checkpoint=shop.folder / "vae.ckpt",
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
def encode_scenes(shop: Workshop, vae: AutoencoderKL, kind: Kind) -> tuple[Tensor, Tensor]:
    """`num_scenes` scenes as latents [S, 8, 16, 16], unscaled, and token ids [S, 24].

    Kept in the work folder, so that going on after a stop is quick, with what they were made from.
    """
    kept = shop.folder / f"scenes-{kind}.safetensors"
    digest = hashlib.sha256(hash_weights(vae).encode())
    for sprite in shop.sprites.values():
        digest.update(sprite.tobytes())
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


# -- base and experts -------------------------------------------------------------------------


class TextToImage(nn.Module):
    """What is trained of a Stable Diffusion model: U-Net and text encoder together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(tokenizer)


def train_text_to_image(
    shop: Workshop,
    name: str,
    model: TextToImage,
    latents: Tensor,
    token_ids: Tensor,
    num_steps: int,
) -> Iterator[FitStep]:
    """Train on velocity (Salimans & Ho, 2022), each caption dropped by itself.

    Args:
        shop: batch size, learning rate, caption dropout, and where the checkpoint lies.
        name: of the checkpoint, and shown in the progress.
        model: the U-Net and the text encoder, trained together.
        latents: scaled latents [S, 8, 16, 16].
        token_ids: their captions [S, 24].
        num_steps: see `fit`.
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
        text = model.text_encoder(ids).last_hidden_state
        return F.mse_loss(model.unet(noisy, timestep, text).sample, target)

    yield from fit(
        name,
        model,
        loss_of,
        num_steps=num_steps,
        checkpoint=shop.folder / f"{name}.ckpt",
        learning_rate=recipe.learning_rate,
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


def train_classifier(shop: Workshop, model: ObjectClassifier) -> Iterator[FitStep]:
    """Cross-entropy on the halves of real scenes, and on spoilt halves as the class "none"."""

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (32,), generator=generator)
        shown = [shop.scene(int(i), "any", stream=1) for i in indices]
        pictures = shop.pixels(indices, "any", stream=1)
        halves = torch.cat([pictures[..., :32], pictures[..., 32:]])
        labels = torch.tensor([OBJECTS.index(s.left) for s in shown])
        labels = torch.cat([labels, torch.tensor([OBJECTS.index(s.right) for s in shown])])
        spoilt = spoil(halves[torch.randperm(64, generator=generator)[:16]], generator)
        none = torch.full((16,), NUM_CLASSES - 1)
        inputs = _soften(torch.cat([halves, spoilt]), generator)
        return F.cross_entropy(model(inputs), torch.cat([labels, none]))

    yield from fit(
        "classifier",
        model,
        loss_of,
        num_steps=shop.recipe.judge_steps,
        checkpoint=shop.folder / "classifier.ckpt",
    )


def train_clip(shop: Workshop, model: nn.Module) -> Iterator[FitStep]:
    """Contrastive loss (Radford et al., 2021); captions with sides swapped are hard negatives."""

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (64,), generator=generator)
        shown = [shop.scene(int(i), "any", stream=2) for i in indices]
        pictures = _soften(shop.pixels(indices, "any", stream=2), generator)
        swapped = [type(s)(s.right, s.left, s.background).caption for s in shown]
        ids = shop.tokenize([s.caption for s in shown] + swapped)
        output = model(input_ids=ids, pixel_values=pictures)
        logits = output.logits_per_image  # [64 pictures, 128 captions]
        labels = torch.arange(64)
        return F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :64].T, labels)

    yield from fit(
        "clip",
        model,
        loss_of,
        num_steps=shop.recipe.judge_steps,
        checkpoint=shop.folder / "clip.ckpt",
    )


# -- all of it --------------------------------------------------------------------------------


def build_zoo(
    folder: Path, recipe: ZooRecipe | None = None, *, font: Path | None = None
) -> Iterator[FitStep]:
    """Train everything, stage after stage; continue where an earlier run was stopped.

    Args:
        folder: holds checkpoints and, at the end, `assets`.
        recipe: how long; the default makes the zoo that the package ships.
        font: Noto Color Emoji, to cut the sprites from; None takes the shipped sprites.

    Raises:
        AfaError: the font is not that one, or the folder is of another recipe.
    """
    recipe = recipe or ZooRecipe()
    folder.mkdir(parents=True, exist_ok=True)
    _require_same_recipe(folder / "recipe.json", recipe)
    atlas = folder / "sprites.png"
    if font is not None:
        buffer = io.BytesIO()
        extract_sprites(font).save(buffer, format="PNG")
        write_atomic(atlas, buffer.getvalue())
    sprites = cut_atlas(Image.open(atlas)) if atlas.exists() else load_sprites()
    shop = Workshop(folder, recipe, sprites, build_tokenizer(folder / "tokenizer"))

    torch.manual_seed(recipe.seed)
    vae = build_vae()
    yield from train_vae(shop, vae)
    vae.requires_grad_(False)

    # before what they judge, so that an unfinished zoo can be looked at
    torch.manual_seed(recipe.seed)
    classifier, clip = ObjectClassifier(), build_clip(shop.tokenizer)
    yield from train_classifier(shop, classifier)
    yield from train_clip(shop, clip)

    latents, token_ids = encode_scenes(shop, vae, "any")
    scale = 1.0 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    torch.manual_seed(recipe.seed)
    models = {"base": TextToImage(shop.tokenizer)}
    yield from train_text_to_image(
        shop, "base", models["base"], latents * scale, token_ids, recipe.base_steps
    )
    for domain in DOMAINS:
        models[domain] = copy.deepcopy(models["base"])
        latents, token_ids = encode_scenes(shop, vae, domain)
        yield from train_text_to_image(
            shop, domain, models[domain], latents * scale, token_ids, recipe.expert_steps
        )

    pack_zoo(shop.folder / "assets", vae, shop.tokenizer, models, classifier, clip)
    if atlas.exists():
        shutil.copyfile(atlas, shop.folder / "assets" / "sprites.png")
    yield from train_ensemble(shop)
    yield from grade_zoo(shop.folder / "assets", num_prompts=recipe.num_graded)


def _require_same_recipe(path: Path, recipe: ZooRecipe) -> None:
    """Checkpoints are only good for the recipe that they were made by."""
    asked = asdict(recipe)
    is_foreign = any(path.parent.glob("*.ckpt")) and not path.exists()
    if is_foreign or (path.exists() and read_json(path) != asked):
        raise AfaError(
            f"The work folder '{path.parent}' must be new or of the same recipe; '{path}' is "
            f"{'missing' if is_foreign else 'another one'}. Name another folder."
        )
    write_atomic(path, json.dumps(asked, indent=2) + "\n")


def train_ensemble(shop: Workshop) -> Iterator[FitStep]:
    """Train aggregators for the three packed experts and put the ensemble beside them."""
    exported = shop.folder / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    export_zoo(exported, shop.folder / "assets")
    with seeded(shop.recipe.seed):
        pipeline = load_pipeline([exported / domain for domain in DOMAINS], AGGREGATOR)
    settings = TrainingRecipe(
        num_steps=shop.recipe.ensemble_steps,
        batch_size=shop.recipe.ensemble_batch_size,
        learning_rate=shop.recipe.ensemble_learning_rate,
        seed=shop.recipe.seed,
    )
    data = SceneImages(1_000_000, seed=shop.recipe.seed, sprites=shop.sprites)
    checkpoints = Checkpoints(shop.folder / "ensemble-checkpoints", keep=1)
    for step in train_aggregators(pipeline, data, settings, checkpoints=checkpoints):
        yield FitStep("ensemble", step.step, step.num_steps, step.loss, step.seconds)
    # under the names by which every installation finds them
    pipeline.unet.references = [
        replace(reference, source=f"zoo:{domain}")
        for domain, reference in zip(DOMAINS, pipeline.unet.references, strict=True)
    ]
    pipeline.unet.vae_reference = replace(
        pipeline.unet.vae_reference, source=pipeline.unet.references[0].source
    )
    save_ensemble(pipeline, shop.folder / "ensemble", exist_ok=True)
    copy_as(shop.folder / "ensemble", shop.folder / "assets" / "ensemble", torch.float16)
