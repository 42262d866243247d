"""Single files of tiny models, in the layouts that the web has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from afa.merging import MergeRecipe, plan_merge, run_merge
from afa.merging.report import notes
from tests.single_file import original_layout
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import PIPELINES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    Tensors = dict[str, Tensor]

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer."
POSITIONS = f"{TEXT}text_model.embeddings.position_ids"


def model(folder: Path, kind: str = "1.5", seed: int = 0, **config: Any) -> Tensors:
    """All tensors of a tiny model in the layout of the original code."""
    if kind == "1.5":
        pipeline: Any = tiny_pipeline(folder / "tokenizer", seed=seed, **config)
    else:
        pipeline = PIPELINES[kind](folder / "tokenizer")
    return {name: tensor.clone() for name, tensor in original_layout(pipeline).items()}


def denoiser(tensors: Tensors) -> Tensors:
    """Its denoiser alone, as files without `model.diffusion_model.` have it."""
    return {k.removeprefix(UNET): t for k, t in tensors.items() if k.startswith(UNET)}


def old_text_encoder(tensors: Tensors) -> Tensors:
    """The names that older files have for the text encoder."""
    return {k.replace(f"{TEXT}text_model.", TEXT): t for k, t in tensors.items()}


def merged(
    folder: Path,
    files: dict[str, Tensors],
    method: str = "weighted",
    metadata: dict[str, dict[str, str]] | None = None,
    **settings: Any,
) -> tuple[Tensors, str, Path]:
    """Merge files of these tensors by their names; one that is called `base` is the base.

    Returns: the result's tensors, what is said of the merge, and the result's file.
    """
    for name, tensors in files.items():
        about = (metadata or {}).get(name)
        save_file(
            {k: t.contiguous().clone() for k, t in tensors.items()},
            folder / f"{name}.safetensors",
            about,
        )
    sources = {name: str(folder / f"{name}.safetensors") for name in files}
    base = sources.pop("base", None)
    recipe = MergeRecipe.model_validate(
        {"method": method, "experts": list(sources.values()), "base": base, **settings}
    )
    output = folder / "merged" / "merged.safetensors"
    plan = plan_merge(recipe, output)
    for _ in run_merge(plan):
        pass
    return load_file(output), "\n".join(notes(plan)).replace(str(folder), ""), output
