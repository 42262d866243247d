"""Draw figures of fusion weights and comparisons of pictures as PNG or SVG."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from afa.errors import AfaError
from afa.figures import COLOURS, plain, save_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from PIL import Image
    from torch import Tensor

    from afa.ensemble.recording import WeightRecord

_LEAST_AREA = 0.03  # fraction of the picture from which a region gets a label


def expert_colours(num_experts: int) -> Tensor:
    """One colour per expert, RGB [N, 3] in 0..1; colours repeat after seven."""
    from matplotlib.colors import to_rgb

    return torch.tensor([to_rgb(COLOURS[n % len(COLOURS)]) for n in range(num_experts)])


def mix_colours(weights: Tensor) -> Tensor:
    """Mix the experts' colours by their weights [N, H, W] at each pixel: RGB [H, W, 3]."""
    mixed = torch.einsum("nhw,nc->hwc", weights.float(), expert_colours(len(weights)))
    return mixed.clamp(0, 1)


def tint(picture: Image.Image, weights: Tensor, strength: float = 0.7) -> Image.Image:
    """Tint a greyscale picture with the experts' colours, mixed by their weights.

    Args:
        picture: a picture of any size.
        weights: fusion weights [N, H, W], which are resized to the picture.
        strength: opacity of the colours; 0 is the greyscale picture, 1 only the colours.

    Returns:
        An RGB picture of the same size.
    """
    from PIL import Image

    size = (picture.height, picture.width)
    enlarged = F.interpolate(weights[None].float(), size, mode="bilinear", align_corners=False)[0]
    grey = torch.from_numpy(np.array(picture.convert("L"))).float()[..., None] / 255
    mixed = strength * mix_colours(enlarged) + (1 - strength) * grey
    return Image.fromarray((255 * mixed).round().to(torch.uint8).numpy(), "RGB")


def heat_map(
    shares: Tensor | Mapping[str, Tensor],
    path: Path,
    *,
    experts: Sequence[str],
    sites: Sequence[str],
    title: str = "",
) -> None:
    """Draw the mean weight of each expert by site (from input to output) and step.

    Args:
        shares: mean weights [steps, sites, N], such as `WeightRecord.mean_share()`, or one row of
            panels of them by name; NaN stays blank.
        path: a PNG or SVG file.
        experts: names of the experts.
        sites: names of the sites.
        title: title of the figure.

    Raises:
        AfaError: if the suffix is not supported, or the numbers of names and shares differ.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = {"": shares} if isinstance(shares, torch.Tensor) else shares
    for table in rows.values():
        if table.shape[1:] != (len(sites), len(experts)):
            raise AfaError(
                "AFA-DRAW-009",
                f"The shares must have the shape [steps, {len(sites)}, {len(experts)}] (sites, "
                f"experts); got {list(table.shape)}.",
            )
    height = 0.7 + len(rows) * (0.5 + 0.2 * len(sites))
    figure = Figure(figsize=(1.9 + 2.4 * len(experts), height), layout="constrained")
    panels = figure.subplots(len(rows), len(experts), sharey=True, squeeze=False)
    for line, (name, table) in zip(panels, rows.items(), strict=True):
        for n, (panel, expert) in enumerate(zip(line, experts, strict=True)):
            image = panel.imshow(
                table[:, :, n].T.float().numpy(),
                vmin=0,
                vmax=1,
                cmap="cividis",
                aspect="auto",
                extent=(0.5, len(table) + 0.5, len(sites) - 0.5, -0.5),
            )
            panel.set_title(plain(f"{expert}, {name}" if name else expert), fontsize=9)
            panel.set_xlabel("step", fontsize=8)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.tick_params(labelsize=7)
    panels[0, 0].set_yticks(range(len(sites)), [plain(site) for site in sites])
    figure.colorbar(image, ax=panels, label="mean weight")
    if title:
        figure.suptitle(plain(textwrap.shorten(title, 120, placeholder=" ...")), fontsize=9)
    save_figure(figure, path)


def overlay(
    picture: Image.Image, weights: Tensor, path: Path, *, experts: Sequence[str], title: str = ""
) -> None:
    """Draw a picture, an overlay of all experts' weights, and a map of each expert's weights.

    Args:
        picture: the picture.
        weights: its fusion weights [N, H, W] at a step and site, or a mean.
        path: a PNG or SVG file.
        experts: names of the experts.
        title: title of the figure.

    Raises:
        AfaError: if the suffix is not supported.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * (len(experts) + 2) + 0.6, 2.9), layout="constrained")
    axes = figure.subplots(1, len(experts) + 2)
    axes[0].imshow(picture)
    axes[0].set_title("picture", fontsize=9)
    axes[1].imshow(tint(picture, weights))
    axes[1].set_title("fusion weights", fontsize=9)
    _outline(axes[1], weights, picture.size, experts)
    for n, expert in enumerate(experts):
        panel = axes[n + 2]
        image = panel.imshow(weights[n].float().numpy(), vmin=0, vmax=1, cmap="cividis")
        share = float(weights[n].float().mean())
        panel.set_title(f"{plain(expert)} ({share:.0%})", fontsize=9)
    figure.colorbar(image, ax=axes[2:], label="weight", shrink=0.75)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    if title:
        figure.suptitle(plain(textwrap.shorten(title, 110, placeholder=" ...")), fontsize=9)
    save_figure(figure, path)


def _outline(axis: Axes, weights: Tensor, size: tuple[int, int], experts: Sequence[str]) -> None:
    """Draw the borders of regions in which an expert has the largest weight, and its name."""
    height, width = weights.shape[-2:]
    scale = (size[0] / width, size[1] / height)
    leader = weights.float().argmax(0)
    rows = (torch.arange(height) + 0.5) * scale[1] - 0.5
    columns = (torch.arange(width) + 0.5) * scale[0] - 0.5
    for n, expert in enumerate(experts):
        region = (leader == n).float()
        area = float(region.mean())
        if area < _LEAST_AREA:
            continue
        if area < 1:
            grid = (columns.numpy(), rows.numpy(), region.numpy())
            axis.contour(*grid, levels=[0.5], colors="white", linewidths=1)
        # put the label well inside the region, and away from the edges of the picture
        inside = F.avg_pool2d(region[None, None], 2 * (height // 8) + 1, 1, height // 8)[0, 0]
        pixel = int((inside * region).argmax())
        axis.text(
            float(columns[pixel % width].clamp(0.15 * size[0], 0.85 * size[0])),
            float(rows[pixel // width].clamp(0.08 * size[1], 0.92 * size[1])),
            plain(textwrap.shorten(expert, 16, placeholder="...")),
            ha="center",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.8, "pad": 1, "edgecolor": "none"},
        )


def filmstrip(
    record: WeightRecord,
    pictures: Sequence[Image.Image],
    path: Path,
    *,
    experts: Sequence[str],
    titles: Sequence[str] | None = None,
    num_steps: int = 5,
) -> None:
    """Draw maps of the fusion weights at several steps, one row per picture.

    Pixels show the experts' colours, mixed by their weights, averaged over all sites. The last
    column is the mean over the steps, with each expert's share of the picture below.

    Args:
        record: the record of the run that drew `pictures` in one batch.
        pictures: the pictures, in the order of their prompts.
        path: a PNG or SVG file.
        experts: names of the experts, for the legend.
        titles: one title per picture.
        num_steps: number of evenly spaced steps to show.

    Raises:
        AfaError: if the suffix is not supported, or the record does not fit the pictures.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not record.steps or len(next(iter(record.steps[0].weights.values()))) < len(pictures):
        raise AfaError(
            "AFA-DRAW-010",
            f"The record must contain the weights of the run that drew these {len(pictures)} "
            "pictures. Draw them within one afa.record_weights block.",
        )
    spaced = torch.linspace(0, len(record.steps) - 1, min(num_steps, len(record.steps)))
    shown = [int(step) for step in spaced.round()]
    # with guidance, the conditional samples are the second half of the batch
    maps = torch.stack([record.mean_map(s, 64)[-len(pictures) :] for s in range(len(record.steps))])
    rows, columns = len(pictures), len(shown) + 2
    figure = Figure(figsize=(1.5 * columns, 1.9 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        axes[row, 0].set_title("picture" if titles is None else plain(titles[row]), fontsize=8)
        panels = [maps[s, row] for s in shown] + [maps[:, row].mean(0)]
        labels = [f"step {s + 1}" for s in shown] + ["all steps"]
        for column, (panel, label) in enumerate(zip(panels, labels, strict=True), start=1):
            axes[row, column].imshow(mix_colours(panel).numpy())
            axes[row, column].set_title(label, fontsize=8)
        shares = panels[-1].mean((1, 2)).tolist()
        axes[row, -1].set_xlabel(" / ".join(f"{share:.0%}" for share in shares), fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [
        Patch(color=tuple(c.tolist()), label=plain(e))
        for c, e in zip(expert_colours(len(experts)), experts, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(experts), frameon=False)
    save_figure(figure, path)


def comparison(
    rows: Mapping[str, Sequence[Image.Image]],
    columns: Sequence[str],
    path: Path,
    *,
    bold: Sequence[str] = (),
    dpi: int = 130,
) -> None:
    """Draw pictures side by side: methods (rows) by prompts (columns).

    Args:
        rows: the pictures of each method, in the order of the prompts.
        columns: the prompts.
        path: a PNG or SVG file.
        bold: methods whose names are bold.
        dpi: dots per inch of a PNG; a picture is 1.35 inches wide.

    Raises:
        AfaError: if the suffix is not supported, there is no prompt, or a row has another length.
    """
    from matplotlib.figure import Figure

    if not columns or any(len(pictures) != len(columns) for pictures in rows.values()):
        raise AfaError(
            "AFA-DRAW-011",
            f"A comparison requires one picture per prompt in each row; got {len(columns)} prompts "
            f"and rows of {', '.join(str(len(pictures)) for pictures in rows.values())}.",
        )
    left, top = 1.7, 0.9
    width, height = 1.35 * len(columns) + left, 1.35 * len(rows) + top
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    figure.subplots_adjust(
        left=left / width, right=0.995, bottom=0.005, top=1 - top / height, wspace=0.04, hspace=0.04
    )
    for axis, prompt in zip(axes[0], columns, strict=True):
        short = textwrap.shorten(prompt, 90, placeholder=" ...")
        axis.set_title(plain(textwrap.fill(short, 19)), fontsize=8)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(
            plain(textwrap.fill(name, 20)),
            rotation=0,
            ha="right",
            va="center",
            fontsize=9,
            fontweight="bold" if name in bold else "normal",
        )
    save_figure(figure, path, dpi)
