"""Load experts from folders, hub ids or single files into a stock diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from afa.aggregators import SABWConfig
from afa.denoisers.kinds import build_pipeline, denoiser_of, kind_of_pipeline
from afa.denoisers.objective import objective_of
from afa.denoisers.packed import unpack_layers
from afa.ensemble.conversion import Objectives
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.placement.streaming import LayerStream
from afa.ensemble.references import Provenance
from afa.ensemble.text import EnsembleTextEncoder, first_equal, share_equal
from afa.errors import AfaError
from afa.loading.compare import check_experts, compare
from afa.loading.expert import load_described
from afa.loading.expert_source import AnySource, ExpertSource, Fuse, absolute_config, first_folder
from afa.loading.finding import require_none_wrong
from afa.loading.loaded import Expert
from afa.loading.lora import lora_expert, shared_copy
from afa.loading.manifest import ExpertManifest, read_manifest
from afa.loading.memory.budget import AHEAD, MemoryPlan, Place
from afa.loading.memory.plan import plan_experts
from afa.loading.predictions import (
    parts_of_predictions,
    require_one_latent_space,
    require_predictions,
)
from afa.loading.quantization import Weights, quantize_linear, require_quantizer
from afa.loading.single_file.autoencoder import load_vae, require_latents
from afa.loading.single_file.load import Companions
from afa.loading.sources import require_hash
from afa.loading.trust.unchanged import marks_of, watch, watch_as
from afa.machine.devices import require_dtype

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from afa.aggregators.rule import Schedule
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
    reserved: int = 0,
    on_plan: Callable[[MemoryPlan], object] | None = None,
    quantize: Weights | None = None,
    fuse: Fuse | None = None,
) -> DiffusionPipeline:
    """Combine several diffusion models into one stock pipeline.

    Its class is that of the first expert's pipeline. Other stock pipelines accept the same
    components: `StableDiffusionImg2ImgPipeline(**pipeline.components)`. `afa.denoisers.kinds` lists
    them.

    Args:
        experts: diffusers folders, single `.safetensors` or `.gguf` files, hub ids, or
            `zoo:animals`; or an `afa.ExpertSource`, which can add a revision, the required SHA-256
            of the weights, a LoRA, or what the model predicts; or a mapping as in recipes, such as
            `{"base": "./base", "lora": "./ink.safetensors", "scale": 0.8}` or
            `{"model": "./a.safetensors", "prediction_type": "v_prediction"}`.
        aggregators: a `SABWConfig` for untrained ones, one fusion rule per site, or None for the
            uniform mean.
        vae: source of the autoencoder; None uses the first expert's, or one of `parts`.
        config: for single files, a local diffusers folder that describes them, whose weights are
            not read, or the name of a bundled configuration, such as `stable-diffusion-2`; None
            finds it from each file's tensors. See `afa.loading.single_file.identify.configs`.
        parts: folders, files or hub ids that supply the text encoders and the autoencoder that
            single files lack.
        allow_duplicates: whether the same expert may be listed twice.
        torch_dtype: of experts and autoencoder; aggregators are float32.
        device: that computes.
        place: where the experts' layers are stored until they run: `memory`, on the device;
            `offload`, in the CPU's memory; or `stream`, in a file, with at most one complete expert
            in memory.
        memory_budget: bytes of the device's memory, or a size such as `8GB`; the fastest place that
            fits, with everything that drawing needs, is used instead of `place`.
        pixels: height times width of the pictures for the budget; None for the experts' native
            resolution.
        reserved: bytes of the budget for another model.
        on_plan: called with the chosen plan before anything is loaded.
        fuse: `blocks` fuses features after every block; `predictions` fuses predictions alone, so
            that experts only need one latent space; see `afa.loading.predictions`. None is
            `blocks`, but untrained aggregators fuse predictions alone (`sites="conv_out"`) if
            experts predict different quantities and the first one's schedule begins with pure
            noise, where fused features are worse; see docs/checkpoints.md.
        quantize: store weights of the experts' linear layers in 8 bits, `int8` or `float8`; see
            `afa.loading.quantization`.

    Weights that are quantised in a single file (float8, GGUF) stay so in memory, and `torch_dtype`
    is the type in which their layers compute; see `afa.denoisers.packed`.

    Raises:
        AfaError: if an expert cannot be found or read, the experts are not compatible or do not
            fit the budget, a package for `quantize` or GGUF files is missing, or `quantize` is set
            for experts that are quantised already.
    """
    if not experts:
        raise AfaError("AFA-LOAD-041", "experts is empty; an ensemble needs at least one expert.")
    companions = Companions(
        torch_dtype,
        config=config,
        fallback=first_folder(experts),
        parts=parts or (),
        own_vae=vae is None,
    )
    companions.require_parts()
    manifests = [read_manifest(expert, companions) for expert in experts]
    if fuse == "predictions":
        require_predictions(place, memory_budget)
    if memory_budget is not None:
        plan = plan_experts(
            manifests,
            aggregators if isinstance(aggregators, SABWConfig) else None,
            torch_dtype,
            memory_budget,
            device=device,
            pixels=pixels,
            is_quantised=quantize is not None,
            reserved=reserved,
        )
        place = plan.place
        if on_plan is not None:
            on_plan(plan)
    if place not in get_args(Place):
        raise AfaError(
            "AFA-LOAD-042", f"place must be one of {', '.join(get_args(Place))}; got '{place}'."
        )
    require_dtype(device, torch_dtype)
    if quantize is not None:
        require_quantizer(quantize, place, manifests)
        require_dtype(device, torch.float8_e4m3fn if quantize == "float8" else torch.int8)
    stream = LayerStream(device, ahead=AHEAD) if place == "stream" else None

    def prepare(expert: Expert) -> None:
        if quantize is not None:
            quantize_linear(expert.denoiser, quantize)
        if stream is not None:
            stream.add(expert.kind.family.layers(expert.denoiser))

    vae = None if vae is None else ExpertSource.of(vae)
    marks = _check_before(manifests, vae, fuse)
    loaded = _load_all(manifests, prepare, with_vae=vae is None)
    check_experts(loaded, allow_duplicates=allow_duplicates, fuse=fuse)
    autoencoder, vae_reference = _autoencoder(loaded[0], manifests[0], vae)
    if fuse == "predictions":
        require_one_latent_space(manifests, autoencoder, vae_reference)
    pipeline = assemble(loaded, aggregators, autoencoder, fuse)
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
        config=config and absolute_config(config),  # None: found again from the files
    )
    return pipeline


def _check_before(
    experts: Sequence[ExpertManifest],
    vae: ExpertSource | None = None,
    fuse: Fuse | None = "blocks",
) -> dict[Path, Mark]:
    """Check that experts are complete and compatible, before the first is loaded.

    Returns: the marks of all weight files, before any is read; see `afa.files.Mark`.

    Raises:
        AfaError: see `check_experts` and `ExpertManifest.require_whole`.
    """
    files: list[Path] = []
    for expert in experts:
        files += expert.files  # also checks the complete folder
        if expert.source.lora is not None:
            files.append(Path(expert.source.lora).expanduser())
    bases = {expert.source.base: expert for expert in experts}
    require_none_wrong(compare([expert.facts for expert in bases.values()], fuse=fuse))
    for number, expert in enumerate(experts):
        expert.require_whole(with_autoencoder=number == 0 and vae is None)
    if vae is not None:
        require_latents(vae, experts[0].facts.name, experts[0].facts.latents)
    places = [experts[0].path / "vae"]
    places += [] if vae is None else [Path(vae.source).expanduser()]
    for place in places:
        files += [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
    return marks_of(files)


def _autoencoder(
    expert: Expert, manifest: ExpertManifest, vae: ExpertSource | None
) -> tuple[nn.Module, ExpertReference]:
    """Load the given autoencoder, or the expert's own, or for a single file that of a part.

    Raises:
        AfaError: if its hash differs.
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
    assert supplied is not None, "checked by require_whole"
    return supplied


def _load_all(
    experts: Sequence[ExpertManifest], prepare: Callable[[Expert], None], *, with_vae: bool
) -> list[Expert]:
    """Load all experts; those of one base share its memory, and equal text encoders are shared.

    `prepare` is called with each expert before the next is loaded. Of single files, only the first
    expert's autoencoder is loaded.
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
        prepare(expert)
        own = expert.text_encoders.items()
        shared = {name: first_equal(encoder, encoders) for name, encoder in own}
        encoders += shared.values()
        loaded.append(replace(expert, text_encoders=shared))
    return loaded


def assemble(
    experts: Sequence[Expert],
    aggregators: SABWConfig | Sequence[nn.Module] | None,
    vae: nn.Module,
    fuse: Fuse | None = "blocks",
) -> DiffusionPipeline:
    """Build a stock pipeline from loaded experts, with the first one's scheduler."""
    first = experts[0]
    vae.requires_grad_(False)
    if fuse == "predictions":
        return _build(first, {**parts_of_predictions(experts, aggregators, vae), "vae": vae})
    encoders = {
        name: share_equal([expert.text_encoders[name] for expert in experts])
        for name in first.text_encoders
    }
    joined = any(len(set(each)) > 1 for each in encoders.values())
    tokenizer = first.tokenizers.get("tokenizer")
    widths = first.kind.widths(first.text_encoders, getattr(tokenizer, "model_max_length", 0))
    objectives = Objectives.of([objective_of(expert.scheduler) for expert in experts])
    if fuse is None and objectives is not None and isinstance(aggregators, SABWConfig):
        aggregators = aggregators.at_last_site() if objectives.prefers_predictions else aggregators
    denoiser = EnsembleDenoiser(
        [expert.denoiser for expert in experts], aggregators, widths=widths, objectives=objectives
    )
    denoiser.provenance = Provenance(tuple(expert.reference for expert in experts))
    if joined and (entry := first.kind.padded_text) is not None:
        # without T5, the pipeline fills zeros of this width, and pads CLIP's embeddings to it
        width = len(experts) * first.denoiser.config[entry]
        denoiser.register_to_config(**{entry: width})
    parts = {
        "vae": vae,
        first.kind.denoiser: denoiser,
        **{name: EnsembleTextEncoder(each, join=joined) for name, each in encoders.items()},
    }
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
    dequantise: bool = False,
) -> tuple[DiffusionPipeline, ExpertReference]:
    """Load one checkpoint alone, with its own autoencoder.

    Args:
        source: see `load_expert`; or a LoRA on such a model.
        companions: parts missing in a single file; see `load_expert`.
        dequantise: whether weights that are quantised in a single file are dequantised, so that
            they can be trained.

    Returns: a stock pipeline, and the reference of the model.

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
    if dequantise:
        unpack_layers(expert.denoiser)
        expert.denoiser.requires_grad_(True)
    components = {
        "vae": _autoencoder(expert, manifest, None)[0],
        expert.kind.denoiser: expert.denoiser,
        **expert.text_encoders,
    }
    pipeline = _build(expert, components)
    watch(pipeline, marks)
    return pipeline, expert.reference


def with_rules(
    pipeline: DiffusionPipeline, rules: Sequence[nn.Module], schedule: Schedule | None = None
) -> DiffusionPipeline:
    """Return a pipeline with the same experts and other fusion rules.

    Args:
        pipeline: with an ensemble, which is not changed.
        rules: one per site, in site order.
        schedule: see `EnsembleDenoiser`.
    """
    ensemble: EnsembleDenoiser = denoiser_of(pipeline)
    denoiser = EnsembleDenoiser(
        list(ensemble.experts), rules, schedule, ensemble.widths, ensemble.objectives
    )
    denoiser.register_to_config(**ensemble.config)  # `assemble` may have changed it
    denoiser.provenance = ensemble.provenance
    return with_parts(pipeline, {kind_of_pipeline(pipeline).denoiser: denoiser})


def with_parts(pipeline: DiffusionPipeline, parts: dict[str, Any]) -> DiffusionPipeline:
    """Copy a pipeline with some components replaced; it shares all others."""
    changed = build_pipeline(
        type(pipeline).__name__, {**pipeline.components, **parts}, pipeline.config
    )
    changed.set_progress_bar_config(disable=True)
    watch_as(changed, pipeline)  # it shares weights that are mapped from files
    return changed
