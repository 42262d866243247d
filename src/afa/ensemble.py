"""`EnsembleDenoiser`: N frozen experts and their fusion rules, a drop-in for one denoiser."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from afa.acceleration.call import predict as accelerated
from afa.acceleration.loop import Loops
from afa.acceleration.settings import EXACT
from afa.aggregators import Condition, Fused, Mean, SABWConfig, weighted_sum
from afa.aggregators.build import build_sabw
from afa.aggregators.lowered import Lowered
from afa.delegation import Delegation
from afa.denoisers import (
    PLAIN,
    Execution,
    Family,
    Feature,
    Site,
    Widths,
    check_same_architecture,
    discover_sites,
    family_of,
    run_lockstep,
)
from afa.errors import AfaError
from afa.guard import Guard, is_finite
from afa.placement import Placement
from afa.prompt import cross_attentions, mean_of, mean_text, prompts_attended_once
from afa.steering import expert_names

if TYPE_CHECKING:
    from typing import Self

    from diffusers.models.attention_processor import Attention

    from afa.acceleration.graphs import Graphs
    from afa.acceleration.loop import Loop, Shortcut
    from afa.acceleration.plan import PruningPlan
    from afa.acceleration.settings import Acceleration
    from afa.guard import OnNonFinite
    from afa.sources import ExpertReference

#: called with the timestep [B], the site's name and the fusion weights [B, N, H, W]
WeightsObserver = Callable[[Tensor, str, Tensor], None]
#: answers to a timestep with the experts that run there, by number; the others are skipped
Schedule = Callable[[float], Sequence[int]]


class EnsembleDenoiser(Delegation, Placement, ModelMixin, ConfigMixin):
    """Several experts run side by side, fused after every block (AFA, section 3).

    Takes the place of `unet` or `transformer` in stock diffusers pipelines: same call, same output
    type, same configuration. The experts are frozen and stay in evaluation mode; only aggregators
    train. Their parameters stay in float32 whatever the experts are cast to; while drawing they are
    computed in the experts' type.

    Args:
        experts: N denoisers of one architecture, of a family in `afa.denoisers`.
        aggregators: a `SABWConfig` builds an untrained SABW at every site; a sequence holds one
            fusion rule per site, in site order; None takes the uniform mean.
        schedule: which experts run at a timestep; fusion rules see these alone. None runs all.
        widths: of the text encoders, where one expert has several whose embeddings are
            concatenated; None takes what the experts' configuration says.

    Raises:
        AfaError: no experts, experts that do not share one architecture, blocks that cannot be
            taken apart, or another number of aggregators than sites.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True

    def __init__(
        self,
        experts: Sequence[ModelMixin],
        aggregators: SABWConfig | Sequence[nn.Module] | None = None,
        schedule: Schedule | None = None,
        widths: Widths | None = None,
    ) -> None:
        super().__init__()
        if not experts:
            raise AfaError("An ensemble must have at least one expert, came none.")
        self.family: Family = family_of(experts[0])
        for n, expert in enumerate(experts[1:], start=1):
            family_of(expert)
            check_same_architecture(experts[0], expert, f"expert {n}")
        self.experts: Any = nn.ModuleList(experts)
        self.experts.requires_grad_(False)
        self.sites: tuple[Site, ...] = discover_sites(experts[0])
        self.widths: Widths = widths or self.family.widths(experts[0])
        self.aggregators = nn.ModuleList(self._build_aggregators(aggregators))
        self._signature = inspect.signature(self.family.model_class.forward)
        self._rules = {site.name: n for n, site in enumerate(self.sites)}
        self.schedule = schedule
        self.execution: Execution = PLAIN
        #: what is left out of denoising loops; see `afa.accelerate`
        self.acceleration: Acceleration = EXACT
        #: which experts run where; see `afa.accelerate`
        self.plan: PruningPlan | None = None
        #: what records its steps as CUDA graphs; see `afa.accelerate`
        self.graphs: Graphs | None = None
        #: what is done where an expert gives numbers that are none; see `afa.guard`
        self.on_nonfinite: OnNonFinite = "stop"
        #: how often each expert was left out at each site for that
        self.masked: Counter[tuple[str, str]] = Counter()
        self._loops, self._lowered = Loops(), Lowered()
        self._attentions: list[Attention] = []
        #: what is added to the experts' logits [N], by site; see `afa.steer`
        self.bias: Mapping[str, Tensor] = {}
        self.on_weights: WeightsObserver | None = None
        #: where the experts and the autoencoder come from; None where they were made in memory
        self.references: Sequence[ExpertReference] | None = None
        self.vae_reference: ExpertReference | None = None
        #: the folder, or the shipped configuration, that describes single files
        self.config_source: str | None = None
        #: what lent single files the parts that they leave out
        self.part_references: Sequence[ExpertReference] = ()
        #: the folder of the published code that the experts are in, which have none of their own
        self.kept_in: str | None = None
        self.register_to_config(**experts[0].config)
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
                f"An ensemble must have one aggregator per site: {len(self.sites)} sites, "
                f"{len(aggregators)} aggregators. List them in the order of `.sites`."
            )
        return aggregators

    # -- one step of denoising ----------------------------------------------------------------

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Predict with all experts, fused at every site (AFA, section 3.2).

        Takes what the experts' own class takes. Embeddings of the text are the experts',
        concatenated on the last axis as stock pipelines do with `EnsembleTextEncoder`, or one for
        all; see `afa.denoisers.Widths`. All else goes to every expert.

        Returns: the library's output object, or with `return_dict=False` a tuple of the prediction.

        Raises:
            AfaError: no latent at all; numbers that are none, see `afa.guard`; a text embedding of
                another width; or several timesteps at once where a
                schedule picks the experts by timestep.
        """
        arguments = self._bind(args, kwargs)
        sample = next(iter(arguments.values()))
        if sample.numel() == 0:
            raise AfaError(
                "A denoiser must have at least one latent with an area, came the shape "
                f"{tuple(sample.shape)}. Ask for a picture."
            )
        with self.lora_scale(arguments) as scale:
            prediction = self._predict(arguments, scale)
        return self.family.output_class(sample=prediction) if return_dict else (prediction,)

    def _predict(self, arguments: dict[str, Any], scale: float | None) -> Tensor:
        prompt = arguments.get(self.family.prompt)
        if torch.is_grad_enabled():
            return self._run_experts(arguments)
        if prompt is None:
            return self._finite(self._run_experts(arguments), arguments)
        loop = self._loops.of(prompt, _timesteps(arguments))
        if loop.num_calls == 1:
            self._attentions = cross_attentions(self)
            self.bias = {site: bias.to(prompt.device) for site, bias in self.bias.items()}
        run: Callable[..., Tensor] = self._run_experts
        if self._is_recordable(arguments):
            assert self.graphs is not None, "it is recordable"
            run = self.graphs.steps_of(loop, run, key=scale)
        with prompts_attended_once(self._attentions):
            if loop.is_guarded:
                return self._guarded(arguments)
            if self.acceleration.is_exact or arguments.get("skip_layers"):
                prediction = run(arguments)
            else:
                prediction = accelerated(
                    self.acceleration, loop, self.family, self.sites, arguments, run
                )
            return self._finite(prediction, arguments, loop)

    def _finite(
        self, prediction: Tensor, arguments: dict[str, Any], loop: Loop | None = None
    ) -> Tensor:
        """A prediction as it is; where it is not finite, the step once more under guard.

        Raises:
            AfaError: names the expert and the site where it came from, unless it is masked.
        """
        if is_finite(prediction) or self.exchange is not None:
            return prediction
        if loop is not None:  # what it has kept of its steps may be the same
            loop.is_guarded = True
        return self._guarded(arguments)

    def _guarded(self, arguments: dict[str, Any]) -> Tensor:
        """A step in which every feature is looked at, and nothing is left out to save time."""
        masks = self.on_nonfinite == "mask"
        guard = Guard(expert_names(self), self.dtype, masks=masks)
        prediction = self._run_experts(arguments, guard=guard)
        self.masked += guard.masked
        return prediction

    def _is_recordable(self, arguments: dict[str, Any]) -> bool:
        """Whether steps are CUDA graphs: nobody looks into them, and no value decides on them."""
        looked_into = self.on_weights or self.schedule or self.plan or arguments.get("skip_layers")
        elsewhere = self.execution.device or self.exchange or self.devices
        if self.graphs is None or looked_into or elsewhere:
            return False
        return self.graphs.take(next(iter(arguments.values())))

    def _run_experts(
        self,
        arguments: dict[str, Any],
        shortcut: Shortcut | None = None,
        guard: Guard | None = None,
    ) -> Tensor:
        """Run the experts side by side, without the sites that a shortcut skips."""
        sample, steps = next(iter(arguments.values())), _timesteps(arguments)
        taken = shortcut.prediction if shortcut else None
        if shortcut is not None and taken is not None:
            for site, weights in shortcut.weights.items():
                self._show(steps, site, weights)
            return taken
        active = self._active_experts(steps)
        per_expert = self.family.split(self.experts[0], arguments, self.widths, len(self.experts))
        heard = guard.look_at_inputs(sample, per_expert, active) if guard else active
        text = mean_text(self, arguments, per_expert, heard) if self.widths.text else None
        skipped = shortcut.skipped if shortcut else frozenset()
        left = self._experts_left(steps)
        execution = replace(self.execution, skipped=skipped)
        apart = self.exchange or self.devices
        running = self.exchange.own if self.exchange else active
        if self.devices is not None:
            per_expert = self.devices.send(per_expert, self.family.prompt)
        coroutines = [
            self.family.blocks(
                self.experts[n],
                **per_expert[n],
                execution=replace(execution, pruned={s for s in left if n not in left[s]}),
            )
            for n in running
        ]
        mask = arguments.get(self.family.text_mask or "")
        condition: Condition | None = None

        def fuse(features: Sequence[Feature]) -> Tensor | Sequence[Tensor]:
            nonlocal condition
            if apart is not None and features[0].site not in skipped:
                features = apart.gather(features, with_temb=condition is None)
            sound = guard.look(features, active) if guard else range(len(features))
            if condition is None:
                temb = mean_of([features[n].temb for n in sound])
                condition = Condition(steps, temb, text, sample, mask)
            site = features[0].site
            if shortcut is not None and site in skipped:
                fused = shortcut.take(site)
            else:
                weights = shortcut.kept_weights(site) if shortcut else None
                chosen = left.get(site)
                if guard is not None and len(sound) < len(features):
                    chosen = guard.still(chosen or sound, sound, site)
                fused = self._fuse(site, features, condition, chosen, weights)
                if guard is not None:
                    guard.look_at_fused(site, fused.feature)
                if shortcut is not None:
                    shortcut.note(site, fused)
            self._show(steps, site, fused.weights)
            return apart.scatter(fused.feature, running) if apart else fused.feature

        return run_lockstep(coroutines, fuse).to(sample.device)

    def _fuse(
        self,
        site: str,
        features: Sequence[Feature],
        condition: Condition,
        left: Sequence[int] | None,
        weights: Tensor | None,
    ) -> Fused:
        """Fuse at one site: some experts alone where a plan leaves these, or with given weights."""
        rule: Any = self.aggregators[self._rules[site]]
        condition = condition._replace(bias=self.bias.get(site))
        if weights is not None:
            chosen = range(len(features)) if left is None else left
            given = [features[n].hidden for n in chosen]
            return Fused(weighted_sum(given, weights[:, list(chosen)]), weights)
        if left is not None:
            return rule.fuse_some({n: features[n].hidden for n in left}, condition)
        hidden = [f.hidden for f in features]
        call = rule if torch.is_grad_enabled() else self._lowered.of(rule, hidden[0].dtype)
        return self.execution.segment(site, call, hidden, condition)

    def _experts_left(self, steps: Tensor) -> Mapping[str, Sequence[int]]:
        """The experts that run at these timesteps [B], by site; at other sites all do."""
        if self.plan is None:
            return {}
        distinct = steps.unique().tolist()
        return self.plan.at(distinct[0]) if len(distinct) == 1 else {}

    def _show(self, steps: Tensor, site: str, weights: Tensor | None) -> None:
        if self.on_weights is not None and weights is not None:
            self.on_weights(steps, site, weights)

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, as the experts' own class names them; the latent is the first."""
        arguments = self._signature.bind(self, *args, **kwargs).arguments
        del arguments["self"]
        return arguments

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

    # -- what a denoiser offers besides -------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
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
            AfaError: the experts' layers are in a file.
        """
        self.require_layers("moved or cast")
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        self.experts.to(*args, **kwargs)
        if device is not None:
            self.aggregators.to(device)
            self.devices = None
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

    def frozen_names(self) -> list[str]:
        """The names of all parameters and buffers of the experts."""
        named = (*self.experts.named_parameters(), *self.experts.named_buffers())
        return [f"experts.{name}" for name, _ in named]


def _timesteps(arguments: dict[str, Any]) -> Tensor:
    """One for each of the batch, [B], of the arguments of a call."""
    sample = next(iter(arguments.values()))
    return torch.as_tensor(arguments["timestep"], device=sample.device).expand(len(sample))
