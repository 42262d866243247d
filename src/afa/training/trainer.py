"""Training of a part of a pipeline: optimizer, moving average (EMA) and checkpoints."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from diffusers.training_utils import EMAModel
from torch.amp import GradScaler

from afa.errors import AfaError
from afa.loading.task import check_text_to_image, native_resolution
from afa.loading.trust.unchanged import require_unchanged
from afa.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
)
from afa.training.continuing import configurations, digest, digest_of_settings, require_same
from afa.training.data.sizes import parted, sizes_of
from afa.training.early_stopping import EarlyStopping, refuse_early_stopping
from afa.training.engine import Engine
from afa.training.examples import LiveExamples
from afa.training.grouping import grouped_by
from afa.training.listing import digest_of
from afa.training.loop import NotFinite, TrainStep, optimizer_steps
from afa.training.trained import Aggregators
from afa.training.transform import BucketTransform, Transform

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator, Mapping

    from diffusers import DiffusionPipeline

    from afa.training.data import CaptionedImages
    from afa.training.examples import Examples
    from afa.training.recipe import TrainingRecipe
    from afa.training.trained import Trained


def train_aggregators(
    pipeline: DiffusionPipeline,
    data: CaptionedImages,
    settings: TrainingRecipe,
    *,
    checkpoints: Checkpoints | None = None,
    transform: Transform | None = None,
) -> Iterator[TrainStep]:
    """Train the aggregators of a pipeline in place; everything else is frozen.

    The data and noise of a step depend only on the seed and the step. The inputs are checked before
    the first step.

    Args:
        pipeline: from `load_pipeline`, with an `EnsembleDenoiser` as its denoiser.
        data: pictures and captions; a broken picture is an error.
        settings: steps, batch size, learning rate and so on.
        checkpoints: to resume from and to write to; None writes none.
        transform: crops, flips and buckets; None uses random squares at the experts' resolution.

    Raises:
        AfaError: if there are no aggregators, the experts need inputs besides a prompt, early
            stopping is set, or the checkpoint is damaged, has other experts, data or settings, or
            more steps than `num_steps`; while training, if a picture cannot be read or the loss is
            not finite.
    """
    refuse_early_stopping(settings)
    engine = Engine(settings.device)
    aggregators = Aggregators(pipeline, engine.device)
    trainer = Trainer(pipeline, aggregators, settings, engine, checkpoints)
    if transform is None:
        transform = Transform(min(native_resolution(pipeline)), seed=settings.seed)
    if checkpoints is not None:
        trainer.bind(
            {
                "the data": digest_of(data),
                "the transform": digest(asdict(transform)),
                "the settings": digest_of_settings(settings),
            }
        )
    grouping, broken = None, dict[int, str]()
    if isinstance(transform, BucketTransform):
        samples, per_step = range(len(data)), engine.shares(settings).total
        sizes, broken = parted(itertools.chain.from_iterable(sizes_of(data, samples)))
        grouping = grouped_by(transform, pipeline, sizes, samples, per_step)
    examples = LiveExamples(
        pipeline,
        data,
        transform,
        seed=settings.seed,
        caption_dropout=settings.caption_dropout,
        grouping=grouping,
        broken=broken,
    )

    def steps() -> Iterator[TrainStep]:
        yield from trainer.steps(examples)
        trainer.finish()

    return steps()


class Trainer:
    """Trains a part of a pipeline in place, with optimizer, EMA and checkpoints.

    Args:
        pipeline: the complete pipeline.
        trained: the part of it that is trained.
        settings: training settings.
        engine: the processes.
        checkpoints: to resume from and to write to; None writes none.

    Raises:
        AfaError: see `train_aggregators`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        trained: Trained,
        settings: TrainingRecipe,
        engine: Engine,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        check_text_to_image(pipeline)
        self.pipeline, self.settings, self.engine = pipeline, settings, engine
        self.trained = trained
        self._parameters = trained.parameters
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._scaler = None
        if settings.expert_dtype == "float16":  # gradients that pass through experts can underflow
            self._scaler = GradScaler(engine.device.type)
        self._ema = None
        if settings.ema_decay is not None:
            self._ema = EMAModel(self._parameters, decay=settings.ema_decay)
        #: decides when the training ends; None if only `num_steps` does
        self.early = None
        if settings.early_stopping is not None:
            self.early = EarlyStopping(settings.early_stopping)
        self._checkpoints = checkpoints
        #: hashes of all inputs of a step except weights, by name
        self._made_from = {} if checkpoints is None else configurations(pipeline)
        #: the same hashes in the checkpoint from which the run resumes
        self.began: dict[str, str] = {}
        #: number of steps that are done
        self.first = 0
        found = None if checkpoints is None else checkpoints.read()
        if found is not None:
            self._restore(found)
        if self.first > settings.num_steps:
            raise AfaError(
                "AFA-TRAIN-050",
                f"training.num_steps is {settings.num_steps}, but this run has done {self.first} "
                "steps already. Raise training.num_steps, or use another output folder.",
            )
        trained.place(engine, settings)

    def bind(self, made_from: Mapping[str, str], changed: Collection[str] = ()) -> None:
        """Store hashes of more inputs of a step in the checkpoints.

        Args:
            made_from: hashes by the name that errors use: data, transform, settings.
            changed: names of those that are not compared, because they were changed on purpose.

        Raises:
            AfaError: if the run began with other hashes.
        """
        if self._checkpoints is not None:
            compared = {name: value for name, value in made_from.items() if name not in changed}
            require_same(self.began, compared, self._checkpoints.folder)
            self._made_from |= made_from

    def steps(
        self, examples: Examples, should_stop: Callable[[], bool] | None = None
    ) -> Generator[TrainStep, None, None]:
        """Run the remaining steps; see `optimizer_steps`."""
        with self.trained.working(self.engine, self.settings):
            steps = optimizer_steps(
                self.pipeline,
                examples,
                self.settings,
                self._optimizer,
                engine=self.engine,
                modules=self.trained.modules,
                first=self.first,
                save=self.save,
                scaler=self._scaler,
                after_step=self._average,
                should_stop=should_stop,
            )
            try:
                yield from steps
            except NotFinite as error:
                if self._checkpoints is None:
                    raise
                raise AfaError("AFA-TRAIN-051", f"{error} {self._checkpoints.intact()}") from error

    def averaged(self) -> ExitStack:
        """A context in which the parameters hold their EMA weights, if `ema_decay` is set."""
        stack = ExitStack()
        if self._ema is not None:
            self._ema.store(self._parameters)
            self._ema.copy_to(self._parameters)
            stack.callback(self._ema.restore, self._parameters)
        return stack

    def finish(self) -> None:
        """Load the weights that the result has: the best ones, or the EMA weights, or the last."""
        if self._ema is not None:
            self._ema.copy_to(self._parameters)
        if self.early is not None and self.early.best:
            self.trained.load(self.early.best)

    def validated(self, step: int, loss: float) -> None:
        """Process a validation loss, if the training may end early.

        Args:
            step: of the validation.
            loss: its loss, the same in all processes.
        """
        if self.early is not None and self.early.see(step, loss):
            with self.averaged():  # which were validated
                tensors = self.trained.tensors()
                self.early.best = {
                    name: tensor.detach().cpu().clone() for name, tensor in tensors.items()
                }

    def _average(self) -> None:
        if self._ema is not None:
            self._ema.step(self._parameters)

    # -- checkpoints --------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Write a checkpoint after a step; only the main process does."""
        if self._checkpoints is None or not self.engine.is_main:
            return
        require_unchanged(self.pipeline)
        parts = {
            self.trained.name: self.trained.tensors(),
            "optimizer": optimizer_tensors(self._optimizer),
        }
        notes: dict[str, Any] = {
            "experts": self.trained.identities(),
            "samples_per_step": self._total,
            "made_from": self._made_from,
        }
        if self._ema is not None:
            average = self._ema.state_dict()
            shadows = average.pop("shadow_params")
            parts["average"] = {str(n): tensor for n, tensor in enumerate(shadows)}
            notes["average"] = average
        if self._scaler is not None:
            notes["scaler"] = self._scaler.state_dict()
        if self.early is not None:
            notes["early_stopping"], parts["best"] = self.early.notes(), self.early.best
        tensors = {f"{part}.{k}": t for part, found in parts.items() for k, t in found.items()}
        self._checkpoints.write(Checkpoint(step, tensors, notes))

    def _restore(self, found: Checkpoint) -> None:
        """Resume from a checkpoint.

        Raises:
            AfaError: if it has other experts, or another number of samples per step.
        """
        assert self._checkpoints is not None, "the checkpoint was read from it"
        identities = self.trained.identities()
        if found.notes["experts"] != identities:
            raise AfaError(
                "AFA-TRAIN-052",
                f"The experts or the autoencoder changed since the checkpoints in "
                f"'{self._checkpoints.folder}' were written: SHA-256 {', '.join(identities)}, "
                f"before {', '.join(found.notes['experts'])}. Restore them, or delete the "
                "checkpoints to start again.",
            )
        if found.notes["samples_per_step"] != self._total:
            raise AfaError(
                "AFA-TRAIN-053",
                f"batch_size times gradient_accumulation_steps times the number of processes is "
                f"{self._total}; to resume this run it must be {found.notes['samples_per_step']}.",
            )
        self.began = dict(found.notes.get("made_from") or {})
        require_same(self.began, self._made_from, self._checkpoints.folder)
        self.trained.load(found.part(self.trained.name))
        load_optimizer_tensors(self._optimizer, found.part("optimizer"))
        if self._ema is not None:
            shadows = found.part("average")
            in_order = [shadows[str(n)] for n in range(len(shadows))]
            self._ema.load_state_dict({**found.notes["average"], "shadow_params": in_order})
            self._ema.to(self._parameters[0].device)
        if self._scaler is not None:
            self._scaler.load_state_dict(found.notes["scaler"])
        if self.early is not None and "early_stopping" in found.notes:
            self.early.restore(found.notes["early_stopping"], found.part("best"))
        self.first = found.step

    @property
    def _total(self) -> int:
        return self.engine.shares(self.settings).total
