"""The record of a family of denoisers.

A *family* is an architecture: one class of denoiser and its coroutine. A *pipeline kind* is a group
of stock pipelines in which checkpoints of a family are published, with certain text encoders.
Stable Diffusion and Stable Diffusion XL are two kinds of one family, the U-Net.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from afa.denoisers.interface import DIFFUSERS, Interface
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from afa.denoisers.coroutine import Blocks
    from afa.denoisers.original_names import OriginalName

    #: shapes of tensors, by name
    Shapes = Mapping[str, tuple[int, ...]]
    #: tensors by name, whose first dimension is the batch
    Conditions = Mapping[str, Tensor]

#: the name of the denoiser among a stock pipeline's components
Component = Literal["unet", "transformer"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
#: prefixes of an autoencoder's tensors in single files
VAE_PREFIXES = ("first_stage_model.", "vae.")


@dataclass(frozen=True)
class Widths:
    """Embedding widths of one expert's text encoders, one number per encoder.

    A pipeline runs each text encoder once for all experts and concatenates the embeddings on the
    last axis: [encoder 1 of all experts | encoder 2 of all experts | ...].

    Attributes:
        text: widths of the token embeddings.
        pooled: widths of the pooled text embeddings; empty if there are none.
        num_clip_tokens: for Stable Diffusion 3, the number of tokens of its two CLIP encoders,
            which come before the tokens of its T5 encoder.
    """

    text: tuple[int, ...]
    pooled: tuple[int, ...] = ()
    num_clip_tokens: int = 0


class Ambiguous(AfaError):
    """A single file fits several models, and a wrong guess would draw noise."""


@dataclass(frozen=True)
class Conditioning:
    """How one kind of pipeline encodes prompts and passes them to its denoiser.

    Attributes:
        encode: a function of a pipeline and captions that returns the conditions, as the pipeline
            itself makes them. An empty caption means no prompt.
        predict: a function of a pipeline (for its configuration), a denoiser, noisy latents
            [B, C, H, W], timesteps [B] and conditions that returns a prediction [B, C, H, W].
        unpack: for pipelines that pack latents into tokens, a function of a pipeline, packed
            latents [B, L, D], and height and width in pixels that returns latents [B, C, H, W].
    """

    encode: Callable[[Any, list[str]], dict[str, Tensor]]
    predict: Callable[..., Tensor]
    unpack: Callable[[Any, Tensor, int, int], Tensor] | None = None


@dataclass(frozen=True)
class FileDenoiser:
    """The denoiser in a single file.

    Attributes:
        shapes: the shapes of its tensors, by name without their common prefix.
        is_diffusers: whether the names are those of diffusers, not of the original code.
        source: the file, for errors.
        predicts: its prediction type, if the file or the user states it.
        has_zero_snr: whether the file states that it was trained with zero terminal SNR.
    """

    shapes: Shapes
    is_diffusers: bool
    source: object
    predicts: str | None = None
    has_zero_snr: bool = False

    def size(self, name: str, dimension: int) -> int:
        """The size of one dimension of a tensor; 0 if there is no such tensor or dimension."""
        shape = self.shapes.get(name, ())
        return shape[dimension] if len(shape) > dimension else 0


@dataclass(frozen=True)
class SingleFiles:
    """The layout of single files of one kind of pipeline.

    Attributes:
        configuration: a function of the file's denoiser that returns the name of a bundled
            configuration, or a pipeline folder. It raises `AfaError` for an unknown model, and
            `Ambiguous` if the tensors fit several models.
        parts: by component, the prefixes of its tensors; without the denoiser.
        original: names of tensors, or prefixes that end with a dot, that identify a denoiser in the
            layout of the original code; empty if there is no such layout.
        diffusers: the same for the layout of diffusers.
        common_names: the usual names of text encoders that files lack, for messages.
        optional: text encoders that many files lack and without which the pipeline also draws.
        blocks: for messages, a regular expression of the start of a block's tensor names -> the
            usual name of these blocks.
        convert: a function of tensors in the original layout, the denoiser's configuration and the
            pipeline's folder that returns the state dict; None uses diffusers' conversion.
        written: a function of the shapes of the denoiser in diffusers and of the pipeline's parts
            that returns the prefixes that `afa export` writes, by part: those that other programs
            expect.
        renamed: for `afa export`, regular expression -> replacement in names of the denoiser's
            tensors, where these differ in more than the name of their layer.
        architectures: bundled configuration -> its name in the metadata standard of
            https://github.com/Stability-AI/ModelSpec.
        gguf: the `general.architecture` of GGUF files; None if there are none.
    """

    configuration: Callable[[FileDenoiser], str | Path]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    original: tuple[str, ...] = ()
    diffusers: tuple[str, ...] = ()
    common_names: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    blocks: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[Mapping[str, Tensor], dict[str, Any], Path], dict[str, Tensor]] | None = None
    written: Callable[[Shapes, Collection[str]], Mapping[str, str]] = lambda *_: {}
    renamed: Mapping[str, str] = field(default_factory=dict)
    architectures: Mapping[str, str] = field(default_factory=dict)
    gguf: str | None = None


@dataclass(frozen=True, eq=False)
class PipelineKind:
    """A kind of stock pipeline in which checkpoints of a family are published.

    Attributes:
        name: the name that users know.
        pipelines: text-to-image pipelines: names of diffusers classes, or classes of any package.
        others: names of diffusers pipelines that also take an initial picture.
        text: text encoders whose token embeddings are concatenated, in order.
        text_layers: of how many layers of each such encoder the embeddings are concatenated.
        pooled: text encoders whose pooled embeddings are concatenated, in order.
        conditioning: how prompts are encoded and passed to the denoiser; None rules out training.
        single_files: the layout of single files; None means that there are only pipeline folders.
        latent_channels: a function of the denoiser's configuration: the channels of the latent.
        patch: a function of the denoiser's configuration: the side of its patches of a latent.
        max_latent: a function of the denoiser's configuration: the longest side of a latent for
            which it has position embeddings; None if it computes them for any side.
        call: arguments of the pipeline's call that keep the requested size and the prompt.
        gives_latent: whether text-to-image denoisers output exactly the latent's channels; others
            may also output a variance, or pack the latent.
        sample_size: the side of the native latents if the configuration has no `sample_size`.
        padded_text: the configuration entry of the width to which the pipeline pads the tokens of
            the CLIP encoders, before the T5 tokens; None if it concatenates widths instead.
        clip_layer: if all token embeddings are those of CLIP, the layer of the text encoders that
            the pipelines pass: `last` with its norm, or `penultimate` without. None: there are
            others, and prompts cannot be weighted.
        shares_length: whether the maximum length of `tokenizer` also limits the other tokenizers.
        prepare: how the pipelines change a prompt before they tokenize it.
        guide: a function of a guidance scale (1 means none) that returns arguments of the call.
        without_prompt: the negative prompt of a call with guidance if the user has none.
        takes_negative: whether the pipelines use a negative prompt by default.
        carries_prompts: whether its pipelines pass the embedding of all tokens of a prompt to the
            denoiser unchanged, so that it can carry the prompts of other experts, see
            `afa.denoisers.packing`.
        flow_samplers: with which samplers of a flow its pipelines draw, see
            `afa.denoisers.scheduler_names`: many set noise levels that some schedulers do not take.
        unusable: names of `others` that fail, in diffusers or with an ensemble.
        family: the family that lists this kind in `pipelines`.
    """

    name: str
    pipelines: tuple[str | type, ...]
    others: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    text_layers: int = 1
    pooled: tuple[str, ...] = ()
    conditioning: Conditioning | None = None
    single_files: SingleFiles | None = None
    latent_channels: Callable[[Any], int] = lambda config: config.in_channels
    patch: Callable[[Any], int] = lambda config: config.get("patch_size") or 1
    max_latent: Callable[[Any], int | None] = lambda config: None
    call: Mapping[str, Any] = field(default_factory=dict)
    gives_latent: bool = False
    sample_size: int = 64
    padded_text: str | None = None
    clip_layer: Literal["last", "penultimate"] | None = None
    shares_length: bool = False
    prepare: Callable[[str], str] = str
    guide: Callable[[float], Mapping[str, Any]] = lambda guidance: {"guidance_scale": guidance}
    without_prompt: str = ""
    takes_negative: bool = True
    carries_prompts: bool = False
    flow_samplers: tuple[str, ...] = ("euler", "heun", "dpmpp_2m", "unipc")
    unusable: tuple[str, ...] = ()
    family: Family = field(init=False, repr=False)

    @property
    def denoiser(self) -> Component:
        """The component name of the denoiser, `unet` or `transformer`."""
        return self.family.component

    @property
    def packs(self) -> bool:
        """Whether its pipelines pack latents into tokens."""
        return self.conditioning is not None and self.conditioning.unpack is not None

    @property
    def file_parts(self) -> tuple[str, ...]:
        """The components with weights that single files may contain, the denoiser first."""
        files = self.single_files
        return () if files is None else (self.denoiser, *files.parts)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its pipeline classes, text-to-image pipelines first."""
        own = (each if isinstance(each, str) else each.__name__ for each in self.pipelines)
        return (*own, *self.others)

    def pipeline_class(self, class_name: str) -> Any:
        """The class of one of its pipelines, by name."""
        import diffusers

        given = {each.__name__: each for each in self.pipelines if isinstance(each, type)}
        return given.get(class_name) or getattr(diffusers, class_name)

    def class_for(self, class_name: str, denoiser: Any, encoders: Collection[str]) -> str:
        """Choose an ensemble's pipeline class: text-to-image if the experts support it.

        They do not if the denoiser also takes a picture, as for inpainting, or if a text encoder is
        missing, as in the refiner of Stable Diffusion XL; then the experts' own class is kept.

        Args:
            class_name: the experts' own pipeline class.
            denoiser: an expert.
            encoders: the names of the text encoders that the experts have.
        """
        config = denoiser.config
        is_whole = self.latent_channels(config) == (config.get("out_channels") or 0)
        is_whole = is_whole or not self.gives_latent
        if class_name not in self.others or not is_whole or set(self.text) - set(encoders):
            return class_name
        return self.class_names[0]

    def guidance(
        self, scale: float, negative_prompt: str = "", count: int | None = None
    ) -> dict[str, Any]:
        """The arguments of a pipeline's call for classifier-free guidance; a scale of 1 means none.

        An empty negative prompt means none; `count` is None for one prompt that is not in a list.
        """
        text = negative_prompt or (self.without_prompt if scale > 1 else "")
        # an empty text is not the same as none for Stable Diffusion XL, which then uses zeros
        negative = {"negative_prompt": text if count is None else [text] * count}
        return {**self.guide(scale), **(negative if text and self.takes_negative else {})}

    def native_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the latents for which a denoiser of this configuration was made."""
        size = config.get("sample_size") or self.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def widths(self, encoders: Mapping[str, PreTrainedModel], num_clip_tokens: int) -> Widths:
        """The embedding widths of one expert's text encoders; missing encoders do not count."""
        return Widths(
            tuple(
                text_config(encoders[name]).hidden_size
                for name in self.text
                for _ in range(self.text_layers * (name in encoders))
            ),
            tuple(_pooled_width(encoders[name]) for name in self.pooled if name in encoders),
            num_clip_tokens if self.padded_text else 0,
        )


def text_config(encoder: Any) -> Any:
    """The part of a text encoder's configuration that describes its text model."""
    return encoder.config.get_text_config()


def _pooled_width(encoder: Any) -> int:
    has_projection = type(encoder).__name__.endswith("WithProjection")
    return encoder.config.projection_dim if has_projection else encoder.config.hidden_size


@dataclass(frozen=True)
class Grid:
    """How a family's tokens and the latent [B, C, H, W] become each other.

    Attributes:
        unpack: a function of tokens [B, L, D] and the arguments of the call, which has their
            positions, that returns a latent.
        pack: a function of a latent that returns tokens.
    """

    unpack: Callable[[Tensor, Mapping[str, Any]], Tensor]
    pack: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Family:
    """Everything that afa knows of one architecture: its coroutine, inputs, names and pipelines.

    Attributes:
        name: the name in saved ensembles.
        model_class: the denoiser's class.
        output_class: the class of its output, with the attribute `sample`.
        blocks: the coroutine. It takes the model, the arguments of its forward pass by name, and an
            `execution` through which it runs the modules of `layers`.
        layers: a function of a model that lists its large modules, in order.
        check: raises AfaError for a model that `blocks` does not support.
        example: a function of a model that returns its smallest complete arguments, on the meta
            device.
        widths: a function of a model that returns the embedding widths of its texts.
        split: a function of a model, an ensemble's arguments, the widths and N that returns the
            arguments of each expert.
        attributes: attributes of a model, besides `config`, that pipelines read.
        attention_kwargs: the argument that may contain a LoRA's `scale`.
        text_mask: the argument with the mask of the text's tokens, which may continue with image
            tokens; None if all tokens count.
        is_residual: whether every block adds to its input, at one resolution.
        prompt: the argument that stays the same object in a denoising loop.
        batches_guidance: whether pipelines compute both halves of guidance in one batch; those of
            Flux have no guidance, those of Chroma compute the halves one after the other, the one
            with the prompt first.
        prompt_first: whether pipelines that compute both halves in one batch put the half with the
            prompt first; most put it last.
        timestep_divisor: pipelines divide the scheduler's timesteps by this before they call the
            denoiser; see `afa.denoisers.timesteps`.
        latent: the argument with the noisy latent.
        grid: how its tokens are placed, if pipelines pack the latent; None if they do not, or if
            that is not known here.
        component: the name of the denoiser in stock pipelines, `unet` or `transformer`.
        repeated_blocks: classes of repeated blocks, which are compiled one by one.
        original_blocks: starts of tensor names that only this family has in the original code.
        library_blocks: the same for the names in diffusers.
        original_layers: a function of the layer names in diffusers that yields pairs of a name in
            the original code and the layers that it joins, for LoRAs; None if there are no others.
        canonical_config: brings a configuration with defaults into the form in which architectures
            are compared, in place.
        variant: a function of tensor shapes (names in either layout, without a prefix) that returns
            the usual name of the model; None if the tensors are not from this family.
        pipelines: the kinds of pipelines with such a denoiser.
        interface: how models of the library that defines `model_class` are described and called.
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
    attributes: tuple[str, ...] = ()
    attention_kwargs: str = "joint_attention_kwargs"
    text_mask: str | None = None
    is_residual: bool = True
    prompt: str = "encoder_hidden_states"
    batches_guidance: bool = True
    prompt_first: bool = False
    timestep_divisor: float = 1.0
    latent: str = "hidden_states"
    grid: Grid | None = None
    component: Component = "transformer"
    repeated_blocks: tuple[str, ...] = ()
    original_blocks: tuple[str, ...] = ()
    library_blocks: tuple[str, ...] = ()
    original_layers: Callable[[list[str]], Iterator[OriginalName]] | None = None
    canonical_config: Callable[[dict[str, Any]], None] | None = None
    variant: Callable[[Shapes], str | None] = lambda _: None
    pipelines: tuple[PipelineKind, ...] = ()
    interface: Interface = DIFFUSERS

    def __post_init__(self) -> None:
        for kind in self.pipelines:
            if not hasattr(kind, "family"):  # a copied family leaves the kinds with the original
                object.__setattr__(kind, "family", self)
