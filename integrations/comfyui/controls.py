"""ControlNets beside an ensemble: they get the texts of the first expert, not those of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class _OfFirst:
    """A ControlNet that is called with the conditions of the first expert."""

    def __init__(self, control: Any, first: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._control, self._first = control, first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, noisy: Any, timestep: Any, cond: Any, *args: Any, **kwargs: Any) -> Any:
        """The residuals; see `comfy.controlnet.ControlBase`."""
        return self._control.get_control(noisy, timestep, self._first(cond), *args, **kwargs)


def for_first_expert(
    conditions: Sequence[Sequence[dict[str, Any]] | None],
    first: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> list[list[dict[str, Any]] | None]:
    """Let the ControlNets in ComfyUI's conditions be called with the first expert's texts.

    Conditions that share a ControlNet still do, so ComfyUI computes them in one batch.
    """
    shared: dict[int, _OfFirst] = {}

    def changed(condition: dict[str, Any]) -> dict[str, Any]:
        if (control := condition.get("control")) is None:
            return condition
        return {**condition, "control": shared.setdefault(id(control), _OfFirst(control, first))}

    return [None if each is None else [changed(one) for one in each] for each in conditions]
