"""Pictures that carry what they were made from, and can be made again from that alone."""

from __future__ import annotations

import hashlib
import io
import json
import platform
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import diffusers
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import Field, ValidationError

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.drawing.contenders import ENSEMBLE, Contenders
from afa.ensemble.accelerate import accelerate
from afa.ensemble.caching.plan import PruningPlan
from afa.ensemble.guard import OnNonFinite, decoded
from afa.ensemble.steering import steer
from afa.errors import AfaError
from afa.files import write_atomic
from afa.loading.ensemble_folder import aggregator_tensors, load_ensemble
from afa.loading.memory.budget import size_text
from afa.loading.pipeline import check_text_to_image
from afa.loading.trust.unchanged import require_unchanged
from afa.machine.exhausted import saying_what_fits
from afa.machine.free import free_memory
from afa.provenance import __version__
from afa.recipe import MAX_SEED, Section

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from diffusers import DiffusionPipeline

    from afa.ensemble.caching.settings import Acceleration
    from afa.ensemble.denoiser import EnsembleDenoiser
    from afa.ensemble.steering import Bias

_KEY = "afa"  # of the text in a PNG
_MAX_TEXT = 1_000_000
_MAX_PROMPT = 20_000


class PictureRecipe(Section):
    """All that a picture depends on, but for the machine.

    Attributes:
        ensemble: a folder, or `zoo:ensemble`.
        identity: of the ensemble, see `identity_of`.
        drawn_by: the ensemble itself, one of its experts or their merge; see
            `afa.drawing.contenders`.
        prompt: what it shows.
        negative_prompt: what it stays away from.
        seed: of the first noise.
        steps: of denoising.
        guidance: scale of classifier-free guidance.
        height: in pixels, like the width.
        bias: by expert and stage, see `afa.steer`.
        acceleration: what is left out, settings of `afa.Acceleration`.
        plan: of pruning, as a whole.
        dtype: of the experts.
        quantize: of the experts' weights, see `afa.loading.quantization`.
        compiled: whether blocks were compiled, which changes how numbers are rounded.
        on_nonfinite: what is done where an expert gives non-finite values; see
            `afa.ensemble.guard`.
    """

    ensemble: str = Field(max_length=4096)
    identity: str
    drawn_by: str = ENSEMBLE
    prompt: str = Field(max_length=_MAX_PROMPT)
    negative_prompt: str = Field(default="", max_length=_MAX_PROMPT)
    seed: int = Field(ge=0, le=MAX_SEED)
    steps: int = Field(ge=1, le=10_000)
    guidance: float = Field(ge=0, allow_inf_nan=False)
    height: int = Field(ge=8, le=16_384)
    width: int = Field(ge=8, le=16_384)
    bias: dict[str, dict[str, float]] = Field(default_factory=dict)
    acceleration: dict[str, Any] = Field(default_factory=dict)
    plan: PruningPlan | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["int8", "float8"] | None = None
    compiled: bool = False
    on_nonfinite: OnNonFinite = "stop"


class MadeWith(Section):
    """Where a picture was made; elsewhere the same recipe may be rounded to other pixels."""

    afa: str
    torch: str
    diffusers: str
    device: str
    processor: str
    threads: int


class PictureText(Section):
    """What is written into a PNG: how it was made, and a hash of what came out.

    Attributes:
        recipe: of the picture.
        made_with: where.
        pixels: SHA-256 of the picture, 8 bits of red, green and blue, row by row.
    """

    format: Literal["afa-picture"] = "afa-picture"
    version: Literal[1] = 1
    recipe: PictureRecipe
    made_with: MadeWith
    pixels: str


def picture_recipe(**fields: Any) -> PictureRecipe:
    """A recipe of checked values.

    Raises:
        AfaError: names the first that cannot be.
    """
    try:
        return PictureRecipe.model_validate(fields)
    except ValidationError as error:
        raise AfaError(
            "AFA-DRAW-002", f"A picture cannot be asked for so: {_first_problem(error)}."
        ) from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"'{'.'.join(map(str, problem['loc']))}': {problem['msg']}"


# -- drawing ----------------------------------------------------------------------------------


def identity_of(ensemble: EnsembleDenoiser) -> str:
    """SHA-256 of all that decides an ensemble's pictures: experts, autoencoder, aggregators.

    Experts and autoencoder are told by their own hashes.
    """
    digest = hashlib.sha256()
    known = ensemble.provenance
    for reference in (*known.experts, *known.parts, known.vae):
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
    compiled: bool = False,
    cuda_graphs: bool = False,
    on_nonfinite: str = "stop",
    **loading: Any,
) -> DiffusionPipeline:
    """An ensemble that is ready to draw from a prompt.

    Args:
        ensemble: a folder, or `zoo:ensemble`.
        acceleration: see `afa.accelerate`, like the plan.
        plan: of pruning.
        bias: see `afa.steer`.
        compiled: whether blocks are compiled, when the first picture is drawn.
        cuda_graphs: whether steps are CUDA graphs, which changes no picture.
        on_nonfinite: `mask` skips an expert where it gives non-finite values.
        loading: further arguments of `afa.load_ensemble`.

    Raises:
        AfaError: it cannot be had, does not draw from a prompt alone, or a setting does not fit.
    """
    pipeline = load_ensemble(ensemble, **loading)
    check_text_to_image(pipeline)
    steer(pipeline, bias)
    if on_nonfinite not in get_args(OnNonFinite):
        known = ", ".join(get_args(OnNonFinite))
        raise AfaError(
            "AFA-DRAW-003", f"on_nonfinite must be one of {known}, came '{on_nonfinite}'."
        )
    denoiser_of(pipeline).on_nonfinite = on_nonfinite
    pipeline.set_progress_bar_config(disable=True)
    mode: Any = "regional" if compiled else None
    return accelerate(pipeline, acceleration, plan=plan, compile=mode, cuda_graphs=cuda_graphs)


def prepare_again(recipe: PictureRecipe, **loading: Any) -> DiffusionPipeline:
    """The ensemble of a recipe, or what of its parts drew the picture, ready to draw it again.

    Args:
        recipe: of a picture.
        loading: further arguments of `afa.load_ensemble`.

    Raises:
        AfaError: see `prepare`; or it is another one than the picture was made with.
    """
    if not recipe.ensemble.startswith("zoo:") and not Path(recipe.ensemble).is_dir():
        raise AfaError(
            "AFA-DRAW-004",
            f"The ensemble of the picture must be there; there is no folder '{recipe.ensemble}'. "
            "Say where it is: afa generate ENSEMBLE --from-image PICTURE.",
        )
    if recipe.quantize is not None:
        loading["quantize"] = recipe.quantize
    pipeline = prepare(
        recipe.ensemble,
        acceleration=recipe.acceleration,
        plan=recipe.plan,
        bias=recipe.bias,
        compiled=recipe.compiled,
        on_nonfinite=recipe.on_nonfinite,
        torch_dtype=getattr(torch, recipe.dtype),
        **loading,
    )
    if identity_of(denoiser_of(pipeline)) != recipe.identity:
        raise AfaError(
            "AFA-DRAW-005",
            f"The ensemble must be the one that the picture was made with; '{recipe.ensemble}' is "
            "another one now. Name it: afa generate ENSEMBLE --from-image PICTURE.",
        )
    if recipe.drawn_by == ENSEMBLE:
        return pipeline
    return Contenders(pipeline).pipeline(recipe.drawn_by, recipe.acceleration)


def draw(pipeline: DiffusionPipeline, recipe: PictureRecipe) -> Image.Image:
    """The picture of a recipe.

    Args:
        pipeline: the ensemble, at the recipe's speed and with its bias; or any other stock
            pipeline, to compare with.
        recipe: prompt, noise and sampling.

    Raises:
        AfaError: memory runs out, the prediction is not finite, see `afa.ensemble.guard`, or
            somebody wrote into the files of weights meanwhile.
    """
    what = f"A picture of {recipe.width} x {recipe.height} pixels"
    with saying_what_fits(what, _smaller), decoded(pipeline):
        picture = pipeline(
            recipe.prompt,
            negative_prompt=recipe.negative_prompt,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            height=recipe.height,
            width=recipe.width,
            generator=torch.Generator().manual_seed(recipe.seed),
            **kind_of_pipeline(pipeline).call,
        ).images[0]
    require_unchanged(pipeline)
    return picture


def _smaller() -> str:
    free = size_text(free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return (
        f"Use --memory-budget '{free}', which is what is free, --dtype bfloat16, or a smaller "
        "--height and --width."
    )


@contextmanager
def on_every_call(pipeline: DiffusionPipeline, observe: Callable[[int], object]) -> Iterator[None]:
    """Within, `observe` is told the number of each call of the denoiser, from 0, before it is made.

    What it raises comes out of the pipeline, which is fit for another picture then.
    """
    count = 0

    def before(*_: Any) -> None:
        nonlocal count
        observe(count)
        count += 1

    hook = denoiser_of(pipeline).register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


def made_here(device: torch.device) -> MadeWith:
    """This machine, drawing on a device of it."""
    return MadeWith(
        afa=__version__,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        processor=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
    )


# -- files ------------------------------------------------------------------------------------


def hash_pixels(picture: Image.Image) -> str:
    """SHA-256 of a picture's pixels, 8 bits of red, green and blue, row by row."""
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


def save_picture(
    picture: Image.Image, path: Path, recipe: PictureRecipe, device: torch.device
) -> None:
    """Write a PNG with its recipe inside, whole or not at all.

    Args:
        picture: of the recipe.
        path: `.png`.
        recipe: how it was made.
        device: on what.
    """
    text = PictureText(recipe=recipe, made_with=made_here(device), pixels=hash_pixels(picture))
    info = PngImagePlugin.PngInfo()
    said = {**text.model_dump(), "recipe": recipe.model_dump(mode="json", exclude_defaults=True)}
    info.add_text(_KEY, json.dumps(said, ensure_ascii=False))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    write_atomic(path, buffer.getvalue())


def read_picture(path: Path) -> PictureText:
    """What a PNG of `save_picture` says of itself; its pixels are not read.

    Raises:
        AfaError: no such file, no PNG, or none that says so.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text = picture.info.get(_KEY)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise AfaError(
            "AFA-DRAW-006", f"'{path}' must be a PNG that afa has made; reading says: {error}."
        ) from None
    if not isinstance(text, str):
        raise AfaError(
            "AFA-DRAW-007",
            f"'{path}' must be a PNG that afa has made; it does not say how it was made. Some "
            "programs and pages drop that: take the file as it was written.",
        )
    try:
        if len(text) > _MAX_TEXT:
            raise ValueError(f"it is longer than {_MAX_TEXT} characters")
        return PictureText.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError) as error:
        said = _first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise AfaError(
            "AFA-DRAW-008", f"What '{path}' says of how it was made is not understood: {said}."
        ) from None
