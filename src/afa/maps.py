"""Recorded fusion weights: who holds which place at which step."""

from __future__ import annotations

import io
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from afa.denoisers.tokens import TEXT
from afa.errors import AfaError
from afa.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from afa.ensemble import EnsembleDenoiser


@dataclass
class RecordedStep:
    """The fusion weights of one call of the denoiser: site -> [B, N, H, W], on the CPU."""

    timestep: float
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class WeightRecord:
    """The fusion weights of a whole run, one entry per call of the denoiser.

    With classifier-free guidance the batch holds the unconditional half first, then the prompts.
    """

    steps: list[RecordedStep] = field(default_factory=list)

    def mean_map(self, step: int, size: int) -> Tensor:
        """Weights of one step averaged over the picture's sites, [B, N, size, size].

        Every site counts the same; maps are enlarged to `size` pixels first. Sites of a text's own
        stream have no place in the picture.
        """
        maps = [
            F.interpolate(w.float(), size=(size, size), mode="bilinear", align_corners=False)
            for site, w in self.steps[step].weights.items()
            if not site.endswith(TEXT)
        ]
        return torch.stack(maps).mean(0)

    def mean_share(self) -> Tensor:
        """Mean weight by step, site and expert, [steps, sites, N]."""
        return torch.stack(
            [
                torch.stack([w.float().mean((0, 2, 3)) for w in step.weights.values()])
                for step in self.steps
            ]
        )


@contextmanager
def record_weights(ensemble: EnsembleDenoiser) -> Iterator[WeightRecord]:
    """Collect the fusion weights of every step and site while the block runs.

        with afa.record_weights(pipeline.unet) as record:
            pipeline("a fox")

    Nothing is kept outside of the block.
    """
    record = WeightRecord()
    first_site = ensemble.sites[0].name

    def observe(timestep: Tensor, site: str, weights: Tensor) -> None:
        if not record.steps or site == first_site or site in record.steps[-1].weights:
            record.steps.append(RecordedStep(float(timestep.flatten()[0])))
        record.steps[-1].weights[site] = weights.detach().to("cpu", copy=True)

    previous, ensemble.on_weights = ensemble.on_weights, observe
    try:
        yield record
    finally:
        ensemble.on_weights = previous


# Okabe and Ito's palette, told apart with every common kind of colour vision
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")


def expert_colours(num_experts: int) -> Tensor:
    """One colour per expert, RGB [N, 3] in 0..1, repeated after seven."""
    from matplotlib.colors import to_rgb

    return torch.tensor([to_rgb(_COLOURS[n % len(_COLOURS)]) for n in range(num_experts)])


def draw_weights(
    record: WeightRecord,
    pictures: Sequence[Image.Image],
    path: Path,
    *,
    experts: Sequence[str],
    titles: Sequence[str] | None = None,
    num_steps: int = 5,
) -> None:
    """Draw who held which place at which step, mean over all sites, one row per picture.

    Every pixel has the experts' colours mixed by their weights; the last column is the mean over
    the steps, with each expert's share of the whole picture beneath.

    Args:
        record: of the run that made `pictures`, all in one batch.
        pictures: in the order of their prompts.
        path: PNG or SVG, by its suffix.
        experts: their names, for the legend.
        titles: one per picture.
        num_steps: how many steps to show, evenly spaced.

    Raises:
        AfaError: a record without weights, or of another run.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not record.steps or len(next(iter(record.steps[0].weights.values()))) < len(pictures):
        raise AfaError("The record must hold the weights of the run that made these pictures.")
    size = 64
    colours = expert_colours(len(experts))
    places = torch.linspace(0, len(record.steps) - 1, min(num_steps, len(record.steps)))
    shown = [int(place) for place in places.round()]
    # with guidance the prompts are the second half of the batch
    maps = torch.stack(
        [record.mean_map(s, size)[-len(pictures) :] for s in range(len(record.steps))]
    )
    rows, columns = len(pictures), len(shown) + 2
    figure = Figure(figsize=(1.5 * columns, 1.9 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        axes[row, 0].set_title("picture" if titles is None else titles[row], fontsize=8)
        panels = [maps[s, row] for s in shown] + [maps[:, row].mean(0)]
        labels = [f"step {s + 1}" for s in shown] + ["all steps"]
        for column, (panel, label) in enumerate(zip(panels, labels, strict=True), start=1):
            mixed = torch.einsum("nhw,nc->hwc", panel, colours).clamp(0, 1)
            axes[row, column].imshow(mixed.numpy())
            axes[row, column].set_title(label, fontsize=8)
        shares = panels[-1].mean((1, 2)).tolist()
        axes[row, -1].set_xlabel(" / ".join(f"{share:.0%}" for share in shares), fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [
        Patch(color=tuple(c.tolist()), label=e) for c, e in zip(colours, experts, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(experts), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format=path.suffix.removeprefix("."))
    write_atomic(path, buffer.getvalue())
