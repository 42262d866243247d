"""Experts from folders, hub ids or single files, to a stock diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from afa.aggregators import SABWConfig
from afa.denoisers.kinds import build_pipeline, denoiser_of, kind_of_pipeline
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.placement.streaming import LayerStream
from afa.ensemble.references import Provenance
from afa.ensemble.text import EnsembleTextEncoder, first_equal, share_equal
from afa.errors import AfaError
from afa.loading.compare import check_experts, check_facts
from afa.loading.expert import load_described
from afa.loading.expert_source import AnySource, ExpertSource, absolute_config, first_folder
from afa.loading.loaded import Expert
from afa.loading.lora import lora_expert, shared_copy
from afa.loading.manifest import ExpertManifest, read_manifest
from afa.loading.memory.budget import AHEAD, MemoryPlan, Place
from afa.loading.memory.plan import plan_experts
from afa.loading.quantization import Weights, quantize_linear, require_quantizer
from afa.loading.single_file.autoencoder import load_vae
from afa.loading.single_file.load import Companions
from afa.loading.single_file.supplied import require_autoencoder
from afa.loading.sources import require_hash
from afa.loading.trust.unchanged import marks_of, watch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from afa.ensemble.references import ExpertReference
    from afa.loading.trust.unchanged import Mark


def load_pipeline(
    experts: Sequence[AnySource],
    aggregators: SABWConfig | Sequence[nn.Module] | None = None,
    *,
    vae: AnySource | None = None,
    config: str | Path | None = None,
    parts: Sequence[AnySource] | None = None,
    allow_duplicates: bool = False,
    torch_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    place: Place = "memory",
    memory_budget: str | int | None = None,
    pixels: int | None = None,
    on_plan: Callable[[MemoryPlan], object] | None = None,
    quantize: Weights | None = None,
) -> DiffusionPipeline:
    """Put several diffusion models of one kind into one stock pipeline.

    Its class is that which the first expert names; other stock pipelines take the same parts:
    `StableDiffusionImg2ImgPipeline(**pipeline.components)`. `afa.denoisers.kinds` lists them.

    Args:
        experts: diffusers folders, single `.safetensors` files, hub ids, or `zoo:animals`; or an
            `afa.ExpertSource`, which also names a revision, the SHA-256 that the weights must have,
            a LoRA, or what the model predicts. A mapping is one as recipes have it, such as
            `{"base": "./base", "lora": "./ink.safetensors", "scale": 0.8}` or
            `{"model": "./a.safetensors", "prediction_type": "v_prediction"}`.
        aggregators: a `SABWConfig` for untrained ones, one fusion rule per site, or None for the
            uniform mean.
        vae: where the autoencoder comes from; None takes the first expert's, or one of `parts`.
        config: for single files, a local diffusers folder that describes them, whose weights are
            not read, or the name of a shipped one, such as `stable-diffusion-2`; None tells it
            from each file's tensors. See `afa.loading.single_file.identify.configs`.
        parts: folders, files or hub ids that supply single files with the text encoders, and the
            autoencoder, that they leave out.
        allow_duplicates: whether an expert may be named twice.
        torch_dtype: of experts and autoencoder; aggregators are float32.
        device: where everything is computed.
        place: where the experts' layers are until then: on that device, `memory`; in the
            processor's memory, `offload`; or in a file, `stream`, which never has more than one
            expert in memory.
        memory_budget: bytes of the device's memory, or a size such as `8GB`, in which the fastest
            of these places must fit with all that drawing takes; None takes `place`.
        pixels: height times width of the pictures that the budget is for; None for what the
            experts were made for.
        on_plan: is told what was chosen, before anything is loaded.
        quantize: the experts' linear layers have weights of 8 bits, `int8` or `float8`; see
            `afa.loading.quantization`.

    Raises:
        AfaError: an expert that cannot be found or read, experts that do not fit each other or the
            budget, or no torchao to quantise with.
    """
    if not experts:
        raise AfaError("AFA-LOAD-041", "An ensemble must have at least one expert, came none.")
    companions = Companions(
        torch_dtype,
        config=config,
        fallback=first_folder(experts),
        parts=parts or (),
        own_vae=vae is None,
    )
    companions.require_parts()
    manifests = [read_manifest(expert, companions) for expert in experts]
    if memory_budget is not None:
        plan = plan_experts(
            manifests,
            aggregators if isinstance(aggregators, SABWConfig) else None,
            torch_dtype,
            memory_budget,
            device=device,
            pixels=pixels,
            is_quantised=quantize is not None,
        )
        place = plan.place
        if on_plan is not None:
            on_plan(plan)
    if place not in get_args(Place):
        raise AfaError(
            "AFA-LOAD-042", f"place must be one of {', '.join(get_args(Place))}, came '{place}'."
        )
    if quantize is not None:
        require_quantizer(quantize, place)
    stream = LayerStream(device, ahead=AHEAD) if place == "stream" else None

    def settle(expert: Expert) -> None:
        if quantize is not None:
            quantize_linear(expert.denoiser, quantize)
        if stream is not None:
            stream.add(expert.kind.family.layers(expert.denoiser))

    vae = None if vae is None else ExpertSource.of(vae)
    marks = _check_before(manifests, vae)
    loaded = _load_all(manifests, settle, with_vae=vae is None)
    check_experts(loaded, allow_duplicates=allow_duplicates)
    autoencoder, vae_reference = _autoencoder(loaded[0], manifests[0], vae)
    pipeline = assemble(loaded, aggregators, autoencoder)
    denoiser = denoiser_of(pipeline)
    if place == "memory":
        pipeline.to(device)
    else:
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module) and part is not denoiser:
                part.to(device)
        if stream is not None:
            denoiser.use_stream(stream, device)
        else:
            denoiser.offload_experts(device)
    watch(pipeline, marks)
    denoiser.provenance = replace(
        denoiser.provenance,
        vae=vae_reference,
        parts=tuple(companions.references),
        config=config and absolute_config(config),  # what is told from the files is told again
    )
    return pipeline


def _check_before(
    experts: Sequence[ExpertManifest], vae: ExpertSource | None = None
) -> dict[Path, Mark]:
    """Refuse experts that do not fit each other before the first of them is loaded.

    Returns: what all files of weights are like, before any is read.

    Raises:
        AfaError: see `check_facts` and `ExpertManifest.require_whole`.
    """
    files: list[Path] = []
    for expert in experts:
        files += expert.files  # a folder is looked at as a whole before anything is used
        if expert.source.lora is not None:
            files.append(Path(expert.source.lora).expanduser())
    bases = {expert.source.base: expert for expert in experts}
    check_facts([expert.facts for expert in bases.values()])
    for number, expert in enumerate(experts):
        expert.require_whole(with_autoencoder=number == 0 and vae is None)
    places = [experts[0].path / "vae"]
    places += [] if vae is None else [Path(vae.source).expanduser()]
    for place in places:
        files += [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
    return marks_of(files)


def _autoencoder(
    expert: Expert, manifest: ExpertManifest, vae: ExpertSource | None
) -> tuple[nn.Module, ExpertReference]:
    """The autoencoder that is named; else the expert's own; else, for a file, that of a part.

    Raises:
        AfaError: there is none, or another than is demanded.
    """
    dtype = manifest.companions.torch_dtype
    if vae is not None:
        loaded, reference = load_vae(vae, config=expert.config, torch_dtype=dtype)
        require_hash("Autoencoder", reference, vae.sha256)
        return loaded, reference
    if expert.vae is not None:
        return expert.vae, replace(expert.reference, lora=None)
    if manifest.path.is_dir():
        return load_vae(manifest.source.base, torch_dtype=dtype)
    supplied = manifest.companions.vae(expert.config)
    require_autoencoder(expert.reference.source, is_there=supplied is not None)
    assert supplied is not None, "or it was refused"
    return supplied


def _load_all(
    experts: Sequence[ExpertManifest], settle: Callable[[Expert], None], *, with_vae: bool
) -> list[Expert]:
    """All experts, the first with a file's autoencoder; those of one base share its memory.

    Each is settled as soon as it is there, before the next is read. Text encoders that are equal
    are the same object.
    """
    keys = [expert.source.base for expert in experts]
    bases: dict[ExpertSource, Expert] = {}
    encoders: list[Any] = []
    loaded: list[Expert] = []
    for manifest, key in zip(experts, keys, strict=True):
        if key not in bases:
            bases[key] = load_described(manifest, with_vae=with_vae and not loaded)
        base = bases[key]
        require_hash("Expert", base.reference, manifest.source.sha256)
        if manifest.source.lora is not None:
            expert = lora_expert(base, manifest.source)
        elif keys.count(key) > 1:
            expert = replace(base, denoiser=shared_copy(base.denoiser))
        else:
            expert = base
            del bases[key]
        settle(expert)
        own = expert.text_encoders.items()
        shared = {name: first_equal(encoder, encoders) for name, encoder in own}
        encoders += shared.values()
        loaded.append(replace(expert, text_encoders=shared))
    return loaded


def assemble(
    experts: Sequence[Expert],
    aggregators: SABWConfig | Sequence[nn.Module] | None,
    vae: nn.Module,
) -> DiffusionPipeline:
    """A stock pipeline around an ensemble of loaded experts; the first one's scheduler is used."""
    first = experts[0]
    encoders = {
        name: share_equal([expert.text_encoders[name] for expert in experts])
        for name in first.text_encoders
    }
    joined = any(len(set(each)) > 1 for each in encoders.values())
    tokenizer = first.tokenizers.get("tokenizer")
    widths = first.kind.widths(first.text_encoders, getattr(tokenizer, "model_max_length", 0))
    denoiser = EnsembleDenoiser([expert.denoiser for expert in experts], aggregators, widths=widths)
    denoiser.provenance = Provenance(tuple(expert.reference for expert in experts))
    if joined and (entry := first.kind.padded_text) is not None:
        # the pipeline makes zeros of this width where there is no T5, and pads CLIP's text to it
        width = len(experts) * first.denoiser.config[entry]
        denoiser.register_to_config(**{entry: width})
    parts = {
        "vae": vae,
        first.kind.denoiser: denoiser,
        **{name: EnsembleTextEncoder(each, join=joined) for name, each in encoders.items()},
    }
    vae.requires_grad_(False)
    return _build(first, parts)


def _build(expert: Expert, parts: dict[str, Any]) -> DiffusionPipeline:
    rest = {**expert.tokenizers, "scheduler": expert.scheduler}
    name = expert.kind.class_for(expert.class_name, expert.denoiser, expert.text_encoders)
    return build_pipeline(name, {**rest, **parts}, expert.options)


def load_single(
    source: AnySource,
    *,
    companions: Companions | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> tuple[DiffusionPipeline, ExpertReference]:
    """One checkpoint by itself, with its own autoencoder, as anyone would load it.

    Args:
        source: see `load_expert`; or a LoRA on such a model.
        companions: what a single file may leave out; see `load_expert`.
        torch_dtype: of all weights.

    Returns: a stock pipeline, and what was loaded.

    Raises:
        AfaError: see `load_expert`.
    """
    companions = companions or Companions(torch_dtype)
    companions.require_parts()
    manifest = read_manifest(source, companions)
    marks = _check_before([manifest])
    expert = load_described(manifest)
    if manifest.source.lora is not None:
        expert = lora_expert(expert, manifest.source)
    components = {
        "vae": _autoencoder(expert, manifest, None)[0],
        expert.kind.denoiser: expert.denoiser,
        **expert.text_encoders,
    }
    pipeline = _build(expert, components)
    watch(pipeline, marks)
    return pipeline, expert.reference


def check_text_to_image(pipeline: DiffusionPipeline) -> None:
    """Refuse experts that draw from more than a prompt: for inpainting, depth, upscaling.

    Raises:
        AfaError: the denoiser takes other channels than the autoencoder makes, or class labels.
    """
    config, latent_channels = denoiser_of(pipeline).config, pipeline.vae.config.latent_channels
    kind = kind_of_pipeline(pipeline)
    if type(pipeline).__name__ in kind.others:
        raise AfaError(
            "AFA-LOAD-043",
            f"Text-to-image experts must draw from a prompt alone; a {type(pipeline).__name__} "
            "takes a picture besides. Call it from Python.",
        )
    taken, given = kind.latent_channels(config), config.get("out_channels") or config.in_channels
    # transformers may give a variance besides, or pack the latent
    gives_other = kind.gives_latent and given != latent_channels
    if taken != latent_channels or gives_other:
        raise AfaError(
            "AFA-LOAD-044",
            f"Text-to-image experts must take and give the autoencoder's {latent_channels} "
            f"channels; these take {taken} and give {given}. They are for another task, such as "
            "inpainting; put the ensemble into that task's pipeline.",
        )
    if not kind.text or config.get("class_embed_type") or config.get("num_class_embeds"):
        raise AfaError(
            "AFA-LOAD-045",
            "Text-to-image experts must not need class labels; these do. Put the ensemble into "
            "the pipeline of their own task.",
        )


def native_resolution(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels of the pictures that the experts were made for."""
    # packed latents have no size of their own; the pipeline knows
    size = denoiser_of(pipeline).config.get("sample_size") or pipeline.default_sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def size_multiple(pipeline: DiffusionPipeline) -> int:
    """What the height and width of a picture must be multiples of, in pixels."""
    kind = kind_of_pipeline(pipeline)
    return pipeline.vae_scale_factor * kind.patch(denoiser_of(pipeline).config)
