"""The recipe of a picture, recorded in its PNG."""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import diffusers
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import Field, ValidationError, field_validator, model_validator

from afa.denoisers.scheduler_names import a1111_name, calls_twice, canonical_name
from afa.drafting import DraftsRecipe
from afa.drawing.contenders import ENSEMBLE
from afa.drawing.parameters import KEY, text_of
from afa.ensemble.caching.plan import PruningPlan
from afa.ensemble.guard import OnNonFinite
from afa.ensemble.prompt_syntax import PromptSyntax, words_of_prompt
from afa.errors import AfaError
from afa.files import write_png
from afa.provenance import __version__
from afa.recipe import MAX_SEED, Section

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEY = "afa"  # of the text chunk in a PNG
_MAX_TEXT = 1_000_000
_MAX_PROMPT = 20_000
DEFAULT_STRENGTH, DEFAULT_HIRES_STRENGTH = 0.8, 0.5


class InputPicture(Section):
    """A file from which a picture was drawn, and the SHA-256 of its content."""

    path: str = Field(max_length=4096)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class PictureRecipe(Section):
    """All inputs of a picture except the machine.

    Attributes:
        ensemble: a folder, or `zoo:ensemble`.
        identity: hash of the ensemble, see `identity_of`.
        drawn_by: the ensemble, one of its experts, their merge or its student; see
            `afa.drawing.contenders`.
        student: source and hash of the student, if it drew the picture.
        prompt: the prompt.
        negative_prompt: the negative prompt.
        prompt_syntax: how both are read, see `afa.ensemble.prompt_syntax`.
        seed: seed of the initial noise.
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance.
        height: height in pixels.
        width: width in pixels.
        bias: bias by expert and stage, see `afa.steer`.
        drafts: settings of drafts, see `afa.drafting`.
        judge: hash of their judge.
        acceleration: settings of `afa.Acceleration`.
        plan: the complete pruning plan.
        dtype: dtype of the experts.
        quantize: quantization of the experts' weights, see `afa.loading.quantization`.
        compiled: whether blocks were compiled, which changes rounding.
        on_nonfinite: reaction to non-finite values of an expert; see `afa.ensemble.guard`.
        scheduler: a name of `afa.denoisers.scheduler_names`; None uses the experts' own.
        image: the initial picture, for image to image and inpainting.
        mask: the mask, white where the picture is drawn again.
        strength: how much noise is added to the initial picture, from 0 (none) to 1.
        hires: draws the picture a second time, enlarged by this factor; None draws it once.
        hires_strength: the strength of that pass.
    """

    ensemble: str = Field(max_length=4096)
    identity: str
    drawn_by: str = ENSEMBLE
    student: tuple[str, str] | None = None
    prompt: str = Field(max_length=_MAX_PROMPT)
    negative_prompt: str = Field(default="", max_length=_MAX_PROMPT)
    prompt_syntax: PromptSyntax = "plain"
    seed: int = Field(ge=0, le=MAX_SEED)
    steps: int = Field(ge=1, le=10_000)
    guidance: float = Field(ge=0, allow_inf_nan=False)
    height: int = Field(ge=8, le=16_384)
    width: int = Field(ge=8, le=16_384)
    bias: dict[str, dict[str, float]] = Field(default_factory=dict)
    drafts: DraftsRecipe | None = None
    judge: str | None = None
    acceleration: dict[str, Any] = Field(default_factory=dict)
    plan: PruningPlan | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["int8", "float8"] | None = None
    compiled: bool = False
    on_nonfinite: OnNonFinite = "stop"
    scheduler: str | None = Field(default=None, max_length=80)
    image: InputPicture | None = None
    mask: InputPicture | None = None
    strength: float = Field(default=DEFAULT_STRENGTH, gt=0, le=1)
    hires: float | None = Field(default=None, gt=1, le=4)
    hires_strength: float = Field(default=DEFAULT_HIRES_STRENGTH, gt=0, le=1)

    @field_validator("scheduler")
    @classmethod
    def _canonical(cls, given: str | None) -> str | None:
        return given and canonical_name(given)

    @model_validator(mode="after")
    def _of_an_image(self) -> PictureRecipe:
        if self.mask is not None and self.image is None:
            raise ValueError("a mask requires an image")
        if self.hires is not None and self.image is not None:
            raise ValueError("hires cannot be combined with an image")
        return self

    @property
    def num_calls(self) -> int:
        """About how many times the denoiser is called; some schedulers add one."""
        steps = self.steps if self.image is None else int(self.steps * self.strength)
        if self.hires is not None:
            steps += int(self.steps * self.hires_strength)
        twice = self.scheduler is not None and calls_twice(self.scheduler)
        return max(2 * steps if twice else steps, 1)

    @property
    def words(self) -> str:
        """The prompt as plain text, without weights."""
        return words_of_prompt(self.prompt, self.prompt_syntax)


class MadeWith(Section):
    """The software and machine of a picture; on others, rounding can change its pixels."""

    afa: str
    torch: str
    diffusers: str
    device: str
    processor: str
    threads: int


class PictureText(Section):
    """The text in a PNG: how the picture was made, and the hash of its pixels.

    Attributes:
        recipe: the recipe of the picture.
        made_with: the software and the machine.
        pixels: SHA-256 of the 8-bit RGB pixels, row by row.
    """

    format: Literal["afa-picture"] = "afa-picture"
    version: Literal[1] = 1
    recipe: PictureRecipe
    made_with: MadeWith
    pixels: str


def picture_recipe(**fields: Any) -> PictureRecipe:
    """Validate the fields of a recipe.

    Raises:
        AfaError: if a field is invalid; names the first one.
    """
    try:
        return PictureRecipe.model_validate(fields)
    except ValidationError as error:
        raise AfaError(
            "AFA-DRAW-002", f"A setting of the picture is invalid: {_first_problem(error)}."
        ) from None


def require_ranges(fields: Mapping[str, Any]) -> None:
    """Check some fields of a recipe before anything is loaded.

    Raises:
        AfaError: see `picture_recipe`.
    """
    sampling = {"seed": 0, "steps": 1, "guidance": 1.0, "height": 8, "width": 8}
    picture_recipe(**{"ensemble": "", "identity": "", "prompt": "", **sampling, **fields})


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"'{'.'.join(map(str, problem['loc']))}': {problem['msg']}"


def made_here(device: torch.device) -> MadeWith:
    """Describe the software and this machine with the given device."""
    return MadeWith(
        afa=__version__,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        processor=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
    )


def hash_pixels(picture: Image.Image) -> str:
    """SHA-256 of a picture's 8-bit RGB pixels, row by row."""
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


def save_picture(
    picture: Image.Image,
    path: Path,
    recipe: PictureRecipe,
    device: torch.device,
    scheduler: str | None = None,
) -> None:
    """Write a PNG that contains its recipe, and A1111's text about it; the write is atomic.

    Args:
        picture: the picture.
        path: a `.png` file.
        recipe: the recipe of the picture.
        device: device that drew it.
        scheduler: the name of the experts' own scheduler, for A1111's text.
    """
    text = PictureText(recipe=recipe, made_with=made_here(device), pixels=hash_pixels(picture))
    info = PngImagePlugin.PngInfo()
    shown = {**text.model_dump(), "recipe": recipe.model_dump(mode="json", exclude_defaults=True)}
    info.add_text(_KEY, json.dumps(shown, ensure_ascii=False))
    info.add_text(KEY, parameters_text(recipe, scheduler))
    write_png(path, picture, info)


def parameters_text(recipe: PictureRecipe, scheduler: str | None = None) -> str:
    """Describe a picture as A1111 does; see `afa.drawing.parameters`.

    Args:
        recipe: of the picture.
        scheduler: the name of the experts' own scheduler, which is used if the recipe has none;
            None leaves it out.
    """
    name = recipe.scheduler or scheduler
    pairs: dict[str, object] = {"Steps": recipe.steps}
    if name is not None:
        pairs["Sampler"] = name
        with suppress(AfaError):  # a class without a name in A1111
            pairs["Sampler"] = a1111_name(name)
    pairs |= {"CFG scale": f"{recipe.guidance:g}", "Seed": recipe.seed}
    pairs["Size"] = f"{recipe.width}x{recipe.height}"
    pairs["Model hash"] = recipe.identity[:10]
    model = recipe.ensemble.rstrip("/").rpartition("/")[2]
    pairs["Model"] = model if recipe.drawn_by == ENSEMBLE else f"{model} ({recipe.drawn_by})"
    if recipe.image is not None:
        pairs["Denoising strength"] = f"{recipe.strength:g}"
    if recipe.hires is not None:
        pairs["Denoising strength"] = f"{recipe.hires_strength:g}"
        pairs["Hires upscale"] = f"{recipe.hires:g}"
        pairs["Hires upscaler"] = "Lanczos"
    pairs["Version"] = f"afa {__version__}"
    return text_of(recipe.prompt, recipe.negative_prompt, pairs)


def has_recipe(path: Path) -> bool:
    """Whether a file is a PNG with a recipe of afa."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return _KEY in picture.info
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
        return False


def read_picture(path: Path) -> PictureText:
    """Read the recipe in a PNG of `save_picture`, without its pixels.

    Raises:
        AfaError: if the file is missing, not a PNG, or has no valid recipe.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text = picture.info.get(_KEY)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise AfaError(
            "AFA-DRAW-006", f"'{path}' cannot be read as a PNG of afa: {error}."
        ) from None
    if not isinstance(text, str):
        raise AfaError(
            "AFA-DRAW-007",
            f"'{path}' contains no recipe of afa. Use the original file: some programs and sites "
            "remove PNG metadata.",
        )
    try:
        if len(text) > _MAX_TEXT:
            raise ValueError(f"it has more than {_MAX_TEXT} characters")
        return PictureText.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError) as error:
        problem = _first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise AfaError("AFA-DRAW-008", f"The recipe in '{path}' is invalid: {problem}.") from None
