"""Where the experts of an ensemble are kept, and where they are computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers import Execution, Family, move_all_but
from afa.ensemble.placement.devices import Devices
from afa.ensemble.placement.exchange import Exchange
from afa.ensemble.placement.ranks import Processes
from afa.ensemble.placement.streaming import LayerStream
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from afa.ensemble.combinations import Feature


class Placement:
    """The part of `EnsembleDenoiser` that moves its experts."""

    experts: Any
    aggregators: nn.ModuleList
    family: Family
    execution: Execution
    require_compatible: Callable[[Feature], None]
    #: with other processes, of features; None where this one computes all experts
    exchange: Exchange | None = None
    #: of the experts, where they are not all on one
    devices: Devices | None = None
    #: the processes over which the experts' layers are sharded; None where this one has them whole
    shards: Processes | None = None

    def place_experts(self, devices: Sequence[torch.device | str]) -> None:
        """Put each expert on a device of its own; features meet on the first one's.

        Several devices compute at the same time; the aggregators are on the first. What one draws
        is what a single device draws, up to how the devices round.

        Args:
            devices: of every expert, in order; one may be named several times.

        Raises:
            AfaError: another number of devices than experts, experts that are spread over processes
                or placed already, or LoRAs of one base, whose memory they share.
        """
        placed = Devices(devices, len(self.experts), self.family.prompt)
        self.require_compatible("experts on several devices")
        shared = {id(p): placed.of_expert[0] for p in self.experts[0].parameters()}
        for expert, device in zip(self.experts, placed.of_expert, strict=True):
            if any(shared.setdefault(id(p), device) != device for p in expert.parameters()):
                raise AfaError(
                    "AFA-ENSEMBLE-044",
                    "Experts that share weights, such as LoRAs of one base, must be on one device.",
                )
        self.stop_offloading()
        for expert, device in zip(self.experts, placed.of_expert, strict=True):
            expert.to(device)
        self.aggregators.to(placed.main)
        self.devices = placed

    def _require_same_device(self, device: torch.device | None) -> None:
        """Raise AfaError where experts that are offloaded or spread are asked to be elsewhere."""
        there, how, remedy = self.execution.device, "offloaded", "Call stop_offloading() first"
        if self.exchange is not None:
            there = next(self.experts[self.exchange.own[0]].parameters()).device
            how, remedy = "spread over processes", "Load them anew there"
        if device is None or there is None:
            return
        if (device.type, device.index or 0) != (there.type, there.index or 0):
            raise AfaError(
                "AFA-ENSEMBLE-045",
                f"Experts that are {how} and run on {there} cannot be moved to {device}. {remedy}.",
            )

    def require_layers(self, done: str) -> None:
        """Refuse to do what needs the experts' layers in memory.

        Raises:
            AfaError: they are in a file.
        """
        if isinstance(self.execution.source, LayerStream):
            raise AfaError(
                "AFA-ENSEMBLE-046",
                f"Experts must be in memory to be {done}; their layers are in a file, and run on "
                f"{self.execution.device}. Call stop_offloading() first.",
            )

    def offload_experts(self, device: torch.device | str) -> None:
        """Keep the experts' blocks on the CPU and bring one layer at a time to a device.

        Everything else goes there as a whole. For training, `enable_gradient_checkpointing` besides
        or the layers that a backward pass needs stay there until it.

        Args:
            device: where everything is computed.

        Raises:
            AfaError: the experts are spread over processes, or placed on several devices.
        """
        self.require_compatible("offloaded experts")
        self.stop_offloading()
        self.experts.to("cpu")
        for expert in self.experts:
            move_all_but(expert, self.family.layers(expert), device)
        self.aggregators.to(device)
        self.execution = replace(self.execution, device=torch.device(device))

    def stream_experts(
        self, device: torch.device | str = "cpu", *, ahead: int = 2, folder: Path | None = None
    ) -> None:
        """Keep the experts' layers in a file, and read one after another to run.

        For experts that do not fit in memory together; for drawing, not for training.

        Args:
            device: where everything is computed.
            ahead: how many layers are read while one runs.
            folder: on whose disk the file is; None takes the system's for temporary files.

        Raises:
            AfaError: there is no room on the disk, or the experts are spread over processes.
        """
        self.use_stream(LayerStream(device, ahead=ahead, folder=folder), device)

    def use_stream(self, stream: LayerStream, device: torch.device | str) -> None:
        """Take the experts' layers from a stream, and add those that it does not have yet.

        Raises:
            AfaError: see `stream_experts`.
        """
        self.require_compatible("streamed experts")
        if self.execution.source is not stream:
            self.stop_offloading()
        for expert in self.experts:
            layers = self.family.layers(expert)
            stream.add(layers)
            move_all_but(expert, layers, device)
        self.aggregators.to(device)
        self.execution = replace(self.execution, device=torch.device(device), source=stream)

    def stop_offloading(self) -> None:
        """Undo `offload_experts` or `stream_experts`.

        The experts are then on the CPU, the aggregators where they were. Experts that are where
        they were loaded stay there.
        """
        if self.execution.device is None:
            return
        source = self.execution.source
        if isinstance(source, LayerStream):
            source.close()
        self.execution = replace(self.execution, device=None, source=None)
        self.experts.to("cpu")

    def spread_experts(self, group: ProcessGroup | None = None) -> None:
        """Let every process compute experts of its own, and exchange their features at the sites.

        Expert n is left to process n modulo their number; the others' layers are given up in each.
        All processes draw the same pictures, in the time of the slowest expert and of sending every
        feature once. For drawing, not for training.

        Args:
            group: of processes; None takes all of `torch.distributed`.

        Raises:
            AfaError: there are no processes, more of them than experts, an expert is named twice,
                or a plan or a schedule leaves some out.
        """
        exchange = Exchange(len(self.experts), group)
        self.require_compatible("experts spread over processes")
        if len(set(self.experts)) < len(self.experts):
            raise AfaError(
                "AFA-ENSEMBLE-047",
                "Experts that are spread over processes must be named once each.",
            )
        self.stop_offloading()
        for n, expert in enumerate(self.experts):
            if n not in exchange.own:
                expert.to("meta")
        self.exchange = exchange

    def shard_experts(self, mesh: DeviceMesh, **settings: Any) -> None:
        """Leave a part of every layer in each process; whoever runs a layer gathers it for that.

        Fully sharded data parallelism (Zhao et al., 2023, arXiv 2304.11277) for what is frozen. The
        aggregators stay whole. From then on the processes have to call the ensemble equally often,
        from one thread each. They may draw different pictures: whether a step is computed in full
        is decided by all of them together.

        Args:
            mesh: one-dimensional, over the processes.
            settings: more of `torch.distributed.fsdp.fully_shard`.

        Raises:
            AfaError: a plan or a schedule picks the experts, steps are CUDA graphs, or the experts
                are offloaded, streamed, placed on several devices, or divided already.
        """
        from torch.distributed.fsdp import fully_shard

        self.require_compatible("sharded experts")
        device = torch.device(mesh.device_type)
        for expert in self.experts:
            layers = self.family.layers(expert)
            for layer in layers:
                fully_shard(layer, mesh=mesh, **settings)
            move_all_but(expert, layers, device)
        self.aggregators.to(device)
        self.shards = Processes(mesh.get_group(), "sharded")
