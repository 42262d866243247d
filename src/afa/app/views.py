"""What the page shows: of a picture who did what, in colours and in numbers; and short texts.

Whatever a user has written is escaped before it becomes a part of the page.
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

    from afa.drawing.pictures import PictureRecipe
    from afa.ensemble.recording import WeightRecord

ALL_SITES = "all sites"
_SHOWN = 512  # pixels of a side, for a map that can be pointed at


@dataclass(frozen=True)
class Entry:
    """A picture that was drawn in this session.

    Attributes:
        recipe: all that is needed to draw it again.
        file: the PNG, with the recipe inside.
        seconds: that it took.
        record: its fusion weights, where it is the ensemble's and not too old.
    """

    recipe: PictureRecipe
    file: Path
    seconds: float
    record: WeightRecord | None


def weights_at(record: WeightRecord, step: int, site: str) -> Tensor:
    """The weights [N, 64, 64] of a step, counted from 1, or of all where it is 0; likewise a site.

    Args:
        record: of one picture.
        step: its number.
        site: its name, or `ALL_SITES`.
    """
    number = None if step == 0 else min(step, len(record.steps)) - 1
    return record.mean_map(number, 64, None if site == ALL_SITES else site)[-1]


def overlay(picture: Image.Image, weights: Tensor) -> Image.Image:
    """The picture in grey, coloured by who holds which place; enlarged, to be pointed at."""
    factor = max(1, _SHOWN // max(picture.size))
    return tint(picture.resize((picture.width * factor, picture.height * factor)), weights)


def alone(weights: Tensor) -> Image.Image:
    """One expert's weights [H, W], from dark blue (0) over grey to yellow (1)."""
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    colours = colormaps["cividis"](weights.float().clamp(0, 1).numpy(), bytes=True)
    small = Image.fromarray(np.ascontiguousarray(colours[..., :3]), "RGB")
    return small.resize((_SHOWN // 2, _SHOWN // 2), Image.Resampling.BILINEAR)


def legend(experts: Sequence[str], weights: Tensor) -> str:
    """Every expert's colour, name and share of the whole picture."""
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
    """The experts' colours as a page writes them."""
    rows = (expert_colours(count) * 255).round().int().tolist()
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in rows]


def numbers_at(
    experts: Sequence[str], weights: Tensor, place: tuple[int, int], size: tuple[int, int]
) -> str:
    """Every expert's weight at a place.

    Args:
        experts: their names.
        weights: [N, H, W].
        place: column and row of the picture that is shown.
        size: width and height of that.
    """
    height, width = weights.shape[-2:]
    column = min(width - 1, max(0, place[0] * width // max(1, size[0])))
    row = min(height - 1, max(0, place[1] * height // max(1, size[1])))
    values = weights[:, row, column].tolist()
    listed = ", ".join(
        f"{html.escape(expert)} {value:.0%}" for expert, value in zip(experts, values, strict=True)
    )
    across, down = (column + 0.5) / width, (row + 0.5) / height
    return f"<p role='status'>{across:.0%} from the left, {down:.0%} from above: {listed}</p>"


def shares_over_steps(experts: Sequence[str], record: WeightRecord, site: str) -> pd.DataFrame:
    """Every expert's mean share of the picture by step: columns step, expert, share."""
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
    """A bar over all pictures, and in words which is drawn."""
    done = number * num_steps + step
    return (
        f"<div role='status'><progress max='{count * num_steps}' value='{done}'></progress> "
        f"{html.escape(name)}: step {step} of {num_steps}, picture {number + 1} of {count}</div>"
    )


def caption(name: str, entry: Entry | None = None) -> str:
    """What stands beneath a picture: by whom it is, and how long it took."""
    if entry is None:
        return f"<p>{html.escape(name)}</p>"
    steered = ", steered" if entry.recipe.bias else ""
    return f"<p><b>{html.escape(name)}</b>{steered}, {entry.seconds:.1f} s</p>"


def short(entry: Entry) -> str:
    """A picture's name in the history, as plain text."""
    steered = ", steered" if entry.recipe.bias else ""
    return f"{entry.recipe.drawn_by}{steered}, seed {entry.recipe.seed}"


def note(text: str) -> str:
    """Something that went well."""
    return f"<div role='status'>{html.escape(text)}</div>"


def warned(text: str, warnings: Sequence[str]) -> str:
    """Something that went well, with what the user should know of it, a line each."""
    lines = "".join(f"<p>warning: {html.escape(line)}</p>" for line in warnings)
    return note(text) + (f"<div role='alert'>{lines}</div>" if lines else "")


def complaint(text: str) -> str:
    """Something that did not."""
    return f"<div role='alert' class='afa-error'>{html.escape(text)}</div>"
