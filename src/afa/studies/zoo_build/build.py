"""Build the bundled zoo from the font: sprites, autoencoder, base, experts, judges, ensemble.

Each stage stores a checkpoint in the work folder, and is skipped or resumed when the command runs
again. The result is the folder `assets` of float16 weights, which the package includes.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from afa.files import write_png
from afa.loading.ensemble_folder import save_ensemble
from afa.loading.pipeline import load_pipeline
from afa.studies.zoo_build.fit import FitStep
from afa.studies.zoo_build.pack import grade_zoo, pack_zoo
from afa.studies.zoo_build.workshop import (
    ModelsRecipe,
    StableDiffusion,
    Workshop,
    encode_scenes,
    require_same_recipe,
    train_models,
)
from afa.training import Checkpoints, SceneImages, TrainingRecipe, seeded, train_aggregators
from afa.zoo import copy_as, export_zoo
from afa.zoo.models import (
    AGGREGATOR,
    NUM_CLASSES,
    ObjectClassifier,
    build_clip,
    build_tokenizer,
    build_vae,
)
from afa.zoo.sprites import (
    DOMAINS,
    OBJECTS,
    cut_atlas,
    extract_sprites,
    load_sprites,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import AutoencoderKL
    from torch import Tensor


@dataclass(frozen=True)
class ZooRecipe(ModelsRecipe):
    """Settings of the training of the zoo."""

    vae_steps: int = 4_000
    vae_batch_size: int = 16
    judge_steps: int = 1_500
    ensemble_steps: int = 1_000
    ensemble_batch_size: int = 16
    ensemble_learning_rate: float = 1e-3
    num_graded: int = 96  # prompts of each kind for each model


# -- autoencoder ------------------------------------------------------------------------------


def train_vae(shop: Workshop[ZooRecipe], vae: AutoencoderKL) -> Iterator[FitStep]:
    """Train the autoencoder with L1 and L2 error and a small KL term."""

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (shop.recipe.vae_batch_size,), generator=generator)
        target = _crops(shop.pixels(indices, "any"), 32, generator)
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + 3e-4 * divergence

    yield from shop.fit("vae", vae, loss_of, shop.recipe.vae_steps, learning_rate=3e-3)


def _crops(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random square crop of each picture, which costs a quarter of the full picture."""
    span = pictures.shape[-1] - size + 1
    corners = torch.randint(span, (len(pictures), 2), generator=generator).tolist()
    return torch.stack(
        [p[:, y : y + size, x : x + size] for p, (y, x) in zip(pictures, corners, strict=True)]
    )


# -- judges -----------------------------------------------------------------------------------


def spoil(halves: Tensor, generator: torch.Generator) -> Tensor:
    """Turn halves of pictures [B, 3, 64, 32] into negatives: blended, scrambled or empty ones."""
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


def soften(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise and slight blur, so that judges do not rely on sharp edges of the renderer."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(pictures), 1, 1, 1, generator=generator)
    strength = 0.1 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator)
    return (share * blurred + (1 - share) * pictures + strength * noise).clamp(-1, 1)


def train_classifier(shop: Workshop[ZooRecipe], model: ObjectClassifier) -> Iterator[FitStep]:
    """Train with cross-entropy on halves of scenes, and on spoilt halves as the class "none"."""

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (32,), generator=generator)
        shown = [shop.scene(int(i), "any", stream=1) for i in indices]
        pictures = shop.pixels(indices, "any", stream=1)
        halves = torch.cat([pictures[..., :32], pictures[..., 32:]])
        labels = torch.tensor([OBJECTS.index(s.left) for s in shown])
        labels = torch.cat([labels, torch.tensor([OBJECTS.index(s.right) for s in shown])])
        spoilt = spoil(halves[torch.randperm(64, generator=generator)[:16]], generator)
        none = torch.full((16,), NUM_CLASSES - 1)
        inputs = soften(torch.cat([halves, spoilt]), generator)
        return F.cross_entropy(model(inputs), torch.cat([labels, none]))

    yield from shop.fit("classifier", model, loss_of, shop.recipe.judge_steps)


def train_clip(shop: Workshop[ZooRecipe], model: nn.Module) -> Iterator[FitStep]:
    """Train with a contrastive loss (Radford et al., 2021) and swapped sides as hard negatives."""

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (64,), generator=generator)
        shown = [shop.scene(int(i), "any", stream=2) for i in indices]
        pictures = soften(shop.pixels(indices, "any", stream=2), generator)
        swapped = [type(s)(s.right, s.left, s.background).caption for s in shown]
        ids = shop.tokenize([s.caption for s in shown] + swapped)
        output = model(input_ids=ids, pixel_values=pictures)
        logits = output.logits_per_image  # [64 pictures, 128 captions]
        labels = torch.arange(64)
        return F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :64].T, labels)

    yield from shop.fit("clip", model, loss_of, shop.recipe.judge_steps)


# -- all of it --------------------------------------------------------------------------------


def build_zoo(
    folder: Path, recipe: ZooRecipe | None = None, *, font: Path | None = None
) -> Iterator[FitStep]:
    """Train all stages, and resume an earlier run.

    Args:
        folder: work folder of checkpoints and, at the end, `assets`.
        recipe: settings; None uses those of the bundled zoo.
        font: file of Noto Color Emoji to cut the sprites from; None uses the bundled sprites.

    Yields:
        The progress.

    Raises:
        AfaError: if the font is another one, or the folder belongs to another recipe.
    """
    recipe = recipe or ZooRecipe()
    folder.mkdir(parents=True, exist_ok=True)
    require_same_recipe(folder / "recipe.json", asdict(recipe))
    atlas = folder / "sprites.png"
    if font is not None:
        write_png(atlas, extract_sprites(font))
    sprites = cut_atlas(Image.open(atlas)) if atlas.exists() else load_sprites()
    shop = Workshop(folder, recipe, sprites, build_tokenizer(folder / "tokenizer"))

    torch.manual_seed(recipe.seed)
    vae = build_vae()
    yield from train_vae(shop, vae)
    vae.requires_grad_(False)

    # the judges come first, so that an unfinished zoo can be scored
    torch.manual_seed(recipe.seed)
    classifier, clip = ObjectClassifier(), build_clip(shop.tokenizer)
    yield from train_classifier(shop, classifier)
    yield from train_clip(shop, clip)

    latents, _ = encode_scenes(shop, vae, "any")
    vae.register_to_config(scaling_factor=1.0 / latents.std().item())
    models = yield from train_models(shop, vae, lambda: StableDiffusion(shop.tokenizer))

    pack_zoo(shop.folder / "assets", vae, shop.tokenizer, models, classifier, clip)
    if atlas.exists():
        shutil.copyfile(atlas, shop.folder / "assets" / "sprites.png")
    yield from train_ensemble(shop)
    yield from grade_zoo(shop.folder / "assets", num_prompts=recipe.num_graded)


def train_ensemble(shop: Workshop[ZooRecipe]) -> Iterator[FitStep]:
    """Train aggregators for the three packed experts, and add the ensemble to the assets."""
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
    # names that every installation can resolve
    sources = pipeline.unet.provenance
    experts = tuple(
        replace(reference, source=f"zoo:{domain}")
        for domain, reference in zip(DOMAINS, sources.experts, strict=True)
    )
    vae = replace(sources.vae, source=experts[0].source)
    pipeline.unet.provenance = replace(sources, experts=experts, vae=vae)
    save_ensemble(pipeline, shop.folder / "ensemble", exist_ok=True)
    copy_as(shop.folder / "ensemble", shop.folder / "assets" / "ensemble", torch.float16)
