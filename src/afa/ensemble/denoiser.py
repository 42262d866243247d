"""`EnsembleDenoiser`: N frozen experts and their fusion rules as one drop-in denoiser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from afa.aggregators import Mean, SABWConfig
from afa.aggregators.build import build_sabw
from afa.aggregators.lowered import Lowered
from afa.denoisers import (
    PLAIN,
    Execution,
    Family,
    Site,
    Widths,
    check_same_architecture,
    discover_sites,
    family_of,
)
from afa.denoisers.prompt import cross_attentions, prompts_attended_once
from afa.ensemble.caching.loop import Loops
from afa.ensemble.caching.shortcut import Shortcut
from afa.ensemble.combinations import Switches
from afa.ensemble.conversion import Conversion, Objectives
from afa.ensemble.delegation import Delegation
from afa.ensemble.guard import Guard, is_finite
from afa.ensemble.hooks import in_order
from afa.ensemble.locks import Lock
from afa.ensemble.observation import Observers, Recorder, WeightsObserver
from afa.ensemble.placing import Placement
from afa.ensemble.protocol import expert_names
from afa.ensemble.references import Provenance
from afa.ensemble.running import running_at
from afa.ensemble.step import run_step, timesteps_of
from afa.errors import AfaError

if TYPE_CHECKING:
    from typing import Self

    from diffusers.models.attention_processor import Attention

    from afa.aggregators.rule import Schedule
    from afa.ensemble.caching.loop import Loop
    from afa.ensemble.guard import OnNonFinite
    from afa.ensemble.hook import Hook
    from afa.ensemble.prompt_noise import PromptNoise


class EnsembleDenoiser(Switches, Delegation, Placement, ModelMixin, ConfigMixin):
    """Run N frozen experts in lockstep and fuse their features at every site (AFA, section 3).

    It replaces `unet` or `transformer` in stock diffusers pipelines: same call, same output type,
    same configuration. The experts are frozen and stay in evaluation mode; only the aggregators are
    trained. Parameters of aggregators stay in float32 whatever the experts are cast to. Without
    gradients, aggregators compute in the experts' data type.

    Args:
        experts: N denoisers of one architecture, of a family in `afa.denoisers`.
        aggregators: a `SABWConfig` builds an untrained SABW at every site; a sequence holds one
            fusion rule per site, in site order; None uses the uniform mean.
        schedule: a function from a timestep to the numbers of the experts that run, the only ones
            that fusion rules see; None runs all experts.
        widths: embedding widths of one expert's text encoders, if it has several; None reads the
            total width from the experts' configuration.
        objectives: what the experts predict, if they differ; None if all predict the same.

    Raises:
        AfaError: if there are no experts, the experts differ in architecture, a block has no
            coroutine, the number of aggregators is not the number of sites, or the objectives
            cannot be converted.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True

    def __init__(
        self,
        experts: Sequence[ModelMixin],
        aggregators: SABWConfig | Sequence[nn.Module] | None = None,
        schedule: Schedule | None = None,
        widths: Widths | None = None,
        objectives: Objectives | None = None,
    ) -> None:
        super().__init__()
        if not experts:
            raise AfaError(
                "AFA-ENSEMBLE-025", "An ensemble must have at least one expert; got none."
            )
        self.family: Family = family_of(experts[0])
        for n, expert in enumerate(experts[1:], start=1):
            family_of(expert)
            check_same_architecture(experts[0], expert, f"expert {n}")
        self.experts: Any = nn.ModuleList(experts)
        self.experts.requires_grad_(False)
        self.sites: tuple[Site, ...] = discover_sites(experts[0])
        self.widths: Widths = widths or self.family.widths(experts[0])
        self.aggregators = nn.ModuleList(self._build_aggregators(aggregators))
        self._signature = self.family.interface.signature(self.family.model_class)
        self._rules = {site.name: n for n, site in enumerate(self.sites)}
        self.objectives = objectives
        #: the hook that brings experts with other objectives to the ensemble's
        self.conversion = objectives and Conversion(self.family, self.sites[-1], objectives)
        self._lock = Lock()
        #: the denoising loops in progress
        self.loops = Loops()
        self.execution: Execution = PLAIN
        self.schedule = schedule
        #: what to do about non-finite values: raise an error, or mask the expert at that site
        self.on_nonfinite: OnNonFinite = "stop"
        #: by (expert, site), how often the expert was masked there
        self.masked: Counter[tuple[str, str]] = Counter()
        #: the aggregators' parameters in the experts' data type
        self.lowered = Lowered()
        self._attentions: list[Attention] = []
        #: called with the fusion weights of all calls, from any thread
        self.on_weights: WeightsObserver | None = None
        #: noise on the prompt that fusion rules see; see `afa.ensemble.prompt_noise`
        self.prompt_noise: PromptNoise | None = None
        #: observers of one thread each; see `afa.ensemble.recording.observed`
        self.observers = Observers()
        #: the sources of the experts, the autoencoder and the other parts
        self.provenance = Provenance()
        for name in self.family.attributes:
            setattr(self, name, getattr(experts[0], name))
        self.register_to_config(**self.family.interface.config(experts[0]))
        self.eval()

    def _build_aggregators(
        self, aggregators: SABWConfig | Sequence[nn.Module] | None
    ) -> Sequence[nn.Module]:
        if aggregators is None:
            return [Mean() for _ in self.sites]
        if isinstance(aggregators, SABWConfig):
            text_channels = sum(self.family.widths(self.experts[0]).text) or None
            device = next(self.experts[0].parameters()).device
            rules = build_sabw(aggregators, self.sites, len(self.experts), text_channels)
            return [rule.to(device) for rule in rules]
        if len(aggregators) != len(self.sites):
            raise AfaError(
                "AFA-ENSEMBLE-026",
                f"An ensemble must have one aggregator per site; got {len(self.sites)} sites and "
                f"{len(aggregators)} aggregators. List one for each entry of `.sites`, in order.",
            )
        return aggregators

    # -- one step of denoising ----------------------------------------------------------------

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Predict with all experts, fused at every site (AFA, section 3.2).

        It takes the arguments of the experts' own class: for a U-Net a noisy latent [B, C, H, W],
        timesteps and a text embedding. The text embedding is [B, L, N * D], the experts' embeddings
        concatenated as `EnsembleTextEncoder` does, or [B, L, D], one for all experts; see
        `afa.denoisers.Widths`. Every expert gets all other arguments. Calls from several threads
        are serialised.

        Returns: diffusers' output object, or `(prediction,)` with `return_dict=False`. The
            prediction has the shape of an expert's own.

        Raises:
            AfaError: if the latent is empty; if a value is not finite and gradients are off (see
                `afa.ensemble.guard`); if the text embedding has another width; if a schedule is
                set and the batch has several timesteps; or, with experts spread over processes, if
                the thread or the arguments differ from the other calls of this step.
        """
        arguments = self._bind(args, kwargs)
        sample = next(iter(arguments.values()))
        if sample.numel() == 0:
            raise AfaError(
                "AFA-ENSEMBLE-027",
                f"The latent is empty: got the shape {tuple(sample.shape)}. Batch size, height and "
                "width must be positive.",
            )
        if self.drafter is not None and not self.drafter.is_drawing:
            raise AfaError(
                "AFA-ENSEMBLE-062",
                "This ensemble draws by drafts, which were not made for this picture. Draw inside "
                "afa.drafting.routed, or call afa.drafting.use_drafts(pipeline, None).",
            )
        with self._lock, self.lora_scale(arguments) as scale:
            self._tell_observers("begin")
            prediction = self._predict(arguments, scale)
            self._tell_observers("end")
        output = self.family.interface.output(prediction)
        return self.family.output_class(sample=output) if return_dict else (output,)

    def _predict(self, arguments: dict[str, Any], scale: float | None) -> Tensor:
        prompt, steps = arguments.get(self.family.prompt), timesteps_of(arguments)
        sample = next(iter(arguments.values()))
        planned = None if self.plan is None else self.plan.at
        running = running_at(steps, len(self.experts), self.schedule, planned)
        if self.exchange is not None:
            self.exchange.check_call(steps, arguments, prompt)
        if self.shards is not None:
            self.shards.require_one_thread()

        def run(given: dict[str, Any], *of_call: Hook) -> Tensor:
            return run_step(self, given, running, in_order(*self._hooks(steps), *of_call))

        if torch.is_grad_enabled():
            return run(arguments)
        self.lowered.refresh()
        if prompt is None:
            return self._finite(run(arguments), arguments, run)
        loop = self.loops.of(prompt, steps, sample, self._agree)
        loop.runs(running)
        if loop.num_calls == 1:
            self._attentions = cross_attentions(self)
        with prompts_attended_once(self._attentions):
            if loop.is_guarded:
                return self._guarded(arguments, run)
            compute: Callable[..., Tensor] = run
            if self._is_recordable(arguments, steps):
                assert self.graphs is not None, "it is recordable"
                compute = self.graphs.steps_of(loop, run, key=scale)
            if self.acceleration.is_exact or arguments.get("skip_layers"):
                prediction = compute(arguments)
            else:
                prediction = self._cached(loop, arguments, compute)
            return self._finite(prediction, arguments, run, loop)

    def _hooks(self, steps: Tensor) -> list[Hook | None]:
        """The hooks of every step. The cache and the guard are added for single steps."""
        recorder = self._recorder(steps)
        biases = (self.steering, self.regions)
        of_fusion = (self.conversion, self.prompt_noise, *biases)
        return [self.devices, self.exchange, *of_fusion, recorder]

    def _recorder(self, steps: Tensor) -> Recorder | None:
        if self.is_drafting or (self.on_weights is None and not self.observers):
            return None
        return Recorder(steps, self.on_weights, self.observers)

    def _cached(
        self, loop: Loop, arguments: dict[str, Any], compute: Callable[..., Tensor]
    ) -> Tensor:
        """Predict with the cache: reuse features of earlier steps, or the prediction of one."""
        sample = next(iter(arguments.values()))
        cache = Shortcut(
            self.acceleration, self.sites, self.family.is_residual, loop, sample, self._agree
        )
        if cache.prediction is not None:
            if (recorder := self._recorder(timesteps_of(arguments))) is not None:
                for site, weights in cache.weights.items():
                    recorder.show(site, weights)
            return cache.prediction
        prediction = compute(arguments, cache)
        cache.keep(prediction)
        return prediction

    def _finite(
        self,
        prediction: Tensor,
        arguments: dict[str, Any],
        run: Callable[..., Tensor],
        loop: Loop | None = None,
    ) -> Tensor:
        """Return a finite prediction unchanged; otherwise run the step again with the guard.

        Raises:
            AfaError: if the prediction is not finite. It names the expert and the site, unless
                they are masked; with sharded experts it names neither.
        """
        if not self._agree(not is_finite(prediction)):
            return prediction
        if self.shards is not None:  # a process that stops within a step leaves the others waiting
            raise AfaError(
                "AFA-ENSEMBLE-028",
                "The prediction of this process or of another one is not finite (NaN or infinity). "
                "With sharded experts the expert cannot be found or masked. Load the experts "
                "unsharded in one process to find it.",
            )
        if loop is not None:  # its cached features may be non-finite as well
            loop.is_guarded = True
        self._tell_observers("begin")
        return self._guarded(arguments, run)

    @property
    def _agree(self) -> Callable[[bool], bool]:
        """Combine one decision with those of all processes that must run the same layers."""
        together = self.exchange or self.shards
        return together.any_of if together else bool

    def _guarded(self, arguments: dict[str, Any], run: Callable[..., Tensor]) -> Tensor:
        """Run a step that checks every feature and reuses nothing."""
        guard = Guard(expert_names(self), self.dtype, masks=self.on_nonfinite == "mask")
        prediction = run(arguments, guard)
        self.masked += guard.masked
        return prediction

    def _is_recordable(self, arguments: dict[str, Any], steps: Tensor) -> bool:
        """Whether this step can be a CUDA graph: all hooks allow it, and the latent is on a GPU."""
        if self.graphs is None or arguments.get("skip_layers"):
            return False
        hooks = in_order(*self._hooks(steps))
        latent = next(iter(arguments.values()))
        return all(hook.is_recordable for hook in hooks) and self.graphs.can_record(latent)

    # -- used by a step -----------------------------------------------------------------------

    def rule_at(self, site: str) -> nn.Module:
        """The fusion rule of a site."""
        return self.aggregators[self._rules[site]]

    def _tell_observers(self, what: Literal["begin", "end"]) -> None:
        """Tell all observers that a call begins, possibly for the second time, or has ended."""
        if self.is_drafting:
            return
        with ExitStack() as stack:  # if one raises, the others are still called
            for observation in reversed(self.observers):
                stack.callback(getattr(observation, what))

    def reset_loops(self) -> None:
        """Discard everything cached of denoising loops, after a change of what a step computes."""
        self.loops = Loops()

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by the names in the coroutine; the latent is the first."""
        return self.family.interface.arguments(self._signature.bind(*args, **kwargs).arguments)

    # -- devices, data types and modes --------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of inputs and predictions."""
        if self.devices is not None:
            return self.devices.main
        own = self.exchange.own[0] if self.exchange else 0
        return self.execution.device or next(self.experts[own].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The experts' data type; aggregators stay in float32."""
        return self.experts[0].dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the experts; move the aggregators, which keep their data type.

        Raises:
            AfaError: if the experts are streamed from a file, or if they are offloaded or spread
                over processes and the device is not the one on which they run.
        """
        self.require_layers("moved or cast")
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        self.reset_loops()
        if self.execution.device is not None or self.exchange is not None:
            self._require_same_device(device)
            self.experts.to(dtype=dtype, memory_format=memory_format)
            return self
        self.experts.to(*args, **kwargs)
        if device is not None:
            self.aggregators.to(device)
            self.devices = None
        return self

    def float(self) -> Self:
        """Cast the experts to float32."""
        return self.to(torch.float32)

    def double(self) -> Self:
        """Cast the experts to float64."""
        return self.to(torch.float64)

    def cpu(self) -> Self:
        """Move experts and aggregators to the CPU."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Self:
        """Move experts and aggregators to a CUDA device; None uses the current one."""
        return self.to(
            torch.device("cuda", device) if isinstance(device, int) else device or "cuda"
        )

    def half(self) -> Self:
        """Cast the experts to float16."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """Cast the experts to bfloat16."""
        return self.to(torch.bfloat16)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the aggregators; the experts stay in evaluation mode."""
        super().train(mode)
        self.experts.eval()
        return self

    def frozen_names(self) -> list[str]:
        """The names of all parameters and buffers of the experts."""
        named = (*self.experts.named_parameters(), *self.experts.named_buffers())
        return [f"experts.{name}" for name, _ in named]
