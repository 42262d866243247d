"""The learning curves of a run as a picture, `curves.png` beside `metrics.jsonl`."""

from __future__ import annotations

import textwrap
import time
import warnings
from typing import TYPE_CHECKING, Any

from afa.figures import COLOURS, plain, save_figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from afa.training.changing import History

CURVES = "curves.png"
#: least time in seconds between two drawings, and least multiple of the time that one takes
_EVERY, _SHARE = 30.0, 50
_MANY = 20  # lines of the loss from which its largest values may be cut off
_LABEL = 90  # characters of a change
_LOSS, _VALIDATION, _CHANGE, _RESUME = COLOURS[4], COLOURS[5], COLOURS[3], "#888888"


class Curves:
    """Draws the learning curves of a run, seldom enough to cost no time.

    Args:
        folder: the run's folder.
        entries: lines of metrics.jsonl, to which the training adds.
        starts: the steps from which the run was started.
        history: the recipes of the run.
        num_steps: total number of steps.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[dict[str, Any]],
        starts: Sequence[int],
        history: History,
        num_steps: int,
    ) -> None:
        self._folder, self._entries, self._num_steps = folder, entries, num_steps
        self._starts, self._history = starts, history
        self._next, self._num_drawn = 0.0, 0  # time of the next drawing; entries in the last one
        self._has_failed = False

    def draw(self, *, is_last: bool = False) -> list[str]:
        """Draw the curves, if there is something new and the last drawing is long ago.

        Args:
            is_last: draw even if it is not.

        Returns: a warning if they cannot be drawn, which is not worth an error.
        """
        began, count = time.monotonic(), len(self._entries)
        if count == self._num_drawn or (began < self._next and not is_last) or self._has_failed:
            return []
        if sum("loss" in entry for entry in self._entries) < 2:
            return []
        self._num_drawn = count
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._draw()
        except Exception as error:
            self._has_failed = True
            return [f"warning: The learning curves could not be drawn: {error}"]
        now = time.monotonic()
        self._next = now + max(_EVERY, _SHARE * (now - began))
        return []

    def _draw(self) -> None:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        losses, validation, rates = (
            [(entry["step"], entry[key]) for entry in self._entries if key in entry]
            for key in ("loss", "validation_loss", "learning_rate")
        )
        figure = Figure(figsize=(8, 5.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot(*_columns(losses), color=_LOSS, alpha=0.3, linewidth=0.8)
        smooth = list(zip(*_smoothed(losses), strict=True))
        above.plot(*_columns(smooth), color=_LOSS, linewidth=1.6, label="loss, smoothed")
        if validation:
            best = min(validation, key=lambda each: each[1])
            above.plot(
                *_columns(validation),
                color=_VALIDATION,
                marker="o",
                markersize=3,
                linewidth=1.2,
                label="validation loss",
            )
            label = f"lowest: {best[1]:.4g} at step {best[0]}"
            style: dict[str, Any] = {"color": _VALIDATION, "linestyle": "none", "marker": "*"}
            above.plot(*_columns([best]), markersize=12, label=label, **style)
        _cut_off(above, losses, [*smooth, *validation])
        below.plot(*_columns(rates), color=COLOURS[2], linewidth=1.2)
        below.set_ylim(bottom=0)
        below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        above.set_ylabel("loss")
        below.set_ylabel("learning rate")
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        self._mark(above, below)
        figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
        for axis in (above, below):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        done = max(entry["step"] for entry in self._entries)
        title = f"{self._folder.absolute().name}: step {done:,} of {self._num_steps:,}"
        figure.suptitle(plain(title), fontsize=10)
        save_figure(figure, self._folder / CURVES, dpi=110)

    def _mark(self, above: Axes, below: Axes) -> None:
        """Mark the steps at which the run was resumed, or its recipe changed."""
        changes = dict(self._history.changes)
        resumed = sorted({step for step in self._starts if step} - changes.keys())
        for number, step in enumerate(resumed):
            for axis in (above, below):
                label = "resumed" if axis is above and not number else None
                axis.axvline(step, color=_RESUME, linestyle=":", linewidth=0.8, label=label)
        for step, found in changes.items():
            text = ", ".join(change.text.partition(".")[2] for change in found)
            label = textwrap.shorten(f"after step {step:,}: {text}", _LABEL, placeholder=" ...")
            for axis in (above, below):
                axis.axvline(
                    step,
                    color=_CHANGE,
                    linestyle="--",
                    linewidth=1.2,
                    label=plain(label) if axis is above else None,
                )


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _smoothed(losses: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Average exponentially over a tenth of the run, without a bias towards the first value."""
    decay = 1 - 1 / max(1.0, len(losses) / 10)
    total, weight, smooth = 0.0, 0.0, []
    for _, loss in losses:
        total, weight = decay * total + loss, decay * weight + 1
        smooth.append(total / weight)
    return [step for step, _ in losses], smooth


def _cut_off(
    axis: Axes, losses: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]
) -> None:
    """Leave out the largest single losses, which would flatten all curves."""
    if len(losses) < _MANY:
        return
    values = sorted(loss for _, loss in losses)
    top = max(values[int(0.98 * (len(values) - 1))], sorted(y for _, y in others)[-_MANY // 4])
    bottom = min(values[0], *(y for _, y in others))
    margin = 0.05 * (top - bottom) or 1e-3
    axis.set_ylim(bottom - margin, top + margin)
