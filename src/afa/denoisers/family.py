"""The record of one family of denoisers, and how experts' texts travel in one call.

A *family* is an architecture: one class of denoiser and its coroutine. A *pipeline kind* is what
checkpoints with a denoiser of that family are published as: stock pipelines with certain text
encoders. Stable Diffusion and Stable Diffusion XL are two kinds of one family, the U-Net.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from afa.denoisers.coroutine import Blocks
    from afa.denoisers.original_names import OriginalName

    #: of tensors, by name
    Shapes = Mapping[str, tuple[int, ...]]
    #: tensors by name, each with an entry per sample
    Conditions = Mapping[str, Tensor]

#: what stock pipelines call their denoiser
Component = Literal["unet", "transformer"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
#: of an autoencoder's tensors in single files
VAE_PREFIXES = ("first_stage_model.", "vae.")


@dataclass(frozen=True)
class Widths:
    """Widths of what one expert's text encoders give, one number for each encoder.

    A pipeline runs each of its text encoders once, for all experts, and concatenates: [encoder 1 of
    all experts | encoder 2 of all experts | ...].

    Attributes:
        text: of the embedding of every token.
        pooled: of the embedding of the text as a whole; empty where there is none.
        num_clip_tokens: of Stable Diffusion 3, whose text is tokens of its first two encoders and
            then tokens of its third.
    """

    text: tuple[int, ...]
    pooled: tuple[int, ...] = ()
    num_clip_tokens: int = 0


class Ambiguous(AfaError):
    """Several models look alike, and guessing would draw noise."""


@dataclass(frozen=True)
class Conditioning:
    """How denoisers of one kind of pipeline are told what to draw.

    Attributes:
        encode: a pipeline's conditions for captions, as the pipeline itself would make them. The
            empty caption stands for no prompt.
        predict: from a pipeline (for its configuration), its denoiser as it is called, noisy
            latents [B, C, H, W], timesteps [B] and conditions: a prediction [B, C, H, W].
    """

    encode: Callable[[Any, list[str]], dict[str, Tensor]]
    predict: Callable[..., Tensor]


@dataclass(frozen=True)
class FileDenoiser:
    """The denoiser that a single file holds.

    Attributes:
        shapes: of its tensors, by name without the prefix that all of them have.
        is_diffusers: whether the names are those of diffusers, not of the original code.
        source: the file, for errors.
        predicts: its prediction type, where the file or the user says it.
        has_zero_snr: whether the file says that it was trained to zero terminal SNR.
    """

    shapes: Shapes
    is_diffusers: bool
    source: object
    predicts: str | None = None
    has_zero_snr: bool = False

    def size(self, name: str, dimension: int) -> int:
        """One dimension of a tensor; 0 where there is none."""
        shape = self.shapes.get(name, ())
        return shape[dimension] if len(shape) > dimension else 0


@dataclass(frozen=True)
class SingleFiles:
    """How single files of one kind of pipeline look.

    Attributes:
        configuration: tells the configuration of a file's model: the name of a shipped one, or a
            pipeline folder. Raises `AfaError` for an unusual model, `Ambiguous` where no tensor
            tells two models apart.
        parts: prefixes of the tensors of every part besides the denoiser.
        original: tensors, or with a point at the end roots of tensors, by which a denoiser in the
            layout of the original code is told; empty where files are in no such layout.
        diffusers: the same for the layout of diffusers.
        common_names: what people call text encoders that files leave out.
        optional: text encoders that many files leave out, which then draw without them.
        blocks: for messages: a regular expression of the start of the names of the tensors of one
            block, and what people call these blocks.
        convert: from tensors in the layout of the original code, the denoiser's configuration and
            the pipeline's folder to the state dict; None takes diffusers' own conversion.
    """

    configuration: Callable[[FileDenoiser], str | Path]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    original: tuple[str, ...] = ()
    diffusers: tuple[str, ...] = ()
    common_names: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    blocks: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[Mapping[str, Tensor], dict[str, Any], Path], dict[str, Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class PipelineKind:
    """One kind of stock pipeline, as checkpoints of a family are published.

    Attributes:
        name: as users call it.
        pipelines: classes that draw from a prompt alone: of diffusers by name, or of any package.
        others: those that take a picture besides.
        text: the text encoders whose embeddings of tokens are concatenated, in order.
        pooled: those whose embeddings of the text as a whole are.
        conditioning: how a prompt is encoded and passed, for training; None cannot be trained.
        single_files: how single files look; None reads pipeline folders only.
        latent_channels: of the picture that a denoiser's configuration says it takes.
        patch: side of the patches of a latent that it works in, likewise.
        call: what a pipeline has to be told so that a picture has the size that is asked for.
        gives_latent: whether text-to-image denoisers give exactly the latent's channels; others may
            give a variance besides, or pack the latent.
        sample_size: side of the latents of pictures that a denoiser was made for, where its
            configuration does not say it.
        padded_text: the entry of a denoiser's configuration to whose width the pipeline pads the
            tokens of its CLIP encoders before those of T5; None where it concatenates widths.
        shares_length: whether the length of `tokenizer` limits the texts of other tokenizers too.
        prepare: what the pipelines do to a prompt before they tokenize it.
        takes_negative: whether pipelines read a negative prompt by default.
        family: that lists it among its `pipelines`.
    """

    name: str
    pipelines: tuple[str | type, ...]
    others: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    pooled: tuple[str, ...] = ()
    conditioning: Conditioning | None = None
    single_files: SingleFiles | None = None
    latent_channels: Callable[[Any], int] = lambda config: config.in_channels
    patch: Callable[[Any], int] = lambda config: config.get("patch_size") or 1
    call: Mapping[str, Any] = field(default_factory=dict)
    gives_latent: bool = False
    sample_size: int = 64
    padded_text: str | None = None
    shares_length: bool = False
    prepare: Callable[[str], str] = str
    takes_negative: bool = True
    family: Family = field(init=False, repr=False)

    @property
    def denoiser(self) -> Component:
        """The name of the denoiser among a pipeline's parts."""
        return self.family.component

    @property
    def file_parts(self) -> tuple[str, ...]:
        """The parts with weights that single files may hold, the denoiser first."""
        files = self.single_files
        return () if files is None else (self.denoiser, *files.parts)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its pipelines' classes, those that draw from a prompt alone first."""
        own = (each if isinstance(each, str) else each.__name__ for each in self.pipelines)
        return (*own, *self.others)

    def pipeline_class(self, class_name: str) -> Any:
        """The class of one of its pipelines."""
        import diffusers

        given = {each.__name__: each for each in self.pipelines if isinstance(each, type)}
        return given.get(class_name) or getattr(diffusers, class_name)

    def class_for(self, class_name: str, denoiser: Any, encoders: Collection[str]) -> str:
        """The class of an ensemble of experts that name this one: from a prompt, if that can be.

        It cannot where the denoiser takes another picture beside the latent, as those for
        inpainting, or where a text encoder is left out, as in the refiner of Stable Diffusion XL.
        """
        config = denoiser.config
        is_whole = self.latent_channels(config) == (config.get("out_channels") or 0)
        is_whole = is_whole or not self.gives_latent
        if class_name not in self.others or not is_whole or set(self.text) - set(encoders):
            return class_name
        return self.class_names[0]

    def native_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the latents that a denoiser of this configuration was made for."""
        size = config.get("sample_size") or self.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def widths(self, encoders: Mapping[str, PreTrainedModel], num_clip_tokens: int) -> Widths:
        """What the text encoders of one expert give; those that are left out are not counted."""
        return Widths(
            tuple(encoders[name].config.hidden_size for name in self.text if name in encoders),
            tuple(_pooled_width(encoders[name]) for name in self.pooled if name in encoders),
            num_clip_tokens if self.padded_text else 0,
        )


def _pooled_width(encoder: Any) -> int:
    has_projection = type(encoder).__name__.endswith("WithProjection")
    return encoder.config.projection_dim if has_projection else encoder.config.hidden_size


@dataclass(frozen=True, eq=False)
class Family:
    """How one family of denoisers is taken apart, and what is published with it.

    Attributes:
        name: as saved ensembles have it.
        model_class: the library's.
        output_class: of its predictions.
        blocks: the coroutine; takes the model and the arguments of its forward pass by name, and an
            `execution` through which it runs the modules of `layers`, and all others as they are.
        layers: the large modules, in order.
        check: refuses a model that `blocks` does not know.
        example: the smallest complete arguments, on the meta device.
        widths: of the texts that a model takes.
        split: the arguments of each of N experts, from a model, those of the ensemble, and widths.
        attention_kwargs: the argument that may have a LoRA's `scale`.
        text_mask: the argument that says which tokens of a text count; None where all do.
        is_residual: whether every block adds to its input, on one grid.
        prompt: the argument that stays the same object in a denoising loop.
        batches_guidance: whether pipelines with guidance compute both halves in one batch; those of
            Flux have none, or one after the other.
        timestep_divisor: what pipelines divide their scheduler's timesteps by before they call the
            denoiser; see `afa.denoisers.timesteps`.
        latent: the argument that is the noisy latent.
        component: what stock pipelines call the denoiser.
        repeated_blocks: classes of blocks that a model has many of, each of which compiles as one.
        original_blocks: roots of tensor names that this family alone has in the original code.
        library_blocks: the same for the library's names.
        original_layers: from the library's names of layers to pairs of the original code's name and
            the layers that it joins, for LoRAs; None knows the library's names alone.
        canonical_config: brings a configuration, with defaults filled in, into the one form in
            which architectures are compared; changes it in place.
        variant: the words of people for the model whose denoiser has these tensors, named as in
            either layout without a prefix; None of tensors that are no such denoiser's.
        pipelines: the kinds of pipelines that have such a denoiser.
    """

    name: str
    model_class: Any
    output_class: Any
    blocks: Callable[..., Blocks]
    layers: Callable[[Any], list[nn.Module]]
    check: Callable[[Any], None]
    example: Callable[[Any], dict[str, Any]]
    widths: Callable[[Any], Widths]
    split: Callable[[Any, Mapping[str, Any], Widths, int], list[dict[str, Any]]]
    attention_kwargs: str = "joint_attention_kwargs"
    text_mask: str | None = None
    is_residual: bool = True
    prompt: str = "encoder_hidden_states"
    batches_guidance: bool = True
    timestep_divisor: float = 1.0
    latent: str = "hidden_states"
    component: Component = "transformer"
    repeated_blocks: tuple[str, ...] = ()
    original_blocks: tuple[str, ...] = ()
    library_blocks: tuple[str, ...] = ()
    original_layers: Callable[[list[str]], Iterator[OriginalName]] | None = None
    canonical_config: Callable[[dict[str, Any]], None] | None = None
    variant: Callable[[Shapes], str | None] = lambda _: None
    pipelines: tuple[PipelineKind, ...] = ()

    def __post_init__(self) -> None:
        for kind in self.pipelines:
            if not hasattr(kind, "family"):  # a copy of a family keeps the kinds of the first
                object.__setattr__(kind, "family", self)


def split_joined(what: str, joined: Tensor, widths: Sequence[int], count: int) -> list[Tensor]:
    """One tensor [..., D] for each of N experts.

    Args:
        what: for the error.
        joined: [..., D], the same for all, or [..., N * D], part by part that of all experts.
        widths: of the parts; their sum is D.
        count: N.

    Raises:
        AfaError: another width.
    """
    width, came = sum(widths), joined.shape[-1]
    if came == width:
        return [joined] * count
    if came != width * count:
        raise AfaError(
            "AFA-MODEL-003",
            f"The {what} must be {width} wide (one for all experts) or {count} x {width} (one per "
            f"expert, concatenated), came {came}. Use the pipeline's own text encoder.",
        )
    parts = joined.split([w * count for w in widths], dim=-1)
    per_expert = zip(*(part.chunk(count, dim=-1) for part in parts), strict=True)
    if len(parts) == 1:
        # contiguous, or matrix products round differently from the expert's alone
        return [own.contiguous() for (own,) in per_expert]
    return [torch.cat(own, dim=-1) for own in per_expert]


def split_text(arguments: Mapping[str, Any], widths: Widths, count: int) -> list[dict[str, Any]]:
    """The arguments of N experts whose call has `encoder_hidden_states`."""
    texts = split_joined("text embedding", arguments["encoder_hidden_states"], widths.text, count)
    return [{**arguments, "encoder_hidden_states": text} for text in texts]


def split_pooled(
    per_expert: list[dict[str, Any]], pooled: Tensor, widths: Widths
) -> list[dict[str, Any]]:
    """The same arguments with each expert's own `pooled_projections`."""
    parts = split_joined("pooled text embedding", pooled, widths.pooled, len(per_expert))
    return [
        {**own, "pooled_projections": part} for own, part in zip(per_expert, parts, strict=True)
    ]
