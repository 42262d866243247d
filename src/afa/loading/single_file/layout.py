"""The layouts of single model files: which tensor belongs to which part of a pipeline.

A denoiser is in the original layout, with the prefix `model.diffusion_model.`, `diffusion_model.`
or none, or in diffusers' layout. The prefixes of text encoders and autoencoders depend on the kind
of pipeline; see `afa.denoisers.SingleFiles`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.denoisers.family import COMPONENTS
from afa.denoisers.kinds import kind_of, kinds
from afa.errors import AfaError
from afa.files import read_json
from afa.loading.single_file.canonical_names import MARKERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.denoisers import PipelineKind, SingleFiles
    from afa.loading.weights import Shapes

_ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_DIFFUSERS_PREFIXES = ("", *(f"{component}." for component in COMPONENTS))
#: tensors without effect on pictures, with the reason for `afa inspect`
HARMLESS = (
    (re.compile(r"model_ema\..+"), "moving average of the weights"),
    (
        re.compile(
            r"(betas|alphas_cumprod(_prev)?|(sqrt|log|posterior)_[a-z0-9_]+|logvar|lvlb_weights"
            r"|scale_factor|(denoiser|model_sampling)\.[a-z_]+)"
        ),
        "noise schedule, which the scheduler computes",
    ),
    (re.compile(r"(.+\.)?(position_ids|logit_scale|attn_mask)"), "unused buffer"),
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
    (re.compile("|".join(map(re.escape, MARKERS))), "marker of the prediction type"),
)


@dataclass(frozen=True)
class Denoiser:
    """The layout of the denoiser in a file.

    Attributes:
        kind: the kind of pipeline.
        prefix: of the names of its tensors.
        is_diffusers: whether the names are diffusers', not those of the original layout.
    """

    kind: PipelineKind
    prefix: str
    is_diffusers: bool = False


def described_kind(folder: Path) -> PipelineKind:
    """Return the kind of the pipeline in a folder.

    Raises:
        AfaError: if it is unknown.
    """
    return kind_of(str(read_json(folder / "model_index.json").get("_class_name")), folder)


def layouts() -> dict[PipelineKind, SingleFiles]:
    """Return the layouts of single files by the kind of pipeline."""
    return {kind: kind.single_files for kind in kinds() if kind.single_files is not None}


def readable_kinds() -> str:
    """List the kinds of pipelines that can be loaded from single files, for messages."""
    return ", ".join(kind.name for kind in layouts())


def layout_of(kind: PipelineKind, source: object) -> SingleFiles:
    """Return the layout of single files of a kind.

    Raises:
        AfaError: if they are not supported.
    """
    if kind.single_files is None:
        raise AfaError(
            "AFA-LOAD-072",
            f"'{source}' is described as a {kind.name} model; single files must be of "
            f"{readable_kinds()}. Save it as a diffusers folder.",
        )
    return kind.single_files


def denoiser_in(shapes: Shapes) -> Denoiser | None:
    """Find the denoiser of a file, of any size; None if there is none."""
    original = {kind: files.original for kind, files in layouts().items()}
    for prefix in _ORIGINAL_PREFIXES:
        kind = _matching_kind(shapes, prefix, original)
        if kind is not None:
            return Denoiser(kind, prefix)
    diffusers = {kind: files.diffusers for kind, files in layouts().items()}
    for prefix in _DIFFUSERS_PREFIXES:
        kind = _matching_kind(shapes, prefix, diffusers)
        if kind is not None:
            return Denoiser(kind, prefix, is_diffusers=True)
    return None


def _matching_kind(
    shapes: Shapes, prefix: str, marks: Mapping[PipelineKind, tuple[str, ...]]
) -> PipelineKind | None:
    """Return the kind with the most marks, among those whose marks are all in the file."""

    def has(mark: str) -> bool:
        name = f"{prefix}{mark}"
        return any(n.startswith(name) for n in shapes) if mark.endswith(".") else name in shapes

    fitting = [kind for kind, names in marks.items() if names and all(map(has, names))]
    return max(fitting, key=lambda kind: len(marks[kind]), default=None)


def kind_name(shapes: Shapes) -> str | None:
    """Return the name of the kind of pipeline of a file's denoiser; None without a denoiser."""
    found = denoiser_in(shapes)
    return None if found is None else found.kind.name


def harmless(name: str) -> str | None:
    """Return why a tensor of a file has no effect; None if it may have one."""
    return next((why for pattern, why in HARMLESS if pattern.fullmatch(name)), None)


def names_by_part(shapes: Shapes, kind: PipelineKind) -> dict[str, dict[str, str]]:
    """Group tensors by the part to which they belong.

    Args:
        kind: of the pipeline as which the file is read; must support single files.

    Returns: part -> name without the part's prefix -> name in the file. Tensors of no part are
        under the empty name, with full names. Missing parts are omitted.
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
    """Whether a tensor belongs to the denoiser; without a prefix, whether to nothing else."""
    if denoiser.prefix:
        return name.startswith(denoiser.prefix)
    return harmless(name) is None and not name.startswith(others)
