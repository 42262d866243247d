"""The parts of a pipeline that a training changes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Protocol

from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError
from afa.loading.ensemble_folder import aggregator_tensors, load_aggregator_tensors
from afa.training.noise import require_noise

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from afa.ensemble.denoiser import EnsembleDenoiser
    from afa.training.engine import Engine
    from afa.training.recipe import TrainingRecipe


class Trained(Protocol):
    """The part of a pipeline that a training changes; everything else is frozen."""

    #: prefix of its tensors in checkpoints
    name: ClassVar[str]
    #: modules that are in training mode meanwhile
    modules: list[nn.Module]
    #: parameters of the optimizer, always in the same order
    parameters: list[nn.Parameter]

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors by name."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of `tensors`."""

    def identities(self) -> list[str]:
        """Return hashes of all weights from which the training started and that it uses."""

    def place(self, engine: Engine, settings: TrainingRecipe) -> None:
        """Move or shard its modules before the first step.

        Raises:
            AfaError: if the settings cannot be combined.
        """

    def working(self, engine: Engine, settings: TrainingRecipe) -> ExitStack:
        """Return a context in which steps are computed."""


class Aggregators:
    """The aggregators of an ensemble; see `Trained`.

    Args:
        pipeline: with an `EnsembleDenoiser` as its denoiser.
        device: of the aggregators.

    Raises:
        AfaError: if it has no aggregators with parameters.
    """

    name: ClassVar[str] = "aggregators"

    def __init__(self, pipeline: DiffusionPipeline, device: torch.device) -> None:
        self.ensemble: EnsembleDenoiser = denoiser_of(pipeline)
        self.ensemble.aggregators.to(device)
        self.modules: list[nn.Module] = [self.ensemble]
        self.parameters = [p for p in self.ensemble.aggregators.parameters() if p.requires_grad]
        if not self.parameters:
            raise AfaError(
                "AFA-TRAIN-048", "The ensemble has no aggregators to train. Pass a SABWConfig."
            )

    def tensors(self) -> dict[str, Tensor]:
        """See `Trained`."""
        return aggregator_tensors(self.ensemble)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Trained`."""
        load_aggregator_tensors(self.ensemble, dict(tensors))

    def identities(self) -> list[str]:
        """Return the hashes of the experts, the autoencoder and the parts of single files."""
        known = self.ensemble.provenance
        references = (*known.experts, known.vae, *known.parts)
        return [reference.identity for reference in references if reference is not None]

    def place(self, engine: Engine, settings: TrainingRecipe) -> None:
        """Shard the experts, if accelerate is configured for FSDP.

        Raises:
            AfaError: if they are to be offloaded as well, or noise on the prompt is impossible.
        """
        if engine.is_sharding and settings.offload_experts:
            raise AfaError(
                "AFA-TRAIN-049",
                "training.offload_experts cannot be used if accelerate shards the experts (FSDP). "
                "Remove it, and set fsdp_offload_params in accelerate's configuration.",
            )
        require_noise(self.ensemble, settings.prompt_noise)
        engine.shard(self.ensemble)

    def working(self, engine: Engine, settings: TrainingRecipe) -> ExitStack:
        """Checkpoint activations, and offload the experts, if the settings ask for it."""
        stack = ExitStack()
        if settings.gradient_checkpointing:
            self.ensemble.enable_gradient_checkpointing()
            stack.callback(self.ensemble.disable_gradient_checkpointing)
        if settings.offload_experts:
            self.ensemble.offload_experts(engine.device)
            stack.callback(self.ensemble.stop_offloading)
        return stack
