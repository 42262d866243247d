"""A zoo whose text encoder knows that a fox is an animal, as CLIP does.

The text encoders of the bundled zoo are trained with the denoiser alone, so nothing tells them what
objects have in common. Here, the text encoder is first trained by contrast with pictures (Radford
et al., 2021), from captions in which some objects are named by their category: "an animal on the
left and a pizza on the right". Then it is frozen, as in the training of Stable Diffusion. So an
aggregator may learn to route objects that its own pictures do not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from afa.ensemble.text import hash_weights
from afa.files import owned
from afa.studies.zoo_build.build import soften
from afa.studies.zoo_build.other_zoo import train_other_zoo
from afa.studies.zoo_build.workshop import (
    ModelsRecipe,
    StableDiffusion,
    Workshop,
    require_same_recipe,
)
from afa.zoo.models import WORDS, build_clip, build_tokenizer
from afa.zoo.scenes import caption_of
from afa.zoo.sprites import CATEGORY, DOMAIN_OF, load_sprites

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import CLIPModel

    from afa.studies.zoo_build.fit import FitStep
    from afa.zoo.scenes import Scene

_BATCH_SIZE = 64
_STREAM = 3  # of scenes; others train the models and the judges


@dataclass(frozen=True)
class CategoriesRecipe(ModelsRecipe):
    """Settings of the training.

    Attributes:
        text_steps: of the text encoder.
        category_share: fraction of the objects in its captions that are named by their category.
        num_graded: prompts of each kind for each model.
    """

    text_steps: int = 3_000
    category_share: float = 0.5
    num_graded: int = 96


def build_category_zoo(folder: Path, recipe: CategoriesRecipe | None = None) -> Iterator[FitStep]:
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
    recipe = recipe or CategoriesRecipe()
    with owned(folder):
        require_same_recipe(folder / "recipe.json", recipe)
        tokenizer = build_tokenizer(folder / "tokenizer", sorted({*WORDS, *CATEGORY.values()}))
        shop = Workshop(folder, recipe, load_sprites(), tokenizer)
        torch.manual_seed(recipe.seed)
        clip = build_clip(tokenizer)
        yield from train_contrastively(shop, clip)

        def build() -> StableDiffusion:
            model = StableDiffusion(tokenizer)
            model.text_encoder.load_state_dict(_text_weights(clip, model))
            model.text_encoder.requires_grad_(False)
            return model

        yield from train_other_zoo(shop, build, recipe.num_graded, hash_weights(clip))


def _text_weights(clip: CLIPModel, model: StableDiffusion) -> dict[str, Tensor]:
    """The weights of a CLIP model's text encoder, by the names of the encoder alone."""
    own = model.text_encoder.state_dict()
    found = clip.text_model.state_dict()
    return {key: found[key.removeprefix("text_model.")] for key in own}


def train_contrastively(shop: Workshop[CategoriesRecipe], model: CLIPModel) -> Iterator[FitStep]:
    """Train a CLIP model by contrast, with captions that name objects or their categories.

    The loss is that of CLIP (Radford et al., 2021, arXiv 2103.00020, section 2.3), but a caption
    may describe several pictures of a batch, which are then equally right. Captions with swapped
    sides are hard negatives.

    Args:
        shop: the recipe and the folder of the checkpoint.
        model: all its parameters are trained.

    Yields:
        The progress.

    Raises:
        AfaError: if the checkpoint is damaged or was made from other inputs.
    """

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(10_000_000, (_BATCH_SIZE,), generator=generator)
        shown = [shop.scene(int(i), "any", stream=_STREAM) for i in indices]
        pictures = soften(shop.pixels(indices, "any", stream=_STREAM), generator)
        general = torch.rand(_BATCH_SIZE, 2, generator=generator) < shop.recipe.category_share
        words = [named(scene, row) for scene, row in zip(shown, general.tolist(), strict=True)]
        words += [(right, left, background) for left, right, background in words]
        ids = shop.tokenize([caption_of(*each) for each in words])
        fits = torch.tensor([[float(describes(each, s)) for each in words] for s in shown])
        logits = model(input_ids=ids, pixel_values=pictures).logits_per_image  # [64, 128]
        own = slice(_BATCH_SIZE)
        return cross_entropy(logits, fits) + cross_entropy(logits[:, own].T, fits[:, own].T)

    yield from shop.fit("text", model, loss_of, shop.recipe.text_steps)


def named(scene: Scene, general: Sequence[bool]) -> tuple[str, str, str]:
    """The words for both objects, or for their categories, and the background."""
    left, right = (
        CATEGORY[DOMAIN_OF[name]] if is_general else name
        for name, is_general in zip((scene.left, scene.right), general, strict=True)
    )
    return left, right, scene.background


def describes(words: tuple[str, str, str], scene: Scene) -> bool:
    """Whether these words describe a scene."""
    left, right, background = words
    return (
        left in (scene.left, CATEGORY[DOMAIN_OF[scene.left]])
        and right in (scene.right, CATEGORY[DOMAIN_OF[scene.right]])
        and background == scene.background
    )


def cross_entropy(logits: Tensor, fits: Tensor) -> Tensor:
    """Cross-entropy [] of logits [B, K] with equally probable right answers [B, K]."""
    targets = fits / fits.sum(1, keepdim=True)
    return -(targets * F.log_softmax(logits, 1)).sum(1).mean()
