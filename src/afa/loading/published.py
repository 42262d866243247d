"""Load ensembles saved by the published code of the method (Tenvence/afa, commit e42173c).

The folder is a Stable Diffusion pipeline, which is the first expert. It also contains
`additional_unet_0`, `additional_text_encoder_0`, ... of the other experts, one `aggregator_J` for
every site, and `model_config.json`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file

from afa.aggregators import SABWConfig
from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError
from afa.files import read_json
from afa.loading.compare import check_experts
from afa.loading.components import load_text_encoder, load_weights, loading_model
from afa.loading.expert import load_expert
from afa.loading.loaded import Expert
from afa.loading.pipeline import assemble
from afa.loading.single_file.autoencoder import load_vae
from afa.loading.trust.unchanged import marks_of, watch
from afa.loading.weights import check_safetensors, hash_files, weights_in
from afa.machine.damaged import loading

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_CONFIG = "model_config.json"
_NUM_GROUPS = 32  # of the published aggregators' norms; not in their configuration


class _Published(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class _Ensemble(_Published):
    num_models: int = Field(ge=1, le=64)
    num_aggregators: int = Field(ge=1, le=1024)


class _Aggregator(_Published):
    in_channels: int
    hidden_size: int = Field(ge=1, le=65536)
    num_experts: int
    num_layers: int = Field(ge=1, le=1024)
    num_attn_heads: int = Field(ge=1, le=65536)
    cross_attn_dim: int
    temb_channels: int


def is_published(folder: Path) -> bool:
    """Whether a folder was saved by the published code."""
    return (folder / _CONFIG).is_file()


def load_published(
    folder: Path,
    *,
    torch_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> DiffusionPipeline:
    """Load an ensemble of the published code, with its experts, into a stock pipeline.

    Raises:
        AfaError: if the folder is damaged, or its aggregators do not fit its experts.
    """
    marks = marks_of(sorted(folder.rglob("*.safetensors")))
    experts = _load_experts(folder, torch_dtype)
    check_experts(experts, allow_duplicates=True)
    vae, reference = load_vae(folder, torch_dtype=torch_dtype)
    pipeline = assemble(experts, published_aggregators(folder), vae)
    watch(pipeline, marks)
    ensemble = denoiser_of(pipeline)
    ensemble.provenance = replace(ensemble.provenance, vae=reference, folder=str(folder.absolute()))
    count = _read(folder / _CONFIG, _Ensemble).num_aggregators
    if count != len(ensemble.sites):
        raise AfaError(
            "AFA-LOAD-052",
            f"'{folder}' has {count} aggregators; it must have one for each of the "
            f"{len(ensemble.sites)} sites. Copy the folder again.",
        )
    for n, (rule, site) in enumerate(zip(ensemble.aggregators, ensemble.sites, strict=True)):
        file = _aggregator(folder, n) / "aggregator.safetensors"
        check_safetensors(file)
        requirement = f"The weights in '{file}' must fit the site {site.name} of these experts"
        with loading(requirement, "Copy the folder again."):
            rule.load_state_dict(load_file(file))
    return pipeline.to(device)


def describe_published(folder: Path) -> dict[str, Any]:
    """Describe an ensemble of the published code without loading its weights."""
    settings = _read(folder / _CONFIG, _Ensemble)
    config = published_aggregators(folder)
    return {
        "kind": "ensemble of the published code",
        "experts": settings.num_models,
        "aggregators": settings.num_aggregators,
        "aggregator": f"hidden_size {config.hidden_size}, num_layers {config.num_layers}, "
        f"num_heads {config.num_heads}",
        "sha256": hash_published(folder),
    }


def hash_published(folder: Path) -> str:
    """SHA-256 of all files that affect pictures; see `afa.loading.weights.hash_files`.

    These are the weights and configurations of experts, autoencoder and aggregators, the tokenizer
    and the scheduler.
    """
    settings = _read(folder / _CONFIG, _Ensemble)
    places = [place for parts in published_experts(folder) for place in parts]
    places.append(folder / "vae")
    files = [file for place in places for file in weights_in(place)[1]]
    aggregators = [_aggregator(folder, n) for n in range(settings.num_aggregators)]
    files += [place / "aggregator.safetensors" for place in aggregators]
    for file in files:
        check_safetensors(file)
    files += [place / "config.json" for place in (*places, *aggregators)]
    for place in (folder / "tokenizer", folder / "scheduler"):
        files += sorted(file for file in place.glob("*") if file.is_file())
    return hash_files(folder, [file for file in files if file.is_file()])


def published_experts(folder: Path) -> list[tuple[Path, Path]]:
    """Return the folders of U-Net and text encoder of every expert, the pipeline's own first.

    Raises:
        AfaError: if a configuration is missing or damaged.
    """
    count = _read(folder / _CONFIG, _Ensemble).num_models
    additional = [
        (folder / f"additional_unet_{n}", folder / f"additional_text_encoder_{n}")
        for n in range(count - 1)
    ]
    return [(folder / "unet", folder / "text_encoder"), *additional]


def published_aggregators(folder: Path) -> SABWConfig:
    """Return the settings of all aggregators, which may differ only in their channels.

    Raises:
        AfaError: if they differ otherwise, are for another number of experts, or are invalid; or if
            a configuration is missing or damaged.
    """
    settings = _read(folder / _CONFIG, _Ensemble)
    count = settings.num_models
    configs = [
        _read(_aggregator(folder, n) / "config.json", _Aggregator)
        for n in range(settings.num_aggregators)
    ]
    numbers = {c.num_experts for c in configs}
    if numbers != {count}:
        raise AfaError(
            "AFA-LOAD-054",
            f"The aggregators in '{folder}' are for {', '.join(map(str, sorted(numbers)))} "
            f"experts; they must be for its {count} experts. Copy the folder again.",
        )
    sizes = {(c.hidden_size, c.num_layers, c.num_attn_heads) for c in configs}
    if len(sizes) > 1:
        raise AfaError(
            "AFA-LOAD-055",
            f"The aggregators in '{folder}' have the sizes {sorted(sizes)}; these must be equal. "
            "Copy the folder again.",
        )
    hidden_size, num_layers, num_heads = sizes.pop()
    try:
        return SABWConfig(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            norm_num_groups=_NUM_GROUPS,
            hidden_ratio=None,
            min_scale=1,
        )
    except AfaError as error:
        raise AfaError(
            "AFA-LOAD-056", f"The aggregators in '{folder}' cannot be built: {error}"
        ) from error


def _load_experts(folder: Path, torch_dtype: torch.dtype) -> list[Expert]:
    """Load the pipeline's own expert and the additional ones, which use its tokenizer."""
    first = load_expert(folder, torch_dtype=torch_dtype)
    if "text_encoder" not in first.text_encoders or not isinstance(
        first.denoiser, UNet2DConditionModel
    ):
        raise AfaError(
            "AFA-LOAD-053",
            f"'{folder}' is a {first.class_name} without a U-Net or a text encoder; an ensemble of "
            "the published code must be a Stable Diffusion pipeline. Copy the complete folder.",
        )
    class_name = type(first.text_encoders["text_encoder"]).__name__
    additional = []
    for unet, text_encoder in published_experts(folder)[1:]:
        files = [*weights_in(unet)[1], *weights_in(text_encoder)[1]]
        for file in files:
            check_safetensors(file)
        reference = replace(
            first.reference,
            source=f"{first.reference.source}/{unet.name}",
            sha256=hash_files(folder, files),
        )
        with loading_model(folder):
            expert = replace(
                first,
                reference=reference,
                denoiser=load_weights(UNet2DConditionModel, unet, torch_dtype=torch_dtype),
                text_encoders={
                    "text_encoder": load_text_encoder(text_encoder, class_name, torch_dtype)
                },
            )
        additional.append(expert)
    return [first, *additional]


def _aggregator(folder: Path, number: int) -> Path:
    return folder / f"aggregator_{number}"


def _read(path: Path, model: Any) -> Any:
    """Read and check one of its configurations.

    Raises:
        AfaError: if it is missing, or has other keys or values than the published code writes.
    """
    content = read_json(path)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise AfaError(
            "AFA-LOAD-057",
            f"'{path}' is not as the published code writes it: '{key}': {first['msg']}. Got "
            f"{json.dumps(content)[:200]}. Copy the folder again.",
        ) from None
