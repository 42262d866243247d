"""The kinds of pipelines that experts come as: what their parts are called, and what goes together.

One entry a family of checkpoints. Pipelines stay the library's own; what an ensemble adds is a
denoiser and text encoders that stand for those of all experts.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import diffusers

from afa.denoisers import FAMILIES, Family, Widths
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction", "sample"]


@dataclass(frozen=True)
class Kind:
    """One kind of pipeline.

    Attributes:
        name: as users call it.
        family: of the denoiser, by name.
        pipelines: the library's classes that draw from a prompt alone.
        others: those that take a picture besides.
        text: the text encoders whose embeddings of tokens are concatenated, in order.
        pooled: those whose embeddings of the text as a whole are.
        latent_channels: of the picture that a denoiser's configuration says it takes.
        patch: side of the patches of a latent that it works in, likewise.
        call: what a pipeline has to be told so that a picture has the size that is asked for.
    """

    name: str
    family: str
    pipelines: tuple[str, ...]
    others: tuple[str, ...]
    text: tuple[str, ...]
    pooled: tuple[str, ...] = ()
    latent_channels: Callable[[Any], int] = lambda config: config.in_channels
    patch: Callable[[Any], int] = lambda config: config.get("patch_size") or 1
    call: Mapping[str, Any] = field(default_factory=dict)

    def class_for(self, class_name: str, denoiser: Any, encoders: Collection[str]) -> str:
        """The class of an ensemble of experts that name this one: from a prompt, if that can be.

        It cannot where the denoiser takes another picture beside the latent, as those for
        inpainting, or where a text encoder is left out, as in the refiner of Stable Diffusion XL.
        """
        config = denoiser.config
        is_whole = self.latent_channels(config) == (config.get("out_channels") or 0)
        is_whole = is_whole or self.family != "unet"
        if class_name in self.pipelines or not is_whole or set(self.text) - set(encoders):
            return class_name
        return self.pipelines[0]

    @property
    def denoiser(self) -> str:
        """The name of the denoiser among a pipeline's parts."""
        return "unet" if self.family == "unet" else "transformer"

    @property
    def denoiser_family(self) -> Family:
        """How it is taken apart."""
        return next(family for family in FAMILIES if family.name == self.family)

    def widths(self, encoders: Mapping[str, PreTrainedModel], num_clip_tokens: int) -> Widths:
        """What the text encoders of one expert give; those that are left out are not counted."""
        return Widths(
            tuple(encoders[name].config.hidden_size for name in self.text if name in encoders),
            tuple(_pooled_width(encoders[name]) for name in self.pooled if name in encoders),
            num_clip_tokens if self.family == "sd3" else 0,
        )


def _pooled_width(encoder: Any) -> int:
    has_projection = type(encoder).__name__.endswith("WithProjection")
    return encoder.config.projection_dim if has_projection else encoder.config.hidden_size


_CLIPS = ("text_encoder", "text_encoder_2")
KINDS = (
    Kind(
        "Stable Diffusion",
        "unet",
        ("StableDiffusionPipeline",),
        ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        text=("text_encoder",),
    ),
    Kind(
        "Stable Diffusion XL",
        "unet",
        ("StableDiffusionXLPipeline",),
        ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        text=_CLIPS,
        pooled=("text_encoder_2",),
    ),
    Kind(
        "Stable Diffusion 3",
        "sd3",
        ("StableDiffusion3Pipeline",),
        ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        text=(*_CLIPS, "text_encoder_3"),
        pooled=_CLIPS,
    ),
    Kind(
        "Flux",
        "flux",
        ("FluxPipeline",),
        ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
        text=("text_encoder_2",),
        pooled=("text_encoder",),
        latent_channels=lambda config: config.in_channels // 4,
        patch=lambda _: 2,
    ),
    Kind(
        "PixArt",
        "pixart",
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        (),
        text=("text_encoder",),
        # prompts are trained and drawn as they are, whatever is installed beside
        call={"use_resolution_binning": False, "clean_caption": False},
    ),
    Kind("DiT", "dit", ("DiTPipeline",), (), ()),
)


def kind_of(class_name: str, source: object) -> Kind:
    """The kind that a pipeline's class is of.

    Args:
        class_name: as `model_index.json` has it.
        source: for the error.

    Raises:
        AfaError: none.
    """
    for kind in KINDS:
        if class_name in (*kind.pipelines, *kind.others):
            return kind
    known = ", ".join(kind.name for kind in KINDS)
    raise AfaError(
        f"An expert must be a pipeline of {known}; '{source}' is a {class_name}. Other families "
        "are not supported yet."
    )


def kind_of_pipeline(pipeline: DiffusionPipeline) -> Kind:
    """The kind of a pipeline that is there already."""
    return kind_of(type(pipeline).__name__, "the pipeline")


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """The `unet` or `transformer` of a pipeline."""
    return pipeline.components.get("unet") or pipeline.components["transformer"]


def build_pipeline(
    class_name: str, parts: Mapping[str, Any], options: Mapping[str, Any]
) -> DiffusionPipeline:
    """A stock pipeline of these parts, without what it may have besides, as a safety checker.

    Args:
        class_name: the library's.
        parts: by the names of the class's arguments.
        options: more arguments; those that the class does not take are left out.
    """
    pipeline_class = getattr(diffusers, class_name)
    taken = inspect.signature(pipeline_class.__init__).parameters
    left_out = ("safety_checker", "feature_extractor", "image_encoder", *_encoder_names(taken))
    arguments = {name: None for name in left_out if name in taken}
    off = {"requires_safety_checker": False, "add_watermarker": False}
    given = {key: value for key, value in {**options, **off}.items() if key in taken}
    return pipeline_class(**{**arguments, **given, **parts})


def _encoder_names(taken: Mapping[str, Any]) -> list[str]:
    return [name for name in taken if name.startswith(("text_encoder", "tokenizer"))]
