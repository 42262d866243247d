"""One step of an ensemble: all experts side by side, fused at every site (AFA, section 3.2).

An expert is always meant by its number in the ensemble, never by its place among those that run:
a schedule, a pruning plan, masking and other processes all leave experts out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from afa.aggregators import Condition, Fused, Separate, weighted_sum
from afa.denoisers import Execution, run_lockstep
from afa.denoisers.prompt import mean_of, mean_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from afa.denoisers import Feature
    from afa.ensemble.caching.loop import Running, Shortcut
    from afa.ensemble.guard import Guard
    from afa.ensemble.protocol import Ensemble


def run_step(
    ensemble: Ensemble,
    arguments: dict[str, Any],
    running: Running,
    shortcut: Shortcut | None = None,
    guard: Guard | None = None,
) -> Tensor:
    """The fused prediction of one step.

    Args:
        ensemble: whose experts run.
        arguments: of its call by name, the latent [B, ...] first.
        running: the experts that run; and by site where a plan names fewer.
        shortcut: what is reused of earlier steps, at which sites.
        guard: looks at every feature, and may leave experts out where they are not finite.

    Returns: [B, ...], on the device of the latent.

    Raises:
        AfaError: see `EnsembleDenoiser.forward`.
    """
    return _Step(ensemble, arguments, running, shortcut, guard).run()


class _Step:
    """See `run_step`."""

    def __init__(
        self,
        ensemble: Ensemble,
        arguments: dict[str, Any],
        running: Running,
        shortcut: Shortcut | None,
        guard: Guard | None,
    ) -> None:
        self._ensemble, self._arguments = ensemble, arguments
        self._active, self._planned = running
        self._shortcut, self._guard = shortcut, guard
        self._sample: Tensor = next(iter(arguments.values()))
        self._timesteps = timesteps_of(arguments)
        self._skipped = shortcut.skipped if shortcut else frozenset()
        #: how features come together that are not all in this process, on one device
        self._apart = ensemble.exchange or ensemble.devices
        #: the experts that this process runs
        self._own = ensemble.exchange.own if ensemble.exchange else self._active
        self._text: Tensor | None = None
        self._condition: Condition | None = None

    def run(self) -> Tensor:
        if self._shortcut is not None and (reused := self._shortcut.prediction) is not None:
            for site, weights in self._shortcut.weights.items():
                self._ensemble.show(self._timesteps, site, weights)
            return reused
        coroutines = [
            self._ensemble.family.blocks(
                self._ensemble.experts[n], **given, execution=self._execution(n)
            )
            for n, given in self._given().items()
        ]
        return run_lockstep(coroutines, self._fuse).to(self._sample.device)

    def _given(self) -> dict[int, dict[str, Any]]:
        """The arguments of each expert that this process runs, by number."""
        ensemble = self._ensemble
        per_expert = ensemble.family.split(
            ensemble.experts[0], self._arguments, ensemble.widths, len(ensemble.experts)
        )
        sound: Sequence[int] = self._active
        if self._guard is not None:
            sound = self._guard.look_at_inputs(self._sample, per_expert, self._active)
        if ensemble.widths.text:
            self._text = mean_text(ensemble, self._arguments, per_expert, sound)
        if ensemble.devices is not None:
            per_expert = ensemble.devices.send(per_expert, ensemble.family.prompt)
        return {n: per_expert[n] for n in self._own}

    def _execution(self, expert: int) -> Execution:
        """How an expert's layers are run, without those that lead to sites where it is left out."""
        left_out = {site for site, chosen in self._planned.items() if expert not in chosen}
        return replace(self._ensemble.execution, skipped=self._skipped, pruned=left_out)

    def _fuse(self, yielded: Sequence[Feature]) -> Tensor | Sequence[Tensor]:
        """What the experts of this process continue with at a site."""
        site, shortcut = yielded[0].site, self._shortcut
        features = dict(zip(self._own, yielded, strict=True))
        if self._apart is not None and site not in self._skipped:
            features = self._apart.gather(features, with_temb=self._condition is None)
        masked = self._guard.look(features) if self._guard else frozenset()
        if self._condition is None:
            self._condition = self._conditioned(features, masked)
        if shortcut is not None and site in self._skipped:
            fused = shortcut.take(site)
        else:
            chosen = [n for n in self._planned.get(site, self._active) if n not in masked]
            if self._guard is not None:
                self._guard.require_some(chosen, site)
            weights = shortcut.kept_weights(site) if shortcut else None
            hidden = {n: feature.hidden for n, feature in features.items()}
            fused = self._fused(site, hidden, chosen, weights)
            if self._guard is not None and not masked:
                self._guard.look_at_fused(site, fused.feature)
            if shortcut is not None:
                shortcut.note(site, fused)
        self._ensemble.show(self._timesteps, site, fused.weights)
        return self._apart.scatter(fused.feature, self._own) if self._apart else fused.feature

    def _conditioned(self, features: Mapping[int, Feature], masked: frozenset[int]) -> Condition:
        """What the fusion rules of all sites may look at besides the features."""
        return Condition(
            timestep=self._timesteps,
            temb=mean_of([feature.temb for n, feature in features.items() if n not in masked]),
            text=self._text,
            sample=self._sample,
            text_mask=self._arguments.get(self._ensemble.family.text_mask or ""),
            num_experts=len(self._ensemble.experts),
        )

    def _fused(
        self,
        site: str,
        hidden: Mapping[int, Tensor],
        chosen: Sequence[int],
        weights: Tensor | None,
    ) -> Fused:
        """Fuse at one site.

        Args:
            site: its name.
            hidden: the features of the experts that run, by number.
            chosen: the experts that are fused.
            weights: [B, N, H, W] of an earlier step, which are used instead of the rule's own.
        """
        assert self._condition is not None, "it is made at the first site"
        ensemble = self._ensemble
        rule: Any = ensemble.rule_at(site)
        if weights is not None:
            given = [hidden[n] for n in chosen]
            return Fused(weighted_sum(given, weights[:, list(chosen)]), weights)
        condition = self._condition._replace(bias=ensemble.bias_at(site, self._condition.temb))
        call = rule
        if not torch.is_grad_enabled():
            call = ensemble.lowered.of(rule, hidden[chosen[0]].dtype)
        if isinstance(rule, Separate) or len(chosen) == condition.num_experts:
            return ensemble.execution.segment(site, call, list(hidden.values()), condition)
        return call.fuse_some({n: hidden[n] for n in chosen}, condition)


def timesteps_of(arguments: dict[str, Any]) -> Tensor:
    """One for each of the batch, [B], of the arguments of a call."""
    sample = next(iter(arguments.values()))
    return torch.as_tensor(arguments["timestep"], device=sample.device).expand(len(sample))
