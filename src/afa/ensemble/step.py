"""One step of an ensemble: all experts in lockstep, fused at every site (AFA, section 3.2).

Everything else that an ensemble does in a step, such as caching or placement on devices, is a hook;
see `afa.ensemble.hook`. A step calls the methods of its hooks in this order:

- before the experts run: `begin`, `arguments`;
- at every site: `features`, `look`, `condition`, `fuse`, `fused`, `send`;
- after the last site: `end`.

The order of the hooks, from the experts to the fused feature, is in `afa.ensemble.hooks`. A method
is called on the first hook first. `arguments` and `send` lead back to the experts, so they are
called on the last hook first.

Which experts run, and at which sites, is an argument of the step and not a hook: the coroutines are
made from it, and a denoising loop must know it before the step begins.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afa.aggregators import Condition, Fused, Separate
from afa.denoisers import run_lockstep
from afa.denoisers.prompt import mean_of, mean_text
from afa.ensemble.hook import Inputs
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.denoisers import Execution, Feature
    from afa.ensemble.hook import Arguments, Features, Hook
    from afa.ensemble.protocol import Ensemble
    from afa.ensemble.running import Running


def run_step(
    ensemble: Ensemble, arguments: dict[str, Any], running: Running, hooks: Sequence[Hook] = ()
) -> Tensor:
    """Run one step of an ensemble and return the fused prediction (AFA, section 3.2).

    Args:
        ensemble: the experts, their sites and fusion rules.
        arguments: the arguments of the denoiser's call, by name; the latent [B, ...] is the first.
        running: which experts run, and at which sites.
        hooks: the hooks of this step, in the order of `afa.ensemble.hooks`.

    Returns: the prediction [B, ...], on the device of the latent.

    Raises:
        AfaError: see `EnsembleDenoiser.forward`.
    """
    return _Step(ensemble, arguments, running, hooks).run()


class _Step:
    """The state of one step; see `run_step`. Experts are named by their number in the ensemble."""

    def __init__(
        self,
        ensemble: Ensemble,
        arguments: dict[str, Any],
        running: Running,
        hooks: Sequence[Hook],
    ) -> None:
        self._ensemble, self._arguments = ensemble, arguments
        self._running, self._hooks = running, hooks
        self._sample: Tensor = next(iter(arguments.values()))
        self._timesteps = timesteps_of(arguments)
        self._skipped = frozenset().union(*(hook.skipped for hook in hooks))
        self._text: Tensor | None = None
        self._condition: Condition | None = None
        #: the experts that this process computes
        self._own: tuple[int, ...] = ()

    def run(self) -> Tensor:
        given = self._given()
        self._own = tuple(given)
        coroutines = [
            self._ensemble.family.blocks(
                self._ensemble.experts[n], **own, execution=self._execution(n)
            )
            for n, own in given.items()
        ]
        prediction = run_lockstep(coroutines, self._at_site).to(self._sample.device)
        for hook in self._hooks:
            hook.end(prediction)
        return prediction

    def _given(self) -> Arguments:
        """The arguments of each expert that this process computes."""
        ensemble, experts = self._ensemble, self._running.experts
        per_expert = ensemble.family.split(
            ensemble.experts[0], self._arguments, ensemble.widths, len(ensemble.experts)
        )
        given = {n: per_expert[n] for n in experts}
        inputs = Inputs(self._sample, self._timesteps, given, self._running)
        excluded = {n for hook in self._hooks for n in hook.begin(inputs)}
        if ensemble.widths.text:
            averaged = [n for n in experts if n not in excluded]
            self._text = mean_text(ensemble, self._arguments, per_expert, averaged)
        for hook in reversed(self._hooks):
            given = hook.arguments(given)
        return given

    def _execution(self, expert: int) -> Execution:
        """The execution of an expert's layers, which skips the segments of skipped sites."""
        skipped = self._skipped | self._running.left_out(expert)
        return replace(self._ensemble.execution, skipped=skipped)

    def _at_site(self, yielded: Sequence[Feature]) -> list[Tensor]:
        """Fuse the yielded features; return the feature with which each coroutine continues."""
        site = yielded[0].site
        features: Features = dict(zip(self._own, yielded, strict=True))
        for hook in self._hooks:
            features = hook.features(site, features)
        excluded = {n for hook in self._hooks for n in hook.look(site, features)}
        if self._condition is None:
            self._condition = self._conditioned(features, excluded)
        chosen = [n for n in self._running.at(site) if n not in excluded]
        fused = self._fused(site, features, chosen, self._condition)
        for hook in self._hooks:
            hook.fused(site, fused)
        sent = self._by_expert(fused)
        for hook in reversed(self._hooks):
            sent = hook.send(sent)
        return [sent[n] for n in self._own]

    def _mask(self) -> Tensor | None:
        """The mask of the text's tokens, [B, L]; some models have one of text and image tokens."""
        mask = self._arguments.get(self._ensemble.family.text_mask or "")
        return mask if mask is None or self._text is None else mask[..., : self._text.shape[1]]

    def _conditioned(self, features: Features, excluded: set[int]) -> Condition:
        """The inputs that the fusion rules of all sites share, besides the features."""
        return Condition(
            timestep=self._timesteps,
            temb=mean_of([feature.temb for n, feature in features.items() if n not in excluded]),
            text=self._text,
            sample=self._sample,
            text_mask=self._mask(),
            num_experts=len(self._ensemble.experts),
            prompt_first=self._ensemble.family.prompt_first,
        )

    def _fused(
        self, site: str, features: Features, chosen: Sequence[int], condition: Condition
    ) -> Fused:
        """Fuse the features of the chosen experts at a site."""
        for hook in self._hooks:
            condition = hook.condition(site, condition)
        hidden = {n: features[n].hidden for n in chosen}
        _check_same_size(site, hidden)
        for hook in self._hooks:
            if (fused := hook.fuse(site, hidden)) is not None:
                return fused
        ensemble, rule = self._ensemble, self._ensemble.rule_at(site)
        call: Any = ensemble.lowered.of(rule, hidden[chosen[0]].dtype)
        if isinstance(rule, Separate) or len(chosen) == condition.num_experts:
            every = [features[n].hidden for n in self._running.experts]
            return ensemble.execution.segment(site, call, every, condition)
        return call.fuse_some(hidden, condition)

    def _by_expert(self, fused: Fused) -> dict[int, Tensor]:
        """The feature with which each running expert continues: the fused one, or its own."""
        experts = self._running.experts
        if isinstance(fused.feature, Tensor):
            return dict.fromkeys(experts, fused.feature)
        return dict(zip(experts, fused.feature, strict=True))


def _check_same_size(site: str, hidden: dict[int, Tensor | None]) -> None:
    """Check that the features of a site have one shape.

    Raises:
        AfaError: if not, for instance if only one expert's blocks were patched to another size.
    """
    shapes = {n: tuple(each.shape) for n, each in hidden.items() if each is not None}
    for n, shape in shapes.items():
        first = next(iter(shapes))
        if shape != shapes[first]:
            raise AfaError(
                "AFA-ENSEMBLE-064",
                f"At '{site}', expert {n} has a feature of the shape {shape} and expert {first} "
                f"one of {shapes[first]}; they must be equal. Apply what changes their size to all "
                "experts.",
            )


def timesteps_of(arguments: dict[str, Any]) -> Tensor:
    """The timesteps [B] of a denoiser's call."""
    sample = next(iter(arguments.values()))
    return torch.as_tensor(arguments["timestep"], device=sample.device).expand(len(sample))
