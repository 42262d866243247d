"""Load the experts of an ensemble folder with ComfyUI's own loaders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy.diffusers_load
import comfy.model_base
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from afa.ensemble.references import ExpertReference
from afa.errors import AfaError
from afa.loading.lora import hash_lora
from afa.loading.manifest import read_manifest
from afa.loading.saved import read_config, source_of, sources_in
from afa.loading.single_file.load import Companions
from afa.loading.sources import locate, locate_vae, require_hash
from afa.loading.weights import hash_files, hash_vae, weight_files

from .ensemble import ensemble_model
from .settings import EXACT, Settings
from .texts import EnsembleClip

if TYPE_CHECKING:
    from afa.loading.expert_source import ExpertSource

#: what an expert predicts, in ComfyUI's names
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}


class Parts(NamedTuple):
    """The MODEL, CLIP and VAE of a checkpoint or of an ensemble."""

    model: Any
    clip: Any
    vae: Any


def load_ensemble_parts(folder: Path, settings: Settings = EXACT) -> Parts:
    """Load the experts that an ensemble folder names, and its aggregators.

    Raises:
        AfaError: if an expert is missing, has another hash, or cannot be loaded in ComfyUI.
    """
    saved = read_config(folder)
    sources, config, saved_parts = sources_in(saved, folder)
    if saved_parts:
        raise AfaError(
            "AFA-COMFY-020",
            f"The experts of '{folder.name}' need text encoders or an autoencoder of other files. "
            "Load them with ComfyUI's own nodes, and use AFA Ensemble and AFA CLIP.",
        )
    experts = [load_expert(source, config) for source in sources]
    lacking = [s.source for s, e in zip(sources, experts, strict=True) if e.clip is None]
    if lacking:
        raise AfaError(
            "AFA-COMFY-021",
            f"'{lacking[0]}' has no text encoder. Load the models and text encoders with ComfyUI's "
            "own nodes, and use AFA Ensemble and AFA CLIP.",
        )
    vae = experts[0].vae
    if saved["vae"] is not None:
        named = source_of(saved["vae"], folder)
        same = (e.vae for s, e in zip(sources, experts, strict=True) if s.source == named.source)
        vae = next(same, None) or _load_vae(named)
    if vae is None:
        raise AfaError(
            "AFA-COMFY-022",
            f"'{sources[0].source}' has no autoencoder, and '{folder.name}' names no other. Load "
            "the models with ComfyUI's own nodes, and use AFA Ensemble and AFA CLIP.",
        )
    models = [expert.model for expert in experts]
    model = ensemble_model(models, folder, settings, are_checked=True)
    return Parts(model, EnsembleClip([expert.clip for expert in experts]), vae)


def load_expert(source: ExpertSource, config: str | None = None) -> Parts:
    """Load a single file or a diffusers folder, with its LoRA.

    Args:
        source: the expert.
        config: what describes single files, if an ensemble folder names it.

    Raises:
        AfaError: if it is missing, has another hash, or ComfyUI does not know it.
    """
    path = locate(source.source, source.revision)
    sha256 = hash_files(path, weight_files(path))
    require_hash("Expert", ExpertReference(source.source, sha256), source.sha256)
    embeddings = folder_paths.get_folder_paths("embeddings")
    load: Any = comfy.diffusers_load.load_diffusers
    if path.is_file():
        load = comfy.sd.load_checkpoint_guess_config
    try:
        found = load(str(path), output_vae=True, output_clip=True, embedding_directory=embeddings)
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise _unknown(source, error) from error
    model, clip, vae = found[:3]
    if model is None:
        raise _unknown(source, None)
    model = _as_predicted(model, source, config)
    if source.lora is not None:
        lora = Path(source.lora)
        if source.lora_sha256 not in (None, hash_lora(lora)):
            raise AfaError(
                "AFA-COMFY-023",
                f"The LoRA '{source.lora}' is not the one that the ensemble was trained with. "
                "Restore that file, or train again.",
            )
        weights = comfy.utils.load_torch_file(str(lora), safe_load=True)
        model, clip = comfy.sd.load_lora_for_models(
            model, clip, weights, source.scale, source.scale
        )
    return Parts(model, clip, vae)


def _unknown(source: ExpertSource, error: Exception | None) -> AfaError:
    reason = f" ({type(error).__name__}: {error})" if error else ""
    return AfaError(
        "AFA-COMFY-024",
        f"ComfyUI cannot load '{source.source}' as a checkpoint{reason}. Load it with the node for "
        "its kind, and use AFA Ensemble and AFA CLIP.",
    )


def _as_predicted(model: Any, source: ExpertSource, config: str | None) -> Any:
    """Let a MODEL predict what afa knows of the expert, if ComfyUI took it for something else.

    ComfyUI does not read the scheduler of diffusers folders, the metadata of files and the YAML
    files beside them.
    """
    companions = Companions(torch.float32, config=config)
    schedule = read_manifest(source, companions).facts.schedule
    asked = _PREDICTIONS.get(str(schedule.get("prediction_type")))
    zero_snr = bool(schedule.get("rescale_betas_zero_snr"))
    kinds = comfy.model_base.ModelType
    taken = {kinds.EPS: "eps", kinds.V_PREDICTION: "v_prediction"}.get(model.model.model_type)
    if taken is None or asked is None:  # flow matching
        return model
    if asked == taken and zero_snr == getattr(model.model.model_sampling, "zsnr", False):
        return model
    return ModelSamplingDiscrete().patch(model, asked, zero_snr)[0]


def _load_vae(source: ExpertSource) -> Any:
    path = locate_vae(source.source, source.revision)
    require_hash("Autoencoder", ExpertReference(source.source, hash_vae(path)), source.sha256)
    if path.is_dir():
        inside = path / "vae" / "diffusion_pytorch_model.safetensors"
        path = inside if inside.is_file() else path / "diffusion_pytorch_model.safetensors"
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))
    tensors = comfy.utils.load_torch_file(str(path))
    prefixed = comfy.utils.state_dict_prefix_replace(
        tensors, {"first_stage_model.": "", "vae.": ""}, filter_keys=True
    )
    return comfy.sd.VAE(sd=prefixed or tensors)
