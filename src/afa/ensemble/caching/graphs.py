"""Steps of a denoising loop as CUDA graphs: what a step launches is recorded once, and replayed.

A step of an ensemble is thousands of short kernels; where they are shorter than the time that
Python takes to launch them, the device waits. A graph launches them all at once. What comes out is
what the step itself gives, bit for bit: the same kernels run.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from afa.ensemble.caching.loop import Loop
    from afa.ensemble.caching.shortcut import Shortcut

    #: runs a function once without computing anything, and gives what computes it again
    Record = Callable[[Callable[[], None]], Callable[[], None]]


class Graphs:
    """Of one ensemble: records its steps, in memory that all of its graphs share.

    A copy shares nothing and has recorded nothing.
    """

    def __init__(self) -> None:
        #: the newest one, without which the memory would be given up between two loops
        self._newest: Any = None
        #: the libraries keep a workspace for every stream that they have seen
        self._stream: Any = None

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return type(self), ()

    def take(self, latent: Tensor) -> bool:
        """Whether steps of this latent can be recorded."""
        return latent.is_cuda

    def steps_of(
        self, loop: Loop, compute: Callable[..., Tensor], key: Hashable = None
    ) -> Callable[..., Tensor]:
        """What computes the steps of a loop: whole ones by its graph, others as they are.

        Args:
            loop: whose graph it is.
            compute: takes the arguments of a step, and its cache where features are kept or taken.
            key: of whatever else decides what is computed.
        """

        def run(arguments: dict[str, Any], shortcut: Shortcut | None = None) -> Tensor:
            if shortcut is not None and shortcut.takes_features:
                return compute(arguments, shortcut)
            latent = next(iter(arguments.values()))
            now = torch.as_tensor(arguments["timestep"], device=latent.device)
            loop.graph = loop.graph or StepGraph(self.record)
            with torch.cuda.device_of(latent):  # which need not be the current one
                return loop.graph(compute, {**arguments, "timestep": now}, key)

        return run

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what a function launches on the current CUDA device.

        Raises:
            AfaError: the function waits for the device, or copies from the processor's memory.
        """
        pool = None if self._newest is None else self._newest.pool()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if self._stream is None or self._stream.device != current.device:
            self._stream = torch.cuda.Stream(current.device)
        stream = self._stream
        generator = torch.cuda.default_generators[current.device.index]
        before = generator.clone_state()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            # or the generator would take itself to be recorded for ever
            generator.graphsafe_set_state(before)
            # ending a recording fails too, in whose course the cause was raised
            cause = error if error.__context__ is None else error.__context__
            if "captur" not in str(cause):
                raise
            raise AfaError(
                "AFA-ENSEMBLE-004",
                "A step must only launch work on the GPU to be recorded as a CUDA graph; this one "
                f"does more: {str(cause).splitlines()[0]} Leave CUDA graphs out.",
            ) from error
        current.wait_stream(stream)
        self._newest = graph
        return graph.replay


@dataclass(frozen=True)
class _Leaf:
    """What is remembered of one argument of a call."""

    object: Any  # weak, of a tensor
    version: int | None
    form: Any

    @classmethod
    def of(cls, value: Any) -> _Leaf:
        if not isinstance(value, Tensor):
            return cls(lambda: value, 0, value)
        version = None if value.is_inference() else value._version
        return cls(weakref.ref(value), version, (value.shape, value.dtype, value.device))

    def is_same(self, value: Any) -> bool:
        """Whether this is the very same value, not changed since."""
        if not isinstance(value, Tensor):
            return bool(value == self.form)
        unchanged = self.version is not None and not value.is_inference()
        return unchanged and self.object() is value and self.version == value._version

    def is_alike(self, value: Any) -> bool:
        """Whether this is a tensor of the same shape and type in the same place."""
        return isinstance(value, Tensor) and self.form == (value.shape, value.dtype, value.device)


class StepGraph:
    """The steps of one denoising loop: the first runs, the second is recorded, the rest replayed.

    Arguments that are the same object in the first two calls, as a prompt's embedding is, belong to
    the graph; the others are copied to where it reads them. A call whose arguments do not fit is a
    first one again. What is not an argument, such as weights, adapters or a bias, is as it was when
    the second step was recorded, until the loop ends.

    Args:
        record: see `Graphs.record`.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._spec: Any = None
        self._leaves: list[_Leaf] = []
        self._replay: Callable[[], None] | None = None
        #: where the graph reads the arguments that change, by their place among all
        self._buffers: dict[int, Tensor] = {}
        self._output = torch.empty(0)

    def __call__(
        self,
        compute: Callable[[dict[str, Any]], Tensor],
        arguments: dict[str, Any],
        key: Hashable = None,
    ) -> Tensor:
        """What `compute` gives of these arguments.

        Args:
            compute: must do the same at every call, but for the arguments.
            arguments: by name; the timestep is a tensor.
            key: of whatever else decides what is computed.

        Raises:
            AfaError: the step cannot be recorded.
        """
        leaves, spec = tree_flatten((arguments, key))
        if self._replay is None or not self._fits(leaves, spec):
            if not self._can_record(leaves, spec):
                self._spec, self._leaves = spec, [_Leaf.of(leaf) for leaf in leaves]
                self._replay, self._buffers = None, {}
                return compute(arguments)
            self._begin(compute, leaves, spec)
        for place, buffer in self._buffers.items():
            buffer.copy_(leaves[place])
        assert self._replay is not None, "it was recorded above"
        self._replay()
        return self._output.clone()

    @property
    def is_recorded(self) -> bool:
        """Whether the next step is replayed, if its arguments fit."""
        return self._replay is not None

    def _can_record(self, leaves: list[Any], spec: Any) -> bool:
        return spec == self._spec and all(
            known.is_same(leaf) or known.is_alike(leaf)
            for known, leaf in zip(self._leaves, leaves, strict=True)
        )

    def _fits(self, leaves: list[Any], spec: Any) -> bool:
        return spec == self._spec and all(
            known.is_alike(leaf) if place in self._buffers else known.is_same(leaf)
            for place, (known, leaf) in enumerate(zip(self._leaves, leaves, strict=True))
        )

    def _begin(
        self, compute: Callable[[dict[str, Any]], Tensor], leaves: list[Any], spec: Any
    ) -> None:
        changing = [n for n, leaf in enumerate(leaves) if not self._leaves[n].is_same(leaf)]
        self._buffers = {place: leaves[place].clone() for place in changing}
        given = [self._buffers.get(place, leaf) for place, leaf in enumerate(leaves)]
        arguments, _ = tree_unflatten(given, spec)

        def step() -> None:
            self._output = compute(arguments)

        self._replay = self._record(step)
