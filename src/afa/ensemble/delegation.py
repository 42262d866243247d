"""What a denoiser offers besides its forward pass, done to every expert of an ensemble."""

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

from afa.errors import AfaError
from afa.lora.header import LoraFile
from afa.lora.plan import Base, plan_changes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from afa.denoisers import Execution, Family
    from afa.ensemble.placement.exchange import Exchange

_TEXT = "text_encoder"
#: of products, in diffusers' names, which are not read beside those of PEFT
_OTHER_NAMES = re.compile(r"\.(lora|lora_linear_layer|processor\.\w+_lora)\.(down|up)\.")
#: of one kind of block, over all its shapes; beyond that, calls are not compiled
_MAX_GRAPHS = 256


def _for_every_expert(name: str, *, changes_layers: bool = False) -> Callable[..., None]:
    """A method that calls the experts' own of the same name, in order.

    Args:
        name: of the method.
        changes_layers: whether it needs the layers of the experts in memory.
    """

    def call(self: Delegation, *args: Any, **kwargs: Any) -> None:
        if changes_layers:
            self.require_layers(f"changed by {name}")
        self.begin_anew()
        for expert in self.computed_experts:
            getattr(expert, name)(*args, **kwargs)

    call.__name__ = name
    call.__doc__ = f"`{name}` of the experts' own class, for every expert."
    return call


_layers_of_every_expert = partial(_for_every_expert, changes_layers=True)


class Delegation:
    """The part of `EnsembleDenoiser` that stock pipelines and users call besides the forward pass.

    `docs/compatibility.md` lists what works, and what is refused.
    """

    experts: Any
    family: Family
    execution: Execution
    exchange: Exchange | None
    modules: Callable[[], Iterator[nn.Module]]
    require_layers: Callable[[str], None]
    begin_anew: Callable[[], None]

    @property
    def distinct_experts(self) -> list[Any]:
        """The experts, one that is named twice once."""
        return list(dict.fromkeys(self.experts))

    @property
    def computed_experts(self) -> list[Any]:
        """The distinct experts that this process computes; without exchange all of them."""
        if self.exchange is None:
            return self.distinct_experts
        return [self.experts[n] for n in self.exchange.own]

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

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it would write every frozen expert again.

        Raises:
            AfaError: always; names `afa.save_ensemble`.
        """
        raise AfaError(
            "AFA-ENSEMBLE-020",
            "An ensemble must be saved without its experts' weights: use "
            "afa.save_ensemble(pipeline, folder), which keeps them by reference.",
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
        """Compile the blocks of experts and aggregators, each kind and shape of block once.

        All experts' blocks have the graphs of the first one's. What comes out differs by rounding.

        Args:
            args: of `torch.compile`, as are the options.
            options: by default `dynamic=False`, one graph for each size of picture.
        """
        options = {"dynamic": False, **options}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options.setdefault("recompile_limit", _MAX_GRAPHS)
        else:  # before torch 2.13 it is one for all that is compiled
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, _MAX_GRAPHS)
        for module in self.modules():
            if type(module).__name__ in self.family.repeated_blocks:
                module.compile(*args, **options)

    @property
    def attn_processors(self) -> dict[str, Any]:
        """All attention processors, by their name in the expert and `.expertN`.

        Pipelines tell an IP-Adapter's scales for a block by how the name starts.
        """
        return {
            f"{name}.expert{n}": processor
            for n, expert in enumerate(self.experts)
            for name, processor in expert.attn_processors.items()
        }

    def set_attn_processor(self, processor: Any) -> None:
        """Set one attention processor everywhere, or each by its name in `attn_processors`."""
        for n, expert in enumerate(self.experts):
            if not isinstance(processor, dict):
                expert.set_attn_processor(processor)
                continue
            end = f".expert{n}"
            own = {k.removesuffix(end): v for k, v in processor.items() if k.endswith(end)}
            expert.set_attn_processor(own)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Tell the experts which half of guidance is computed, as transformers' pipelines do."""
        with ExitStack() as stack:
            for expert in self.experts:
                stack.enter_context(expert.cache_context(name))
            yield

    def enable_cache(self, config: Any) -> NoReturn:
        """Refused: the library's caches wait in a forward pass that no expert runs here.

        Raises:
            AfaError: always.
        """
        raise AfaError(
            "AFA-ENSEMBLE-021",
            f"Caches of diffusers must hook a model's own forward pass; the experts of an ensemble "
            f"run block by block, so {type(config).__name__} would do nothing. Use "
            "afa.accelerate(pipeline, 'fast'), which has a cache of its own.",
        )

    # -- LoRAs ----------------------------------------------------------------------------------

    @contextmanager
    def lora_scale(self, arguments: dict[str, Any]) -> Iterator[float | None]:
        """Apply the LoRAs' `scale` to all experts, and take it out of the arguments."""
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
        """`fuse_lora` of the experts' own class, for every expert.

        LoRA experts share the parameters of their base; what is fused into comes to be each one's.

        Raises:
            AfaError: the experts' layers are in a file, where nothing can be fused into them.
        """
        self.require_layers("changed by fuse_lora")
        self.begin_anew()
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
        """The LoRAs that `load_lora_adapter` gave to all experts, by name."""
        return self.computed_experts[0].peft_config

    def load_lora_adapter(self, state_dict: Mapping[str, Any], **options: Any) -> None:
        """Add a LoRA to the denoiser of every expert; the way of `pipeline.load_lora_weights`.

        To add it to one, call this of `experts[N]`, or name `{base: ..., lora: ...}` as an expert.

        Args:
            state_dict: of the LoRA, in the library's names.
            options: see the experts' own class.

        Raises:
            AfaError: the LoRA changes text encoders, too, which then come to differ by expert; or
                the experts' layers are in a file; or it has a tensor that the library would leave
                out.
        """
        self.require_layers("changed by load_lora_adapter")
        of_text = [key for key in state_dict if key.startswith(_TEXT)]
        if of_text:
            raise AfaError(
                "AFA-ENSEMBLE-022",
                f"A LoRA that is added to an ensemble must be the denoiser's alone; this one has "
                f"{len(of_text)} tensors for text encoders. Name it as an expert, {{base: ..., "
                "lora: ...}, which merges both.",
            )
        self._account_for(state_dict, **options)
        # the pipeline is for moving a single offloaded model out of the way and back
        self.begin_anew()
        for expert in self.computed_experts:
            expert.load_lora_adapter(dict(state_dict), **options)

    def _account_for(
        self,
        state_dict: Mapping[str, Any],
        *,
        prefix: str | None = "transformer",
        adapter_name: str | None = None,
        **_: Any,
    ) -> None:
        """Refuse what the experts' own class leaves out with no more than a line in the log.

        Raises:
            AfaError: names the first such tensor.
        """
        kind = next(iter(self.family.pipelines), None)
        if kind is None or any(".lokr_" in name for name in state_dict):
            return  # a family without pipelines; a product of which PEFT reads all tensors
        start = f"{prefix}." if prefix else ""
        header = {name: {"dtype": "F32", "shape": t.shape} for name, t in state_dict.items()}
        lora = LoraFile(Path(adapter_name or "default"), header, {}, None, {})
        base = Base.of("the ensemble", kind, {kind.denoiser: self.experts[0]})
        changes = plan_changes(lora, base, 1.0, is_merged=False)
        lost = [name for name in state_dict if not name.startswith(start)]
        if ".lora_A." in next(
            iter(state_dict), ""
        ):  # by the first one it decides how all are named
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
                f"diffusers would leave out {len(lost)} of the LoRA's {len(state_dict)} tensors "
                f"(first: '{lost[0]}'). A LoRA that is added to an ensemble must have low-rank "
                "products for the denoiser alone. Name it as an expert, {base: ..., lora: ...}, "
                "which applies all of them.",
            )

    @property
    def _transformer_norm_layers(self) -> None:
        """Where the pipeline of Flux keeps the norms that a LoRA has replaced: never any."""
        return

    @_transformer_norm_layers.setter
    def _transformer_norm_layers(self, norms: Any) -> NoReturn:
        raise AfaError(
            "AFA-ENSEMBLE-024",
            "diffusers has left out the norms of this LoRA and added the rest. A LoRA that is "
            "added to an ensemble must have low-rank products alone. Take it out with "
            "pipeline.unload_lora_weights(), and name it as an expert, {base: ..., lora: ...}, "
            "which replaces the norms as well.",
        )

    # -- IP-Adapter -----------------------------------------------------------------------------

    _load_ip_adapter_weights = _layers_of_every_expert("_load_ip_adapter_weights")

    def _load_ip_adapter_loras(self, state_dicts: Any) -> dict[str, Any]:
        """The LoRAs of an IP-Adapter for faces, which the pipeline then loads into all experts."""
        return self.experts[0]._load_ip_adapter_loras(state_dicts)

    @property
    def encoder_hid_proj(self) -> Any:
        """The first expert's, of which pipelines count the IP-Adapters; all have the same."""
        return getattr(self.experts[0], "encoder_hid_proj", None)

    @encoder_hid_proj.setter
    def encoder_hid_proj(self, module: Any) -> None:
        for expert in self.distinct_experts:
            expert.encoder_hid_proj = module
            if module is None:
                expert.config.encoder_hid_dim_type = None

    @property
    def down_blocks(self) -> nn.ModuleList:
        """The first expert's, whose layers pipelines count for IP-Adapter scales by block."""
        return self.experts[0].down_blocks

    @property
    def up_blocks(self) -> nn.ModuleList:
        """See `down_blocks`."""
        return self.experts[0].up_blocks

    @property
    def add_embedding(self) -> nn.Module:
        """The first expert's, whose width pipelines of Stable Diffusion XL check."""
        return self.experts[0].add_embedding
