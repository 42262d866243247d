"""Any denoiser as an expert whose prediction alone is fused.

Experts of different architectures have no common features, but if they share one latent space,
their predictions can be converted into one quantity. `Predictor` wraps an expert's denoiser; its
coroutine has one site, `out`. So an ensemble of predictions is an ensemble like any other: the
first expert's pipeline calls it as its own denoiser, and every other expert is called as its own
pipeline would call it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from afa.denoisers.coroutine import Blocks, Feature
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import Family, PipelineKind, Widths
from afa.denoisers.interface import Interface
from afa.denoisers.prompt import once_per_prompt
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from afa.denoisers.objective import Objective
    from afa.denoisers.packing import Packing

#: the only site of an ensemble of predictions
OUT = "out"
_TEMB = 256
#: arguments of the first expert's call that are prompts, sizes or settings, not other conditions
_PASSED = {
    *("encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs", "timestep_cond"),
    *("timestep", "pooled_projections", "return_dict", "guidance", "img_ids", "txt_ids"),
    "attention_mask",
}
#: methods and attributes of denoisers with which pipelines change their blocks
_CHANGES = {
    *("load_lora_adapter", "fuse_lora", "unfuse_lora", "set_adapters", "enable_lora"),
    *("disable_lora", "delete_adapters", "enable_freeu", "disable_freeu", "attn_processors"),
    *("set_attn_processor", "fuse_qkv_projections", "unfuse_qkv_projections", "down_blocks"),
    *("up_blocks", "_load_ip_adapter_weights", "_load_ip_adapter_loras", "encoder_hid_proj"),
}


@dataclass(frozen=True)
class Host:
    """The first expert, whose pipeline draws.

    Attributes:
        denoiser: its denoiser.
        family: its own family.
        packing: of the other experts' conditions in its text embedding.
    """

    denoiser: Any
    family: Family
    packing: Packing


class Predictor(nn.Module):
    """An expert of an ensemble of predictions.

    Args:
        denoiser: of the expert.
        kind: of its pipeline.
        objective: what it predicts; None for a model without data.
        host: the first expert.
        pipeline: the expert's own pipeline, for its settings; None for the first expert.
    """

    denoiser: Any

    def __init__(
        self,
        denoiser: nn.Module,
        kind: PipelineKind,
        objective: Objective | None,
        host: Host,
        pipeline: Any = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.kind, self.objective, self.host = kind, objective, host
        # not a module: its parts belong to the ensemble's pipeline
        self._pipeline = (pipeline,)
        #: the record by which ensembles run it
        self.family = family_of_predictions(host.family)

    @property
    def pipeline(self) -> Any:
        """The expert's own pipeline; None for the first expert."""
        return self._pipeline[0]

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's data type."""
        return next(self.denoiser.parameters()).dtype

    @property
    def channels(self) -> int:
        """The channels of the latent."""
        return self.kind.latent_channels(self.denoiser.config)

    def __getattr__(self, name: str) -> Any:
        """What ensembles ask of experts besides their prediction is asked of the denoiser.

        Raises:
            AfaError: for what changes the blocks of one architecture.
        """
        if name in _CHANGES:
            raise AfaError(
                "AFA-MODEL-063",
                f"{name} changes the blocks of one architecture, and these experts have different "
                "ones. Change an expert before it is loaded, for instance by {base: ..., lora: "
                "...}, or use experts of one architecture.",
            )
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)


def predictor_blocks(
    predictor: Predictor, *, execution: Execution = PLAIN, **arguments: Any
) -> Blocks:
    """Run one expert of an ensemble of predictions. Its only site is `out`.

    Args:
        predictor: the expert.
        execution: how its denoiser runs.
        arguments: of the first expert, those of its own denoiser; of the others, the noisy latent
            [B, C, H, W] under its name, `timestep` [B], and `conditions`.

    Yields: the prediction [B, C, H, W], without a learned variance.

    Returns: the prediction; of the first expert, with as many channels as its denoiser has.
    """
    sample = arguments[predictor.host.family.latent]

    def run(*args: Any, **kwargs: Any) -> Any:
        return execution.run(predictor.denoiser, *args, **kwargs)

    def predict(sample: Tensor) -> Tensor:
        if predictor.pipeline is None:
            given = {**arguments, predictor.host.family.latent: sample}
            predicted: Tensor = run(**given, return_dict=False)[0]
            return _latent(predictor.host.family, predicted, given)[:, : predictor.channels]
        divisor = predictor.host.family.timestep_divisor
        steps = arguments["timestep"] if divisor == 1 else arguments["timestep"] * divisor
        conditioning = predictor.kind.conditioning
        assert conditioning is not None, "experts without prompts are refused"
        found = conditioning.predict(
            predictor.pipeline,
            _Called(predictor.denoiser, run),
            sample,
            steps,
            {**arguments["conditions"], "sizes": _sizes(predictor, sample)},
        )
        return found.to(sample.dtype)

    prediction = execution.segment(OUT, predict, sample)
    fused = yield Feature(OUT, prediction, _embedded(predictor, arguments["timestep"], sample))
    if predictor.pipeline is not None:
        return fused
    if (grid := predictor.host.family.grid) is not None:
        return grid.pack(fused)
    missing = (predictor.denoiser.config.get("out_channels") or 0) - fused.shape[1]
    return nn.functional.pad(fused, (0, 0, 0, 0, 0, missing)) if missing > 0 else fused


class _Called:
    """A denoiser that is called through an `Execution`."""

    def __init__(self, denoiser: Any, run: Any) -> None:
        self._denoiser, self._run = denoiser, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def _latent(family: Family, tensor: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The latent [B, C, H, W] of an argument or an output of a denoiser."""
    return tensor if family.grid is None else family.grid.unpack(tensor, arguments)


def _sizes(predictor: Predictor, sample: Tensor) -> Tensor:
    """The size conditions of Stable Diffusion XL, of a whole picture: [B, 6], in pixels."""
    factor = predictor.pipeline.vae_scale_factor
    height, width = (side * factor for side in sample.shape[-2:])
    sizes = torch.tensor([height, width, 0, 0, height, width], device=sample.device)
    return sizes.expand(len(sample), 6)


def _embedded(predictor: Predictor, timestep: Any, sample: Tensor) -> Tensor:
    """An embedding [B, 256] of the noise level, which is equal for all experts."""
    steps = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).float()
    if predictor.objective is not None:
        divisor = predictor.host.family.timestep_divisor
        steps = predictor.objective.angle(steps * divisor) * (2000 / torch.pi)
    embedded = get_timestep_embedding(steps, _TEMB, flip_sin_to_cos=True, downscale_freq_shift=0)
    return embedded.to(sample.dtype)


def _split(
    predictor: Predictor, arguments: Mapping[str, Any], widths: Widths, count: int
) -> list[dict[str, Any]]:
    """The arguments of each expert, from those of the first expert's pipeline."""
    family, packing = predictor.host.family, predictor.host.packing
    others = [
        name
        for name, value in arguments.items()
        if value is not None and name not in {*_PASSED, family.latent, family.attention_kwargs}
    ]
    added = arguments.get("added_cond_kwargs") or {}
    others += [name for name in ("image_embeds", "hint") if added.get(name) is not None]
    if others:
        raise AfaError(
            "AFA-MODEL-061",
            f"The pipeline passes {', '.join(others)}, as for a ControlNet or an IP-Adapter, which "
            "only the first expert could use. Draw without it, or use experts of one architecture.",
        )
    text = arguments["encoder_hidden_states"]
    own, others_conditions = once_per_prompt(
        text, (packing, "unpacked"), lambda: _unpacked(packing, text, widths)
    )
    shared = {
        family.latent: _latent(family, arguments[family.latent], arguments),
        "timestep": _per_sample(arguments),
        "encoder_hidden_states": own,
    }
    first = {**arguments, "encoder_hidden_states": own}
    rest = [{**shared, "conditions": conditions} for conditions in others_conditions]
    assert len(rest) == count - 1, "one encoder for each expert but the first"
    return [first, *rest]


def _unpacked(
    packing: Packing, text: Tensor, widths: Widths
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    first, features = widths.text[0], packing.num_features(text.shape[1])
    if text.shape[-1] != sum(widths.text) + features:
        raise AfaError(
            "AFA-MODEL-062",
            f"The text embedding must have {sum(widths.text)} features of the first expert and "
            f"{features} that hold the other experts' prompts; got {text.shape[-1]}. Pass a "
            "prompt, or embeddings of the pipeline's own encode_prompt.",
        )
    parts = text.split([first, features, sum(widths.text) - first], dim=-1)
    own = torch.cat([parts[0], parts[2]], -1)  # contiguous, and no view of the text
    return own, packing.unpack(parts[1])


def _per_sample(arguments: Mapping[str, Any]) -> Tensor:
    sample = next(iter(arguments.values()))
    return torch.as_tensor(arguments["timestep"], device=sample.device).expand(len(sample))


class _Interface(Interface):
    """Describes an ensemble of predictions by its first expert."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def config(self, model: Any) -> Mapping[str, Any]:
        return self._family.interface.config(model.host.denoiser)

    def defaults(self, model: Any) -> Any:
        return self._family.interface.defaults(model.host.denoiser)

    def height(self, latent: Tensor) -> int:
        height = self._family.interface.height(latent)
        return height if self._family.grid is None else 2 * height

    def without_data(self, model: Any, model_class: Any) -> Any:
        twin = self._family.interface.without_data(model.host.denoiser, model_class)
        return Predictor(twin, model.kind, None, replace(model.host, denoiser=twin))


@lru_cache
def family_of_predictions(host: Family) -> Family:
    """The record of ensembles of predictions whose first expert is of a family."""
    return replace(
        host,
        blocks=predictor_blocks,
        layers=lambda predictor: [predictor.denoiser],
        check=lambda _: None,
        example=lambda predictor: host.example(predictor.denoiser),
        widths=lambda predictor: host.widths(predictor.host.denoiser),
        split=_split,
        is_residual=False,
        interface=_Interface(host),
    )
