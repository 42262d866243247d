"""Render fusion weights as pictures and text, and short texts of the page.

All text of users is escaped before it becomes part of the page.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.drawing.plots import expert_colours, tint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from PIL import Image
    from torch import Tensor

    from afa.drawing.recorded import PictureRecipe
    from afa.ensemble.recording import WeightRecord

ALL_SITES = "all sites"
#: maximum number of pictures per session that keep their fusion weights, which are large
_MAX_RECORDS = 8
_SHOWN = 512  # minimum side of the clickable map in pixels


@dataclass(frozen=True)
class Entry:
    """A picture of the session.

    Attributes:
        recipe: its recipe.
        file: its PNG, which contains the recipe.
        seconds: drawing time.
        record: its fusion weights; None for other contenders and for old pictures.
    """

    recipe: PictureRecipe
    file: Path
    seconds: float
    record: WeightRecord | None


def record_of(history: Sequence[Entry], shown: int | None) -> WeightRecord | None:
    """The fusion weights of a picture of the history; None if it has none."""
    return None if shown is None or shown >= len(history) else history[shown].record


def without_old_records(history: Sequence[Entry]) -> list[Entry]:
    """Copy the history without the fusion weights of old pictures."""
    with_record = [n for n, entry in enumerate(history) if entry.record is not None]
    old = set(with_record[:-_MAX_RECORDS])
    return [
        Entry(entry.recipe, entry.file, entry.seconds, None) if n in old else entry
        for n, entry in enumerate(history)
    ]


def weights_at(record: WeightRecord, step: int, site: str) -> Tensor:
    """The fusion weights [N, 64, 64] at a step and site.

    Args:
        record: the record of one picture.
        step: number of the step from 1; 0 averages over all steps.
        site: name of the site; `ALL_SITES` averages over all sites.
    """
    number = None if step == 0 else min(step, len(record.steps)) - 1
    return record.mean_map(number, 64, None if site == ALL_SITES else site)[-1]


def overlay(picture: Image.Image, weights: Tensor) -> Image.Image:
    """Tint an enlarged greyscale picture with the experts' colours."""
    factor = max(1, _SHOWN // max(picture.size))
    return tint(picture.resize((picture.width * factor, picture.height * factor)), weights)


def weight_map(weights: Tensor) -> Image.Image:
    """Draw the weights [H, W] of one expert, from dark blue (0) over grey to yellow (1)."""
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    colours = colormaps["cividis"](weights.float().clamp(0, 1).numpy(), bytes=True)
    small = Image.fromarray(np.ascontiguousarray(colours[..., :3]), "RGB")
    return small.resize((_SHOWN // 2, _SHOWN // 2), Image.Resampling.BILINEAR)


def legend(experts: Sequence[str], weights: Tensor) -> str:
    """The colour, name and mean weight of each expert, as HTML."""
    shares = weights.float().mean((1, 2)).tolist()
    return (
        "<ul class='afa-legend'>"
        + "".join(
            f"<li><span style='background:{colour}'></span>{html.escape(expert)} {share:.0%}</li>"
            for expert, colour, share in zip(
                experts, hex_colours(len(experts)), shares, strict=True
            )
        )
        + "</ul>"
    )


def hex_colours(count: int) -> list[str]:
    """The experts' colours as hex codes."""
    rows = (expert_colours(count) * 255).round().int().tolist()
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in rows]


def numbers_at(
    experts: Sequence[str], weights: Tensor, pixel: tuple[int, int], size: tuple[int, int]
) -> str:
    """The weight of each expert at a pixel, as HTML.

    Args:
        experts: names of the experts.
        weights: fusion weights [N, H, W].
        pixel: column and row in the displayed picture.
        size: width and height of the displayed picture.
    """
    height, width = weights.shape[-2:]
    column = min(width - 1, max(0, pixel[0] * width // max(1, size[0])))
    row = min(height - 1, max(0, pixel[1] * height // max(1, size[1])))
    values = weights[:, row, column].tolist()
    listed = ", ".join(
        f"{html.escape(expert)} {value:.0%}" for expert, value in zip(experts, values, strict=True)
    )
    across, down = (column + 0.5) / width, (row + 0.5) / height
    return f"<p role='status'>{across:.0%} from the left, {down:.0%} from the top: {listed}</p>"


def shares_over_steps(experts: Sequence[str], record: WeightRecord, site: str) -> pd.DataFrame:
    """The mean weight of each expert by step: columns step, expert, share."""
    import pandas as pd

    names = record.places if site == ALL_SITES else [site]
    rows = []
    for number, step in enumerate(record.steps, start=1):
        means = [step.weights[name][-1].float().mean((1, 2)) for name in names]
        shares = (sum(means[1:], start=means[0]) / len(means)).tolist()
        rows += [
            {"step": number, "expert": expert, "share": share}
            for expert, share in zip(experts, shares, strict=True)
        ]
    return pd.DataFrame(rows)


# -- short texts ------------------------------------------------------------------------------


def progress(name: str, number: int, count: int, step: int, num_steps: int) -> str:
    """A progress bar of all pictures, and the current picture and step."""
    done = number * num_steps + step
    return (
        f"<div role='status'><progress max='{count * num_steps}' value='{done}'></progress> "
        f"{html.escape(name)}: step {step} of {num_steps}, picture {number + 1} of {count}</div>"
    )


def caption(name: str, entry: Entry | None = None) -> str:
    """The caption of a picture: contender and drawing time."""
    if entry is None:
        return f"<p>{html.escape(name)}</p>"
    return f"<p><b>{html.escape(name)}</b>{_how(entry)}, {entry.seconds:.1f} s</p>"


def short(entry: Entry) -> str:
    """The label of a picture in the history, as plain text."""
    return f"{entry.recipe.drawn_by}{_how(entry)}, seed {entry.recipe.seed}"


def _how(entry: Entry) -> str:
    steered = ", steered" if entry.recipe.bias else ""
    return f"{steered}, by drafts" if entry.recipe.drafts is not None else steered


def note(text: str) -> str:
    """A status message."""
    return f"<div role='status'>{html.escape(text)}</div>"


def warned(text: str, warnings: Sequence[str]) -> str:
    """A status message with warnings, one per line."""
    lines = "".join(f"<p>warning: {html.escape(line)}</p>" for line in warnings)
    return note(text) + (f"<div role='alert'>{lines}</div>" if lines else "")


def complaint(text: str) -> str:
    """An error message."""
    return f"<div role='alert' class='afa-error'>{html.escape(text)}</div>"
