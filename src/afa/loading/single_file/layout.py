"""The layouts of single model files: which tensor belongs to which part of a pipeline.

A denoiser comes in the layout of the original code, behind `model.diffusion_model.`, behind
`diffusion_model.` or bare, or in the layout of diffusers. Text encoders and autoencoders come
behind prefixes that their kind of pipeline says; see `afa.denoisers.SingleFiles`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.denoisers.family import COMPONENTS
from afa.denoisers.kinds import kinds
from afa.errors import AfaError
from afa.loading.weights import Shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from afa.denoisers import PipelineKind, SingleFiles

_ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_DIFFUSERS_PREFIXES = ("", *(f"{component}." for component in COMPONENTS))
#: scalars that say what a model predicts; `afa.loading.prediction` reads them
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
#: tensors that change no picture, with the reason that `afa inspect` shows
HARMLESS = (
    (re.compile(r"model_ema\..+"), "moving average, beside the weights in use"),
    (
        re.compile(
            r"(betas|alphas_cumprod(_prev)?|(sqrt|log|posterior)_[a-z0-9_]+|logvar|lvlb_weights"
            r"|scale_factor|(denoiser|model_sampling)\.[a-z_]+)"
        ),
        "noise schedule, which the scheduler computes",
    ),
    (re.compile(r"(.+\.)?(position_ids|logit_scale|attn_mask)"), "buffer that no encoder reads"),
    (re.compile(r"(first_stage_model|vae)\.(loss|model_ema)\..+"), "training of the autoencoder"),
    (
        re.compile(r"(safety_checker|.+\.visual|vision_model|visual_projection)\..+"),
        "picture encoder",
    ),
    (
        re.compile(r"(.+\.)?(decoder\.(block|embed_tokens|final_layer_norm)\..+|lm_head\.weight)"),
        "decoder of T5",
    ),
    (re.compile(r"(.+\.)?spiece_model"), "tokenizer"),
    (re.compile(r"epoch|global_step|iteration"), "counter of the training"),
    (re.compile("|".join(map(re.escape, MARKERS))), "mark of what the model predicts"),
)


@dataclass(frozen=True)
class Denoiser:
    """How a file holds its denoiser.

    Attributes:
        kind: the kind of pipeline.
        prefix: before the names of its tensors.
        is_diffusers: whether the names are those of diffusers, not of the original code.
    """

    kind: PipelineKind
    prefix: str
    is_diffusers: bool = False


def layouts() -> dict[PipelineKind, SingleFiles]:
    """How single files look, by their kind of pipeline."""
    return {kind: kind.single_files for kind in kinds() if kind.single_files is not None}


def readable_kinds() -> str:
    """The names of the kinds of pipelines that are read from single files, for messages."""
    return ", ".join(kind.name for kind in layouts())


def layout_of(kind: PipelineKind, source: object) -> SingleFiles:
    """How single files of a kind look.

    Raises:
        AfaError: they are not read.
    """
    if kind.single_files is None:
        raise AfaError(
            "AFA-LOAD-072",
            f"Single files are read of {readable_kinds()}; '{source}' is described as a "
            f"{kind.name} model. Save it as a diffusers folder.",
        )
    return kind.single_files


def denoiser_in(shapes: Shapes) -> Denoiser | None:
    """The denoiser of a file, whatever its size; None where the file holds none."""
    original = {kind: files.original for kind, files in layouts().items()}
    for start in _ORIGINAL_PREFIXES:
        kind = _told(shapes, start, original)
        if kind is not None:
            return Denoiser(kind, start)
    diffusers = {kind: files.diffusers for kind, files in layouts().items()}
    for start in _DIFFUSERS_PREFIXES:
        kind = _told(shapes, start, diffusers)
        if kind is not None:
            return Denoiser(kind, start, is_diffusers=True)
    return None


def _told(
    shapes: Shapes, start: str, marks: Mapping[PipelineKind, tuple[str, ...]]
) -> PipelineKind | None:
    """The kind that has the most marks, of those of which a file has all of them."""

    def has(mark: str) -> bool:
        name = f"{start}{mark}"
        return any(n.startswith(name) for n in shapes) if mark.endswith(".") else name in shapes

    fitting = [kind for kind, names in marks.items() if names and all(map(has, names))]
    return max(fitting, key=lambda kind: len(marks[kind]), default=None)


def kind_name(shapes: Shapes) -> str | None:
    """The kind of pipeline whose denoiser a file holds, whatever its size; None without one."""
    found = denoiser_in(shapes)
    return None if found is None else found.kind.name


def harmless(name: str) -> str | None:
    """Why a tensor of a file is of no consequence; None where it may be of some."""
    return next((why for pattern, why in HARMLESS if pattern.fullmatch(name)), None)


def names_by_part(shapes: Shapes, kind: PipelineKind) -> dict[str, dict[str, str]]:
    """Every tensor under the part that it belongs to.

    Args:
        shapes: of all tensors of a file.
        kind: of the pipeline that the file is read as, which has single files.

    Returns: part -> name without the part's prefix -> name in the file. Tensors of no part stand
        under an empty name, with their whole names. Parts that the file lacks are left out.
    """
    found: dict[str, dict[str, str]] = {}
    denoiser = denoiser_in(shapes)
    others = {start: part for part, starts in layouts()[kind].parts.items() for start in starts}
    of_others = tuple(
        start for files in layouts().values() for starts in files.parts.values() for start in starts
    )
    for name in shapes:
        start = next((start for start in others if name.startswith(start)), None)
        if start is not None:
            part, rest = others[start], name.removeprefix(start)
        elif denoiser is not None and denoiser.kind is kind and _is_of(name, denoiser, of_others):
            part, rest = kind.denoiser, name.removeprefix(denoiser.prefix)
        else:
            part, rest = "", name
        found.setdefault(part, {})[rest] = name
    return found


def _is_of(name: str, denoiser: Denoiser, others: tuple[str, ...]) -> bool:
    """Whether a tensor is the denoiser's; of a bare one is all that is nothing else."""
    if denoiser.prefix:
        return name.startswith(denoiser.prefix)
    return harmless(name) is None and not name.startswith(others)
