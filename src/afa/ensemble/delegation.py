"""Methods of a diffusers denoiser besides `forward`, applied to every expert of an ensemble."""

from __future__ import annotations

import inspect
import re
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from afa.denoisers.packed import packed_layers
from afa.errors import AfaError
from afa.lora.header import LoraFile
from afa.lora.plan import Base, plan_changes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from afa.denoisers import Execution, Family
    from afa.ensemble.placement.exchange import Exchange

_TEXT = "text_encoder"
#: LoRA tensors in diffusers' old naming; diffusers ignores them beside tensors in PEFT's naming
_OTHER_NAMES = re.compile(r"\.(lora|lora_linear_layer|processor\.\w+_lora)\.(down|up)\.")
#: limit on compiled graphs of one block class, over all shapes; torch runs further ones uncompiled
_MAX_GRAPHS = 256


def _for_every_expert(name: str, *, changes_layers: bool = False) -> Callable[..., None]:
    """Make a method that calls the method of the same name on every expert, in order.

    Args:
        name: the name of the method.
        changes_layers: whether the experts' layers must be in memory.
    """

    def call(self: Delegation, *args: Any, **kwargs: Any) -> None:
        if changes_layers:
            self.require_layers(f"changed by {name}")
        self.reset_loops()
        for expert in self.computed_experts:
            getattr(expert, name)(*args, **kwargs)

    call.__name__ = name
    call.__doc__ = f"Call `{name}` of every expert."
    return call


_layers_of_every_expert = partial(_for_every_expert, changes_layers=True)


class Delegation:
    """Methods of `EnsembleDenoiser`, besides `forward`, that stock pipelines and users call.

    `docs/compatibility.md` lists which features of diffusers work and which are refused.
    """

    experts: Any
    family: Family
    execution: Execution
    exchange: Exchange | None
    modules: Callable[[], Iterator[nn.Module]]
    require_layers: Callable[[str], None]
    reset_loops: Callable[[], None]

    @property
    def distinct_experts(self) -> list[Any]:
        """The experts without duplicates."""
        return list(dict.fromkeys(self.experts))

    @property
    def computed_experts(self) -> list[Any]:
        """The distinct experts that this process computes; all unless spread over processes."""
        if self.exchange is None:
            return self.distinct_experts
        return [self.experts[n] for n in self.exchange.own]

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the backward pass recomputes everything but the features at the sites."""
        return self.execution.checkpoints

    def enable_gradient_checkpointing(self, *_: Any, **__: Any) -> None:
        """Store only the features at the sites for the backward pass, and recompute the rest."""
        self.execution = replace(self.execution, checkpoints=True)

    def disable_gradient_checkpointing(self) -> None:
        """Undo `enable_gradient_checkpointing`."""
        self.execution = replace(self.execution, checkpoints=False)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to save a second copy of every frozen expert.

        Raises:
            AfaError: always. Use `afa.save_ensemble` instead.
        """
        raise AfaError(
            "AFA-ENSEMBLE-020",
            "save_pretrained would save a second copy of every expert. Use "
            "afa.save_ensemble(pipeline, folder), which saves references to them.",
        )

    # -- FreeU, attention, compilation ----------------------------------------------------------

    enable_freeu = _for_every_expert("enable_freeu")
    disable_freeu = _for_every_expert("disable_freeu")
    fuse_qkv_projections = _layers_of_every_expert("fuse_qkv_projections")
    unfuse_qkv_projections = _layers_of_every_expert("unfuse_qkv_projections")
    set_default_attn_processor = _for_every_expert("set_default_attn_processor")
    set_attention_slice = _for_every_expert("set_attention_slice")
    enable_layerwise_casting = _layers_of_every_expert("enable_layerwise_casting")

    def compile_repeated_blocks(self, *args: Any, **options: Any) -> None:
        """Compile the repeated blocks of experts and aggregators, once for each class and shape.

        All experts share the compiled graphs. The output differs by rounding.

        Args:
            args: positional arguments of `torch.compile`.
            options: keyword arguments of `torch.compile`. The default is `dynamic=False`: one graph
                for each picture size.
        """
        options = {"dynamic": False, **options}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options.setdefault("recompile_limit", _MAX_GRAPHS)
        else:  # before torch 2.13 the limit is global
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, _MAX_GRAPHS)
        for module in self.modules():
            if type(module).__name__ in self.family.repeated_blocks:
                module.compile(*args, **options)

    @property
    def attn_processors(self) -> dict[str, Any]:
        """All attention processors; keys are the names in expert N with the suffix `.expertN`.

        Pipelines look up the IP-Adapter scale of a block by the start of the name.
        """
        return {
            f"{name}.expert{n}": processor
            for n, expert in enumerate(self.experts)
            for name, processor in expert.attn_processors.items()
        }

    def set_attn_processor(self, processor: Any) -> None:
        """Set one attention processor for all layers, or a dictionary as `attn_processors`."""
        for n, expert in enumerate(self.experts):
            if not isinstance(processor, dict):
                expert.set_attn_processor(processor)
                continue
            end = f".expert{n}"
            own = {k.removesuffix(end): v for k, v in processor.items() if k.endswith(end)}
            expert.set_attn_processor(own)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Enter the `cache_context` of every expert; pipelines name a half of guidance there."""
        with ExitStack() as stack:
            for expert in self.experts:
                if hasattr(expert, "cache_context"):  # of several architectures, some have none
                    stack.enter_context(expert.cache_context(name))
            yield

    def enable_cache(self, config: Any) -> NoReturn:
        """Refuse diffusers' caches, which hook a model's `forward`; an ensemble never calls it.

        Raises:
            AfaError: always. Use `afa.accelerate` instead.
        """
        raise AfaError(
            "AFA-ENSEMBLE-021",
            f"{type(config).__name__} would have no effect: caches of diffusers hook a model's "
            "forward, and an ensemble runs its experts block by block. Use "
            "afa.accelerate(pipeline, 'fast') instead.",
        )

    # -- LoRAs ----------------------------------------------------------------------------------

    @contextmanager
    def lora_scale(self, arguments: dict[str, Any]) -> Iterator[float | None]:
        """Apply the LoRA `scale` of the attention arguments to all experts, and remove it there."""
        name = self.family.attention_kwargs
        given = arguments.get(name)
        if not given or "scale" not in given:
            yield None
            return
        arguments[name] = {key: value for key, value in given.items() if key != "scale"}
        scale_lora_layers(self, given["scale"])
        try:
            yield given["scale"]
        finally:
            unscale_lora_layers(self, given["scale"])

    set_adapters = _for_every_expert("set_adapters")
    delete_adapters = _layers_of_every_expert("delete_adapters")
    enable_lora = _for_every_expert("enable_lora")
    disable_lora = _for_every_expert("disable_lora")
    unfuse_lora = _layers_of_every_expert("unfuse_lora")
    unload_lora = _layers_of_every_expert("unload_lora")

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Fuse the loaded LoRAs into the weights of every expert.

        LoRA experts share the parameters of their base; parameters that change are copied first.

        Raises:
            AfaError: if the experts are streamed from a file.
        """
        self.require_layers("changed by fuse_lora")
        self.reset_loops()
        seen: set[int] = set()
        for expert in self.computed_experts:
            layers = [m for m in expert.modules() if isinstance(m, BaseTunerLayer)]
            for layer in layers:
                own: nn.Module = layer.get_base_layer()
                for name, parameter in list(own.named_parameters(recurse=False)):
                    if id(parameter) in seen:
                        copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                        setattr(own, name, copy)
                    seen.add(id(parameter))
        for expert in self.computed_experts:
            expert.fuse_lora(*args, **kwargs)

    @property
    def peft_config(self) -> dict[str, Any]:
        """The LoRAs that `load_lora_adapter` added to all experts, by adapter name."""
        return self.computed_experts[0].peft_config

    def load_lora_adapter(self, state_dict: Mapping[str, Any], **options: Any) -> None:
        """Add a LoRA to every expert; `pipeline.load_lora_weights` calls this.

        To add it to one expert, call this method of `experts[N]`, or list `{base: ..., lora: ...}`
        as an expert.

        Args:
            state_dict: the tensors of the LoRA, with diffusers' names.
            options: see `load_lora_adapter` of the experts' class.

        Raises:
            AfaError: if the LoRA has tensors for text encoders or tensors that diffusers would
                ignore, if the experts are streamed from a file, or if their weights are quantised.
        """
        self.require_layers("changed by load_lora_adapter")
        packed = next((name for e in self.experts for name in packed_layers(e)), None)
        if packed is not None:
            raise AfaError(
                "AFA-ENSEMBLE-069",
                f"The experts have quantised weights (first layer: '{packed}'), to which a LoRA "
                "cannot be added while they are in use. List it as an expert instead, {base: ..., "
                "lora: ...}, which dequantises the layers that it changes.",
            )
        of_text = [key for key in state_dict if key.startswith(_TEXT)]
        if of_text:
            raise AfaError(
                "AFA-ENSEMBLE-022",
                f"The LoRA has {len(of_text)} tensors for text encoders, but one that is loaded "
                "into an ensemble must have only the denoiser's. List it as an expert instead, "
                "{base: ..., lora: ...}, which applies both.",
            )
        self._require_all_read(state_dict, **options)
        self.reset_loops()
        for expert in self.computed_experts:
            expert.load_lora_adapter(dict(state_dict), **options)

    def _require_all_read(
        self,
        state_dict: Mapping[str, Any],
        *,
        prefix: str | None = "transformer",
        adapter_name: str | None = None,
        **_: Any,
    ) -> None:
        """Refuse a LoRA with tensors that diffusers would ignore with only a log line.

        Raises:
            AfaError: if there are such tensors; it names the first.
        """
        kind = next(iter(self.family.pipelines), None)
        if kind is None or any(".lokr_" in name for name in state_dict):
            return  # a family without pipelines, or a LoKr, of which PEFT reads all tensors
        start = f"{prefix}." if prefix else ""
        header = {name: {"dtype": "F32", "shape": t.shape} for name, t in state_dict.items()}
        lora = LoraFile(Path(adapter_name or "default"), header, {}, None, {})
        base = Base.of("the ensemble", kind, {kind.denoiser: self.experts[0]})
        changes = plan_changes(lora, base, 1.0, is_merged=False)
        lost = [name for name in state_dict if not name.startswith(start)]
        if ".lora_A." in next(iter(state_dict), ""):  # diffusers infers the naming from the first
            lost += [name for name in state_dict if _OTHER_NAMES.search(name)]
        lost += [
            name
            for change in changes
            for role, name in change.tensors.items()
            if role not in ("down", "up", "up_bias", "magnitude", "alpha")
        ]
        if lost:
            raise AfaError(
                "AFA-ENSEMBLE-023",
                f"diffusers would ignore {len(lost)} of the LoRA's {len(state_dict)} tensors "
                f"(first: '{lost[0]}'). A LoRA that is loaded into an ensemble must have only "
                "low-rank products for the denoiser. List it as an expert instead, {base: ..., "
                "lora: ...}, which applies all tensors.",
            )

    @property
    def _transformer_norm_layers(self) -> None:
        """The norms that a Flux LoRA replaced, as Flux's pipeline stores them: always None."""
        return

    @_transformer_norm_layers.setter
    def _transformer_norm_layers(self, norms: Any) -> NoReturn:
        raise AfaError(
            "AFA-ENSEMBLE-024",
            "diffusers ignored the norms of this LoRA and added the rest. A LoRA that is loaded "
            "into an ensemble must have only low-rank products. Remove it with "
            "pipeline.unload_lora_weights(), and list it as an expert, {base: ..., lora: ...}, "
            "which also replaces the norms.",
        )

    # -- IP-Adapter -----------------------------------------------------------------------------

    _load_ip_adapter_weights = _layers_of_every_expert("_load_ip_adapter_weights")

    def _load_ip_adapter_loras(self, state_dicts: Any) -> dict[str, Any]:
        """Convert the LoRAs of an IP-Adapter FaceID; the pipeline loads them into all experts."""
        return self.experts[0]._load_ip_adapter_loras(state_dicts)

    @property
    def encoder_hid_proj(self) -> Any:
        """The first expert's projection, where pipelines count the IP-Adapters; all are equal."""
        return getattr(self.experts[0], "encoder_hid_proj", None)

    @encoder_hid_proj.setter
    def encoder_hid_proj(self, module: Any) -> None:
        for expert in self.distinct_experts:
            expert.encoder_hid_proj = module
            if module is None:
                expert.config.encoder_hid_dim_type = None

    @property
    def down_blocks(self) -> nn.ModuleList:
        """The first expert's blocks, whose layers pipelines count for IP-Adapter scales."""
        return self.experts[0].down_blocks

    @property
    def up_blocks(self) -> nn.ModuleList:
        """See `down_blocks`."""
        return self.experts[0].up_blocks

    @property
    def add_embedding(self) -> nn.Module:
        """The first expert's embedding, whose width pipelines of Stable Diffusion XL check."""
        return self.experts[0].add_embedding
