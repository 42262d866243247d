"""Placement: where the experts' weights are stored, and where the experts are computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers import Execution, Family, move_all_but
from afa.denoisers.packed import packed_layers
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
    """The methods of `EnsembleDenoiser` that place its experts on devices, disk and processes."""

    experts: Any
    aggregators: nn.ModuleList
    family: Family
    execution: Execution
    require_compatible: Callable[[Feature], None]
    #: the exchange of features with other processes; None if this process computes all experts
    exchange: Exchange | None = None
    #: the devices of the experts; None if all experts are on one device
    devices: Devices | None = None
    #: the processes over which the experts' layers are sharded; None if they are not sharded
    shards: Processes | None = None

    def place_experts(self, devices: Sequence[torch.device | str]) -> None:
        """Place each expert on its own device; features are fused on the first expert's device.

        The devices compute at the same time. The aggregators are on the first expert's device.
        Pictures equal those of a single device, up to rounding differences between devices.

        Args:
            devices: one per expert, in order; several experts may be on the same device.

        Raises:
            AfaError: if the number of devices is not the number of experts, the experts were placed
                before, or experts on different devices share weights, as LoRAs of one base do.
        """
        placed = Devices(devices, len(self.experts), self.family.prompt)
        self.require_compatible("experts on several devices")
        shared = {id(p): placed.of_expert[0] for p in self.experts[0].parameters()}
        for expert, device in zip(self.experts, placed.of_expert, strict=True):
            if any(shared.setdefault(id(p), device) != device for p in expert.parameters()):
                raise AfaError(
                    "AFA-ENSEMBLE-044",
                    "Experts that share weights, such as LoRAs of one base, were placed on "
                    "different devices. Place them on the same device.",
                )
        self.stop_offloading()
        for expert, device in zip(self.experts, placed.of_expert, strict=True):
            expert.to(device)
        self.aggregators.to(placed.main)
        self.devices = placed

    def _require_same_device(self, device: torch.device | None) -> None:
        """Refuse to move offloaded or spread experts to a device on which they do not run."""
        current, how, remedy = self.execution.device, "offloaded", "Call stop_offloading() first"
        if self.exchange is not None:
            current = next(self.experts[self.exchange.own[0]].parameters()).device
            how, remedy = "spread over processes", "Load the ensemble again on that device"
        if device is None or current is None:
            return
        if (device.type, device.index or 0) != (current.type, current.index or 0):
            raise AfaError(
                "AFA-ENSEMBLE-045",
                f"The experts are {how} and run on {current}, so they cannot be moved to {device}. "
                f"{remedy}.",
            )

    def require_layers(self, done: str) -> None:
        """Refuse an operation that needs the experts' layers in memory.

        Raises:
            AfaError: if the layers are streamed from a file.
        """
        if isinstance(self.execution.source, LayerStream):
            raise AfaError(
                "AFA-ENSEMBLE-046",
                f"The experts are streamed from a file and run on {self.execution.device}; they "
                f"must be in memory to be {done}. Call stop_offloading() first.",
            )

    def offload_experts(self, device: torch.device | str) -> None:
        """Keep the experts' layers on the CPU, and copy one layer at a time to a device to run it.

        All other parameters move to the device. For training, also call
        `enable_gradient_checkpointing`; otherwise the copied layers stay on the device until the
        backward pass.

        Args:
            device: the device on which everything is computed.

        Raises:
            AfaError: if the experts are spread or sharded over processes, or on several devices.
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
        """Keep the experts' layers in a temporary file, and read each layer when it runs.

        Use it to draw with experts that do not fit into memory together. Training is not possible.

        Args:
            device: the device on which everything is computed.
            ahead: how many layers are read ahead while one runs.
            folder: the folder of the file; None uses the system's folder for temporary files.

        Raises:
            AfaError: if the disk is too small, or the experts are spread or sharded over processes
                or on several devices.
        """
        self.use_stream(LayerStream(device, ahead=ahead, folder=folder), device)

    def use_stream(self, stream: LayerStream, device: torch.device | str) -> None:
        """Read the experts' layers from a stream; first add the layers that it lacks.

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

        It moves the experts to the CPU; the aggregators stay on their device. Without offloading or
        streaming it does nothing.
        """
        if self.execution.device is None:
            return
        source = self.execution.source
        if isinstance(source, LayerStream):
            source.close()
        self.execution = replace(self.execution, device=None, source=None)
        self.experts.to("cpu")

    def spread_experts(self, group: ProcessGroup | None = None) -> None:
        """Distribute the experts over processes, which exchange their features at every site.

        Process n modulo the number of processes computes expert n; the other processes free its
        layers. All processes draw the same pictures. A step takes as long as the slowest process
        and the exchange of all features. Training is not possible.

        Args:
            group: the process group; None uses all processes of `torch.distributed`.

        Raises:
            AfaError: if there are no processes or more processes than experts, if two experts are
                the same object, or if a feature excludes it, such as a plan or a schedule.
        """
        exchange = Exchange(len(self.experts), group)
        self.require_compatible("experts spread over processes")
        if len(set(self.experts)) < len(self.experts):
            raise AfaError(
                "AFA-ENSEMBLE-047",
                "Experts that are spread over processes must be distinct; the ensemble has a "
                "duplicate expert. List every expert once.",
            )
        self.stop_offloading()
        for n, expert in enumerate(self.experts):
            if n not in exchange.own:
                expert.to("meta")
        self.exchange = exchange

    def shard_experts(self, mesh: DeviceMesh, **settings: Any) -> None:
        """Shard every layer of the experts over processes; a layer is gathered while it runs.

        This is fully sharded data parallelism (FSDP; Zhao et al., 2023, arXiv 2304.11277) of the
        frozen experts. The aggregators are not sharded. All processes must call the ensemble
        equally often, each from one thread. They may draw different pictures; all of them decide
        together whether the cache skips a step.

        Args:
            mesh: a one-dimensional device mesh of the processes.
            settings: further arguments of `torch.distributed.fsdp.fully_shard`.

        Raises:
            AfaError: if a plan, a schedule or CUDA graphs are set, or if the experts are offloaded,
                streamed, on several devices, already spread or sharded over processes, or have
                quantised weights.
        """
        from torch.distributed.fsdp import fully_shard

        self.require_compatible("sharded experts")
        if any(packed_layers(expert) for expert in self.experts):
            raise AfaError(
                "AFA-ENSEMBLE-071",
                "Sharded experts cannot have quantised weights, which are integers. Do not shard "
                "them, or use the float16 or bfloat16 version of the experts.",
            )
        device = torch.device(mesh.device_type)
        for expert in self.experts:
            layers = self.family.layers(expert)
            for layer in layers:
                fully_shard(layer, mesh=mesh, **settings)
            move_all_but(expert, layers, device)
        self.aggregators.to(device)
        self.shards = Processes(mesh.get_group(), "sharded")
