"""A text encoder that knows that a fox is an animal, as CLIP does.

The text encoders of the bundled zoo are trained with the denoiser alone, so nothing tells them what
objects have in common. Those of worlds are first trained by contrast with pictures (Radford et al.,
2021), from captions in which some objects are named by their category: "an animal on the left and a
pizza on the right". Then they are frozen, as in the training of Stable Diffusion. So an aggregator
may learn to route objects that its own pictures do not show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from afa.studies.worlds.recipe import TEXT
from afa.studies.zoo_build.build import soften
from afa.zoo.scenes import caption_of
from afa.zoo.sprites import CATEGORY, DOMAIN_OF

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import CLIPModel

    from afa.studies.worlds.recipe import WorldRecipe
    from afa.studies.zoo_build.fit import FitStep
    from afa.studies.zoo_build.workshop import StableDiffusion, Workshop
    from afa.zoo.scenes import Scene

_BATCH_SIZE = 64
_STREAM = 3  # of scenes; others train the models and the judges


def train_contrastively(shop: Workshop[WorldRecipe], model: CLIPModel) -> Iterator[FitStep]:
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
        shown = [shop.scene(int(i), TEXT, stream=_STREAM) for i in indices]
        pictures = soften(shop.pixels(indices, TEXT, stream=_STREAM), generator)
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


def use_text_encoder(clip: CLIPModel, model: StableDiffusion) -> None:
    """Freeze a model's text encoder with the weights of a CLIP model's."""
    own = model.text_encoder.state_dict()
    found = clip.text_model.state_dict()
    model.text_encoder.load_state_dict({key: found[key.removeprefix("text_model.")] for key in own})
    model.text_encoder.requires_grad_(False)
