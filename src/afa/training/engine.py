"""One process or several, by accelerate: who does what, and how results come together."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object

from afa.errors import AfaError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from afa.training.order import Shares
    from afa.training.recipe import TrainingRecipe

# a process that waits for others which still encode has to be patient
_TIMEOUT = timedelta(hours=24)
_SINGLE = (DistributedType.NO,)
_REPLICATED = (
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
)


class Engine:
    """The processes of a training, started by `accelerate launch` or `torchrun`, or just one.

    Aggregators are replicated and their gradients averaged (distributed data parallel). Precision
    is the training's own affair: experts are cast, aggregators stay in float32, and whatever mixed
    precision accelerate is configured for is left off.

    Args:
        device: `auto`, or as torch names it; with several processes each has its own.

    Raises:
        AfaError: no such device, or accelerate is configured for something else.
    """

    def __init__(self, device: str = "auto") -> None:
        is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        chosen = pick_device(device) if is_alone else None
        on_cpu = chosen.type == "cpu" if chosen else not torch.accelerator.is_available()
        self._accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=_TIMEOUT),
            ],
        )
        kind = self._accelerator.distributed_type
        if kind not in (*_SINGLE, *_REPLICATED):
            raise AfaError(
                f"accelerate must be configured for one process or for plain data parallelism "
                f"(DDP), came {kind.value}. The aggregators are small; where the experts are too "
                "large for a device, set training.offload_experts."
            )
        self.device: torch.device = chosen or self._accelerator.device

    @property
    def num_processes(self) -> int:
        """How many there are."""
        return self._accelerator.num_processes

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        return self._accelerator.process_index

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def shares(self, settings: TrainingRecipe) -> Shares:
        """How the places of a step are shared out."""
        from afa.training.order import Shares

        return Shares(
            settings.batch_size,
            settings.gradient_accumulation_steps,
            self.num_processes,
            self.rank,
        )

    def prepare(self, model: nn.Module, frozen: list[str]) -> nn.Module:
        """The model as it is to be called while training.

        Args:
            model: with parameters that are the same in all processes.
            frozen: names of parameters and buffers that need not be kept in step.
        """
        if self.num_processes == 1:
            return model
        # read by DistributedDataParallel: the experts are the same files in all processes
        model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]
        return self._accelerator.prepare_model(model, device_placement=False)

    def without_sync(self, model: nn.Module, *, when: bool) -> AbstractContextManager[Any]:
        """Gradients are only added up, not averaged over the processes yet."""
        return self._accelerator.no_sync(model) if when else nullcontext()

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""
        return self._accelerator.reduce(tensor, reduction="mean")

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self._accelerator.reduce(tensor, reduction="sum")

    def gather(self, objects: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        return objects if self.num_processes == 1 else gather_object(objects)

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            AfaError: one of them has ended; it has said why.
        """
        try:
            self._accelerator.wait_for_everyone()
        except RuntimeError as error:
            raise AfaError("All processes must go on, but another one stopped.") from error


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one; any other name is taken as it is.

    Raises:
        AfaError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise AfaError(
            f"The device must be auto, cpu, or one that this machine has, such as cuda or cuda:1; "
            f"'{name}' cannot be used: {str(error).splitlines()[0]}"
        ) from error
