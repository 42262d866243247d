"""Draw pictures from recipes, and draw recorded pictures again."""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.denoisers.schedulers import sampled_with
from afa.drafting import DraftsRecipe, own_drafts, routed, use_drafts
from afa.drawing.contenders import ENSEMBLE, Contenders, load_student
from afa.drawing.inputs import (
    accepted,
    arguments_of,
    enlarged,
    hires_size,
    require_passes,
    taking_picture,
)
from afa.ensemble.accelerate import accelerate
from afa.ensemble.caching.plan import PruningPlan
from afa.ensemble.guard import OnNonFinite, decoded
from afa.ensemble.steering import steer
from afa.ensemble.weighted_prompts import prompt_call
from afa.errors import AfaError
from afa.loading.ensemble_folder import aggregator_tensors, load_ensemble
from afa.loading.manifest import read_manifest
from afa.loading.memory.budget import size_text
from afa.loading.memory.plan import bytes_alone
from afa.loading.planned import companions_of_ensemble
from afa.loading.sources import is_there
from afa.loading.task import check_text_to_image
from afa.loading.trust.unchanged import require_unchanged
from afa.machine.exhausted import saying_what_fits
from afa.machine.free import free_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from diffusers import DiffusionPipeline

    from afa.drafting import Drafter
    from afa.drawing.recorded import PictureRecipe
    from afa.ensemble.caching.settings import Acceleration
    from afa.ensemble.denoiser import EnsembleDenoiser
    from afa.ensemble.steering import Bias


def identity_of(ensemble: EnsembleDenoiser) -> str:
    """SHA-256 of an ensemble: its aggregators, and the hashes of its experts and autoencoder."""
    digest = hashlib.sha256()
    sources = ensemble.provenance
    for reference in (*sources.experts, *sources.parts, sources.vae):
        if reference is not None:
            digest.update(f"{reference.identity}\n".encode())
    for name, tensor in sorted(aggregator_tensors(ensemble).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prepare(
    ensemble: str,
    *,
    acceleration: Acceleration | Mapping[str, Any] | str = "exact",
    plan: PruningPlan | Path | None = None,
    bias: Bias | None = None,
    drafts: DraftsRecipe | None = None,
    compiled: bool = False,
    cuda_graphs: bool = False,
    on_nonfinite: str = "stop",
    **loading: Any,
) -> DiffusionPipeline:
    """Load an ensemble and apply the settings for drawing from a prompt.

    Args:
        ensemble: a folder, or `zoo:ensemble`.
        acceleration: see `afa.accelerate`.
        plan: a pruning plan, see `afa.accelerate`.
        bias: see `afa.steer`.
        drafts: see `afa.drafting`.
        compiled: compile blocks when the first picture is drawn.
        cuda_graphs: run steps as CUDA graphs, which does not change pictures.
        on_nonfinite: `mask` skips an expert where it returns non-finite values; `stop` raises.
        loading: further arguments of `afa.load_ensemble`.

    Raises:
        AfaError: if the ensemble cannot be loaded, needs more than a prompt, or a setting does not
            fit.
    """
    dtype = loading.get("torch_dtype", torch.float32)
    companions = None
    if drafts is not None:
        companions = companions_of_ensemble(ensemble, dtype)
        if "memory_budget" in loading:
            loading["reserved"] = bytes_alone(read_manifest(drafts.judge, companions), dtype)
    pipeline = load_ensemble(ensemble, **loading)
    check_text_to_image(pipeline)
    steer(pipeline, bias)
    if on_nonfinite not in get_args(OnNonFinite):
        known = ", ".join(get_args(OnNonFinite))
        raise AfaError(
            "AFA-DRAW-003", f"on_nonfinite must be one of {known}; got '{on_nonfinite}'."
        )
    denoiser_of(pipeline).on_nonfinite = on_nonfinite
    pipeline.set_progress_bar_config(disable=True)
    mode: Any = "regional" if compiled else None
    accelerate(pipeline, acceleration, plan=plan, compile=mode, cuda_graphs=cuda_graphs)
    if drafts is not None:
        use_drafts(pipeline, drafts, companions)
    return pipeline


def drafts_of(pipeline: DiffusionPipeline, prompt: str) -> dict[str, Any]:
    """The fields of a picture's recipe for the drafts of a prompt; empty if it has none.

    Args:
        prompt: the words of the prompt, without weights.
    """
    drafter: Drafter | None = getattr(denoiser_of(pipeline), "drafter", None)
    settings = None if drafter is None else drafter.settings_of(prompt)
    if drafter is None or settings is None:
        return {}
    # what a PNG can record; the hash of the judge is beside it
    judge = replace(settings.judge, sha256=None, lora_sha256=None, revision=None)
    return {
        "drafts": settings.model_copy(update={"judge": judge}),
        "judge": drafter.identity,
    }


def judge_of(pipeline: DiffusionPipeline) -> str | None:
    """The hash of the judge of a pipeline's drafts; None without drafts."""
    drafter = getattr(denoiser_of(pipeline), "drafter", None)
    return None if drafter is None else drafter.identity


def prepare_again(recipe: PictureRecipe, **loading: Any) -> DiffusionPipeline:
    """Load the pipeline that drew a picture: the ensemble, an expert or the merge.

    Args:
        recipe: the recipe of the picture.
        loading: further arguments of `afa.load_ensemble`.

    Raises:
        AfaError: see `prepare`; or if the ensemble has changed since.
    """
    if not recipe.ensemble.startswith("zoo:") and not Path(recipe.ensemble).is_dir():
        raise AfaError(
            "AFA-DRAW-004",
            f"The ensemble of the picture, '{recipe.ensemble}', does not exist. Pass its new "
            "folder: afa generate ENSEMBLE --from-image PICTURE.",
        )
    drafts = _with_judge(recipe)
    if recipe.quantize is not None:
        loading["quantize"] = recipe.quantize
    pipeline = prepare(
        recipe.ensemble,
        acceleration=recipe.acceleration,
        plan=recipe.plan,
        bias=recipe.bias,
        drafts=drafts,
        compiled=recipe.compiled,
        on_nonfinite=recipe.on_nonfinite,
        torch_dtype=getattr(torch, recipe.dtype),
        **loading,
    )
    if identity_of(denoiser_of(pipeline)) != recipe.identity:
        raise AfaError(
            "AFA-DRAW-005",
            f"The ensemble '{recipe.ensemble}' is not the one that drew the picture: its experts, "
            "autoencoder or aggregators differ. Pass that one: afa generate ENSEMBLE --from-image "
            "PICTURE.",
        )
    if judge_of(pipeline) != recipe.judge:
        raise AfaError(
            "AFA-DRAW-016",
            f"'{drafts and drafts.judge}' is not the judge of the picture's drafts: its weights or "
            "its configuration differ. Restore that one.",
        )
    if recipe.drawn_by == ENSEMBLE:
        return pipeline
    student = None
    if recipe.student is not None:
        source = recipe.student[0]
        if not source.startswith("zoo:") and not Path(source).exists():
            raise AfaError(
                "AFA-DRAW-015",
                f"The student of the picture, '{source}', does not exist. Restore that path.",
            )
        student = load_student(source, pipeline)
        if student.identity != recipe.student[1]:
            raise AfaError(
                "AFA-DRAW-014",
                f"The student '{student.source}' is not the one that drew the picture: its weights "
                "differ. Restore that one.",
            )
    return Contenders(pipeline, student).pipeline(recipe.drawn_by, recipe.acceleration)


def _with_judge(recipe: PictureRecipe) -> DraftsRecipe | None:
    """The drafts of a picture; a judge that was moved is the one that the ensemble now names.

    Raises:
        AfaError: if the judge does not exist.
    """
    drafts = recipe.drafts
    if drafts is None or is_there(drafts.judge.source):
        return drafts
    own = own_drafts(recipe.ensemble)
    if own is not None and is_there(own.judge.source):
        return drafts.model_copy(update={"judge": own.judge})
    raise AfaError(
        "AFA-DRAW-017",
        f"The judge of the picture's drafts, '{drafts.judge.source}', does not exist. Restore that "
        "path.",
    )


def draw(pipeline: DiffusionPipeline, recipe: PictureRecipe) -> Image.Image:
    """Draw the picture of a recipe.

    Args:
        pipeline: the ensemble with the acceleration and bias of the recipe, or any diffusers
            pipeline to compare with.
        recipe: prompt, seed and sampling settings.

    Raises:
        AfaError: if memory runs out, the prediction is not finite (see `afa.ensemble.guard`), the
            files of weights were changed in the meantime, or the scheduler, the initial picture
            or the mask does not fit.
    """
    require_passes(recipe)
    size = hires_size(recipe.height, recipe.width, recipe.hires, 1)
    what = f"A picture of {size[1]} x {size[0]} pixels"
    generator = torch.Generator().manual_seed(recipe.seed)
    require_no_drafts(pipeline, recipe)
    sampled = sampled_with(pipeline, recipe.scheduler)
    asked = (recipe.prompt, recipe.negative_prompt, recipe.guidance, recipe.prompt_syntax)
    with saying_what_fits(what, _smaller), sampled, decoded(pipeline):
        call: dict[str, Any] = {
            **prompt_call(pipeline, *asked),
            "height": recipe.height,
            "width": recipe.width,
            **kind_of_pipeline(pipeline).call,
        }
        if recipe.image is None:
            with routed(pipeline, [recipe.words], [generator], **call):
                picture = _drawn(pipeline, recipe, generator, call)
        else:
            picture = _drawn_from(pipeline, recipe, generator, {**call, **arguments_of(recipe)})
        if recipe.hires is not None:
            larger = enlarged(pipeline, recipe, picture)
            call |= {"width": larger.width, "height": larger.height}
            call |= {"image": larger, "strength": recipe.hires_strength}
            again = torch.Generator().manual_seed(recipe.seed)
            picture = _drawn_from(pipeline, recipe, again, call)
    require_unchanged(pipeline)
    return picture


def _drawn(
    pipeline: DiffusionPipeline,
    recipe: PictureRecipe,
    generator: torch.Generator,
    call: dict[str, Any],
) -> Image.Image:
    return pipeline(num_inference_steps=recipe.steps, generator=generator, **call).images[0]


def _drawn_from(
    pipeline: DiffusionPipeline,
    recipe: PictureRecipe,
    generator: torch.Generator,
    call: dict[str, Any],
) -> Image.Image:
    """Draw from an initial picture in the arguments of the call.

    Raises:
        AfaError: if the stock pipeline refuses these models, for instance their latent channels.
    """
    other = taking_picture(pipeline, masked="mask_image" in call)
    try:
        return _drawn(other, recipe, generator, accepted(other, call))
    except AfaError:
        raise
    except ValueError as error:
        what = " ".join(re.sub(r"<[^>]*>", "", str(error)).split())
        raise AfaError(
            "AFA-DRAW-032",
            f"diffusers' {type(other).__name__} does not draw with these experts: {what} Draw "
            "without --mask or --image, or use other experts.",
        ) from error


def require_no_drafts(pipeline: DiffusionPipeline, recipe: PictureRecipe) -> None:
    """Check that a picture is not drawn by drafts if it is drawn from another one.

    Raises:
        AfaError: if it is.
    """
    is_from_another = recipe.image is not None or recipe.hires is not None
    if is_from_another and drafts_of(pipeline, recipe.words):
        raise AfaError(
            "AFA-DRAW-030",
            "Drafts cannot be combined with an initial picture or hires: they decide by what the "
            "experts draw from noise. Pass --no-drafts, or remove --image or --hires.",
        )


def _smaller() -> str:
    free = size_text(free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return (
        f"Pass --memory-budget '{free}' (the free memory), --dtype bfloat16, or a smaller --height "
        "and --width."
    )


@contextmanager
def on_every_call(
    pipeline: DiffusionPipeline,
    observe: Callable[[int], object],
    drafting: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Call `observe` with the number of each call of the denoiser, from 0, before the call.

    Calls for drafts do not count; `drafting` is called before them instead.
    Exceptions of `observe` propagate out of the pipeline, which can be used again afterwards.
    """
    count, denoiser = 0, denoiser_of(pipeline)

    def before(*_: Any) -> None:
        nonlocal count
        if getattr(denoiser, "is_drafting", False):
            if drafting is not None:
                drafting()
            return
        observe(count)
        count += 1

    hook = denoiser.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
