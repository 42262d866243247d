"""`EnsembleDenoiser`: N frozen experts and their fusion rules, a drop-in for one denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from afa.aggregators import SABW, Condition, Mean, SABWConfig, Separate
from afa.denoisers import (
    PLAIN,
    Execution,
    Feature,
    Site,
    discover_sites,
    family_of,
    move_all_but,
    run_lockstep,
)
from afa.errors import AfaError

if TYPE_CHECKING:
    from typing import Self

    from torch.distributed.device_mesh import DeviceMesh

    from afa.experts import ExpertReference

#: called with the timestep [B], the site's name and the fusion weights [B, N, H, W]
WeightsObserver = Callable[[Tensor, str, Tensor], None]
#: answers to a timestep with the experts that run there, by number; the others are skipped
Schedule = Callable[[float], Sequence[int]]

# what may differ between experts of one architecture
_FREE_CONFIG = frozenset({"sample_size", "upcast_attention", "dropout"})


class EnsembleDenoiser(ModelMixin, ConfigMixin):
    """Several experts run side by side, fused after every block (AFA, section 3).

    Takes the place of `unet` in stock diffusers pipelines: same call, same output type, same
    configuration. The experts are frozen and stay in evaluation mode; only aggregators train, and
    they stay in float32 whatever the experts are cast to.

    Args:
        experts: N U-Nets of one architecture.
        aggregators: a `SABWConfig` builds an untrained SABW at every site; a sequence holds one
            fusion rule per site, in site order; None takes the uniform mean.
        schedule: which experts run at a timestep; fusion rules see these alone. None runs all.

    Raises:
        AfaError: no experts, experts that do not share one architecture, blocks that cannot be
            taken apart, or another number of aggregators than sites.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True

    def __init__(
        self,
        experts: Sequence[UNet2DConditionModel],
        aggregators: SABWConfig | Sequence[nn.Module] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        if not experts:
            raise AfaError("An ensemble must have at least one expert, came none.")
        self._family = family_of(experts[0])
        for n, expert in enumerate(experts[1:], start=1):
            family_of(expert)
            check_same_architecture(experts[0], expert, f"expert {n}")
        self.experts: Any = nn.ModuleList(experts)
        self.experts.requires_grad_(False)
        self.sites: tuple[Site, ...] = discover_sites(experts[0])
        self.aggregators = nn.ModuleList(self._build_aggregators(aggregators))
        self._rules = {site.name: n for n, site in enumerate(self.sites)}
        self.schedule = schedule
        self.execution: Execution = PLAIN
        self.on_weights: WeightsObserver | None = None
        #: where the experts and the autoencoder come from; None where they were made in memory
        self.references: Sequence[ExpertReference] | None = None
        self.vae_reference: ExpertReference | None = None
        #: the folder that lent single files their configuration
        self.config_source: str | None = None
        self.register_to_config(**experts[0].config)
        self.eval()

    def _build_aggregators(
        self, aggregators: SABWConfig | Sequence[nn.Module] | None
    ) -> Sequence[nn.Module]:
        if aggregators is None:
            return [Mean() for _ in self.sites]
        if isinstance(aggregators, SABWConfig):
            return self._build_sabw(aggregators)
        if len(aggregators) != len(self.sites):
            raise AfaError(
                f"An ensemble must have one aggregator per site: {len(self.sites)} sites, "
                f"{len(aggregators)} aggregators. List them in the order of `.sites`."
            )
        return aggregators

    def _build_sabw(self, config: SABWConfig) -> Sequence[nn.Module]:
        """One SABW per site, or fewer where the config has them shared or left out."""
        device = next(self.experts[0].parameters()).device
        built: dict[object, nn.Module] = {}
        rules: list[nn.Module] = []
        for site in self.sites:
            if config.sites == "conv_out" and site is not self.sites[-1]:
                rules.append(Separate())
                continue
            key = site.channels if config.sharing == "width" else site.name
            if key not in built:
                own = replace(
                    config,
                    num_experts=len(self.experts),
                    in_channels=site.channels,
                    temb_channels=site.temb_channels,
                    text_channels=text_width(self.experts[0]),
                )
                built[key] = SABW(own).to(device)
            rules.append(built[key])
        return rules

    # -- one step of denoising ----------------------------------------------------------------

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict with all experts, fused at every site (AFA, section 3.2).

        Args:
            sample: noisy latent [B, C, H, W].
            timestep: one for all, or [B].
            encoder_hidden_states: the experts' text embeddings, concatenated [B, L, N * D], or
                one [B, L, D] for all.
            class_labels: as in `UNet2DConditionModel.forward`, for every expert, like all that
                follow.
            timestep_cond: embedding of the guidance scale.
            attention_mask: [B, L], 1 keeps.
            cross_attention_kwargs: for the attention processors; `scale` is that of the LoRAs.
            added_cond_kwargs: IP-Adapter images.
            down_block_additional_residuals: ControlNet's.
            mid_block_additional_residual: ControlNet's.
            down_intrablock_additional_residuals: T2I-Adapter's.
            encoder_attention_mask: [B, L], true keeps.
            return_dict: whether to return an output object or a tuple.

        Raises:
            AfaError: a text embedding of another width, or several timesteps at once where a
                schedule picks the experts by timestep.
        """
        steps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        active = self._active_experts(steps)
        texts = self.split_text(encoder_hidden_states)
        texts = [texts[n] for n in active]
        coroutines = [
            self._family.blocks(
                self.experts[n],
                sample,
                timestep,
                text,
                class_labels=class_labels,
                timestep_cond=timestep_cond,
                attention_mask=attention_mask,
                cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=added_cond_kwargs,
                down_block_additional_residuals=down_block_additional_residuals,
                mid_block_additional_residual=mid_block_additional_residual,
                down_intrablock_additional_residuals=down_intrablock_additional_residuals,
                encoder_attention_mask=encoder_attention_mask,
                execution=self.execution,
            )
            for n, text in zip(active, texts, strict=True)
        ]
        mean_text = _mean(texts)
        condition: Condition | None = None

        def fuse(features: Sequence[Feature]) -> Tensor | Sequence[Tensor]:
            nonlocal condition
            if condition is None:
                condition = Condition(steps, _mean([f.temb for f in features]), mean_text, sample)
            site = features[0].site
            rule = self.aggregators[self._rules[site]]
            fused = self.execution.segment(rule, [f.hidden for f in features], condition)
            if self.on_weights is not None and fused.weights is not None:
                self.on_weights(steps, site, fused.weights)
            return fused.feature

        prediction = run_lockstep(coroutines, fuse)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def _active_experts(self, steps: Tensor) -> Sequence[int]:
        """The experts that run at these timesteps [B]."""
        if self.schedule is None:
            return range(len(self.experts))
        distinct = steps.unique().tolist()
        if len(distinct) > 1:
            raise AfaError(
                "Where a schedule picks the experts, all of a batch must have one timestep, came "
                f"{', '.join(f'{step:g}' for step in distinct)}. Call it once for each."
            )
        return self.schedule(distinct[0])

    def split_text(self, encoder_hidden_states: Tensor) -> Sequence[Tensor]:
        """One text embedding [B, L, D] per expert, from [B, L, N * D] or [B, L, D].

        Raises:
            AfaError: another width.
        """
        width, count = text_width(self.experts[0]), len(self.experts)
        came = encoder_hidden_states.shape[-1]
        if came == width:
            return [encoder_hidden_states] * count
        if came == width * count:
            # contiguous, or matrix products round differently from the expert's alone
            return [part.contiguous() for part in encoder_hidden_states.chunk(count, dim=-1)]
        raise AfaError(
            f"The text embedding must be {width} wide (one for all experts) or {count} x {width} "
            f"(one per expert, concatenated), came {came}. Use the pipeline's own text encoder."
        )

    # -- what a denoiser offers besides -------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        return self.execution.device or next(self.experts[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The experts' data type; aggregators stay in float32."""
        return self.experts[0].dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the experts; move the aggregators, which keep their data type."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        self.experts.to(*args, **kwargs)
        if device is not None:
            self.aggregators.to(device)
        return self

    def half(self) -> Self:
        """Cast the experts to float16."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """Cast the experts to bfloat16."""
        return self.to(torch.bfloat16)

    def train(self, mode: bool = True) -> Self:
        """Set the aggregators' mode; the experts stay in evaluation mode."""
        super().train(mode)
        self.experts.eval()
        return self

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether only the features at the sites are kept for the backward pass."""
        return self.execution.checkpoints

    def enable_gradient_checkpointing(self, *_: Any, **__: Any) -> None:
        """Keep only the features at the sites for the backward pass; compute the rest again."""
        self.execution = replace(self.execution, checkpoints=True)

    def disable_gradient_checkpointing(self) -> None:
        """Undo `enable_gradient_checkpointing`."""
        self.execution = replace(self.execution, checkpoints=False)

    def offload_experts(self, device: torch.device | str) -> None:
        """Keep the experts' blocks on the CPU and bring one layer at a time to a device.

        Everything else goes there as a whole. For training, `enable_gradient_checkpointing` besides
        or the layers that a backward pass needs stay there until it.

        Args:
            device: where everything is computed.
        """
        self.experts.to("cpu")
        for expert in self.experts:
            move_all_but(expert, self._family.layers(expert), device)
        self.aggregators.to(device)
        self.execution = replace(self.execution, device=torch.device(device))

    def stop_offloading(self) -> None:
        """Undo `offload_experts`; the experts stay on the CPU, the aggregators where they are."""
        self.experts.to("cpu")
        self.execution = replace(self.execution, device=None)

    def shard_experts(self, mesh: DeviceMesh, **settings: Any) -> None:
        """Leave a part of every layer in each process; whoever runs a layer gathers it for that.

        Fully sharded data parallelism (Zhao et al., 2023, arXiv 2304.11277) for what is frozen. The
        aggregators stay whole. From then on the processes have to call the ensemble equally often.

        Args:
            mesh: one-dimensional, over the processes.
            settings: more of `torch.distributed.fsdp.fully_shard`.
        """
        from torch.distributed.fsdp import fully_shard

        device = torch.device(mesh.device_type)
        for expert in self.experts:
            layers = self._family.layers(expert)
            for layer in layers:
                fully_shard(layer, mesh=mesh, **settings)
            move_all_but(expert, layers, device)
        self.aggregators.to(device)

    def frozen_names(self) -> list[str]:
        """The names of all parameters and buffers of the experts."""
        named = (*self.experts.named_parameters(), *self.experts.named_buffers())
        return [f"experts.{name}" for name, _ in named]

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Switch FreeU on in every expert."""
        for expert in self.experts:
            expert.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Switch FreeU off in every expert."""
        for expert in self.experts:
            expert.disable_freeu()

    def fuse_qkv_projections(self) -> None:
        """Fuse the attention projections of every expert."""
        for expert in self.experts:
            expert.fuse_qkv_projections()

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        for expert in self.experts:
            expert.unfuse_qkv_projections()

    def set_default_attn_processor(self) -> None:
        """Give every expert the library's default attention processors."""
        for expert in self.experts:
            expert.set_default_attn_processor()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it would write every frozen expert again.

        Raises:
            AfaError: always; names `afa.save_ensemble`.
        """
        raise AfaError(
            "An ensemble must be saved without its experts' weights: use "
            "afa.save_ensemble(pipeline, folder), which keeps them by reference."
        )


def text_width(expert: UNet2DConditionModel) -> int:
    """Width D of the text embedding that a U-Net takes."""
    width = expert.config.encoder_hid_dim or expert.config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def check_same_architecture(
    first: UNet2DConditionModel, other: UNet2DConditionModel, name: str
) -> None:
    """Refuse an expert whose configuration differs from the first one's.

    Raises:
        AfaError: names the first entry that differs, with both values.
    """
    for key, expected in first.config.items():
        came = other.config.get(key)
        same = _as_tuple(expected) == _as_tuple(came)
        if not (same or key.startswith("_") or key in _FREE_CONFIG):
            raise AfaError(
                f"Experts must share one architecture: {name} has {key} = {_as_tuple(came)}, the "
                f"first expert has {_as_tuple(expected)}. Ensemble checkpoints of one family."
            )


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Mean of N tensors; of one tensor named N times, that tensor."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0]
    return sum(tensors[1:], start=tensors[0]) / len(tensors)
