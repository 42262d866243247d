"""Steps of a denoising loop as CUDA graphs: one step is recorded, and later steps replay it.

A step of an ensemble launches thousands of short kernels. If they take less time than Python needs
to launch them, the GPU waits. A graph launches all kernels at once. The result is the same bit for
bit, because the same kernels run.
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

    #: records what a function launches, without computing it; returns a function that replays it
    Record = Callable[[Callable[[], None]], Callable[[], None]]


class Graphs:
    """Records the steps of one ensemble; all of its graphs share one memory pool.

    A copy is empty.
    """

    def __init__(self) -> None:
        #: the newest graph; it keeps the memory pool alive between two loops
        self._newest: Any = None
        #: reused, because CUDA's libraries keep a workspace for every stream
        self._stream: Any = None

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return type(self), ()

    def can_record(self, latent: Tensor) -> bool:
        """Whether steps with this latent can be recorded."""
        return latent.is_cuda

    def steps_of(
        self, loop: Loop, compute: Callable[..., Tensor], key: Hashable = None
    ) -> Callable[..., Tensor]:
        """Make a function that computes the steps of a loop, with its graph where possible.

        Args:
            loop: the loop; it holds the graph.
            compute: computes a step without a graph, from its arguments and optionally its cache.
                Steps that keep or reuse features always use it.
            key: everything else that determines the computation.
        """

        def run(arguments: dict[str, Any], shortcut: Shortcut | None = None) -> Tensor:
            if shortcut is not None and shortcut.handles_features:
                return compute(arguments, shortcut)
            latent = next(iter(arguments.values()))
            now = torch.as_tensor(arguments["timestep"], device=latent.device)
            loop.graph = loop.graph or StepGraph(self.record)
            with torch.cuda.device_of(latent):  # it may differ from the current device
                return loop.graph(compute, {**arguments, "timestep": now}, key)

        return run

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what a function launches on the current CUDA device.

        Returns: a function that replays it.

        Raises:
            AfaError: if the function waits for the GPU, or copies from CPU memory.
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
            # otherwise the generator would stay in recording state
            generator.graphsafe_set_state(before)
            # `capture_end` fails as well; its context is the error that stopped the recording
            cause = error if error.__context__ is None else error.__context__
            if "captur" not in str(cause):
                raise
            raise AfaError(
                "AFA-ENSEMBLE-004",
                f"A step could not be recorded as a CUDA graph: {str(cause).splitlines()[0]} A "
                "recorded step must only launch work on the GPU. Switch CUDA graphs off.",
            ) from error
        current.wait_stream(stream)
        self._newest = graph
        return graph.replay


@dataclass(frozen=True)
class _Leaf:
    """One argument of an earlier call, to compare later ones with."""

    object: Any  # a weak reference, if it is a tensor
    version: int | None
    form: Any

    @classmethod
    def of(cls, value: Any) -> _Leaf:
        if not isinstance(value, Tensor):
            return cls(lambda: value, 0, value)
        version = None if value.is_inference() else value._version
        return cls(weakref.ref(value), version, (value.shape, value.dtype, value.device))

    def is_same(self, value: Any) -> bool:
        """Whether this is the same object and has not changed since."""
        if not isinstance(value, Tensor):
            return bool(value == self.form)
        unchanged = self.version is not None and not value.is_inference()
        return unchanged and self.object() is value and self.version == value._version

    def is_alike(self, value: Any) -> bool:
        """Whether this is a tensor of the same shape, data type and device."""
        return isinstance(value, Tensor) and self.form == (value.shape, value.dtype, value.device)


class StepGraph:
    """The steps of one denoising loop: run the first, record the second, replay the rest.

    Arguments that are the same object in the first two calls, such as a prompt embedding, are
    constants of the graph. The others are copied to the buffers that the graph reads. A call whose
    arguments do not fit starts over as a first call. Everything else, such as weights, adapters or
    a bias, stays as it was when the second step was recorded, until the loop ends.

    Args:
        record: see `Graphs.record`.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._spec: Any = None
        self._leaves: list[_Leaf] = []
        self._replay: Callable[[], None] | None = None
        #: the buffers from which the graph reads arguments that change, by argument index
        self._buffers: dict[int, Tensor] = {}
        self._output = torch.empty(0)

    def __call__(
        self,
        compute: Callable[[dict[str, Any]], Tensor],
        arguments: dict[str, Any],
        key: Hashable = None,
    ) -> Tensor:
        """Compute a step, by the graph if it was recorded and its arguments fit.

        Args:
            compute: computes a step; it must depend on nothing but its arguments and the key.
            arguments: the arguments by name; the timestep is a tensor.
            key: everything else that determines the computation.

        Raises:
            AfaError: if the step cannot be recorded.
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
        """Whether the next step is replayed if its arguments fit."""
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
