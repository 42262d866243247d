"""The endpoint of the page for programs: `draw`, with typed and checked parameters."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator  # gradio evaluates the annotations of handlers
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import gradio as gr
from fastapi import Request
from fastapi.responses import JSONResponse
from gradio.route_utils import FnIndexInferError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from afa.app.drawing import Drawn, Stopped
from afa.app.layout import MAX_PIXELS, MAX_STEPS
from afa.drawing.contenders import ENSEMBLE
from afa.drawing.recorded import save_picture
from afa.ensemble.caching.settings import PRESETS
from afa.ensemble.prompt_syntax import PromptSyntax
from afa.ensemble.steering import STAGES
from afa.errors import AfaError
from afa.files import slug
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from afa.app.drawing import Studio
    from afa.app.layout import Defaults
    from afa.drawing.recorded import PictureRecipe

_MAX_GUIDANCE, _MAX_PROMPT = 20.0, 20_000
_SHOWN = 80  # characters of a wrong value in an error
_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class DrawRequest(BaseModel):
    """The parameters of `draw`. Types are strict: the text "20" is not the number 20."""

    model_config = ConfigDict(strict=True, extra="forbid", title="draw")

    prompt: str = Field(min_length=1, max_length=_MAX_PROMPT)
    drawn_by: str
    negative_prompt: str = Field(max_length=_MAX_PROMPT)
    seed: int = Field(ge=0, le=MAX_SEED)
    steps: int = Field(ge=1, le=MAX_STEPS)
    guidance: float = Field(ge=0, le=_MAX_GUIDANCE, allow_inf_nan=False)
    speed: str
    height: int = Field(ge=8, le=MAX_PIXELS)
    width: int = Field(ge=8, le=MAX_PIXELS)
    bias: dict[str, _Bias | dict[Literal["down", "mid", "up"], _Bias]]
    scheduler: str | None = Field(default=None, max_length=80)
    prompt_syntax: PromptSyntax = "plain"


def read_request(
    values: Mapping[str, Any], contenders: list[str], experts: list[str]
) -> DrawRequest:
    """Check the parameters of a request.

    Args:
        values: the parameters by name.
        contenders: allowed values of `drawn_by`.
        experts: allowed keys of `bias`.

    Raises:
        AfaError: names the parameter, what it must be, and the value.
    """
    try:
        request = DrawRequest.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][:2] if part != "float")
        raise AfaError(
            "AFA-APP-012",
            f"draw: '{where}' is invalid: {problem['msg']}; got {_shown(problem['input'])}.",
        ) from None
    for name, value, allowed in (
        ("drawn_by", request.drawn_by, contenders),
        ("speed", request.speed, list(PRESETS)),
        *(("key of bias", key, experts) for key in request.bias),
    ):
        if value not in allowed:
            raise AfaError(
                "AFA-APP-013",
                f"draw: {name} must be one of {', '.join(allowed)}; got {_shown(value)}.",
            )
    if request.bias and request.drawn_by != ENSEMBLE:
        raise AfaError(
            "AFA-APP-014",
            f"draw: bias applies to '{ENSEMBLE}' only; got drawn_by '{request.drawn_by}'. Remove "
            "one of them.",
        )
    return request


def _shown(value: Any) -> str:
    return repr(value)[:_SHOWN]


class Endpoint:
    """The endpoint `draw`; must be created inside a `Blocks`.

    Args:
        studio: draws the pictures.
        experts: names of the experts in a bias.
        defaults: default values of the parameters.
        folder: temporary folder for the pictures.
        keep: additional folder for all pictures; None keeps none.
        device: device of the ensemble.
        recipe: makes a recipe from its fields, the contender and the bias.
    """

    def __init__(
        self,
        studio: Studio,
        experts: list[str],
        defaults: Defaults,
        folder: Path,
        keep: Path | None,
        device: torch.device,
        recipe: Callable[[dict[str, Any], str, Any], PictureRecipe],
    ) -> None:
        self._studio, self._experts, self._device = studio, experts, device
        self._folders = [folder / "api", *([] if keep is None else [keep])]
        self._recipe = recipe
        size: dict[str, Any] = {"precision": 0, "maximum": MAX_PIXELS, "visible": False}
        contenders = studio.contenders.names
        inputs = [
            gr.Textbox(label="prompt", visible=False),
            gr.Radio(contenders, value=ENSEMBLE, label="drawn_by", visible=False),
            gr.Textbox("", label="negative_prompt", visible=False),
            gr.Number(0, label="seed", precision=0, maximum=MAX_SEED, visible=False),
            gr.Number(defaults.steps, label="steps", precision=0, visible=False),
            gr.Number(defaults.guidance, label="guidance", visible=False),
            gr.Radio(list(PRESETS), value="exact", label="speed", visible=False),
            gr.Number(defaults.height, label="height", **size),
            gr.Number(defaults.width, label="width", **size),
            gr.JSON({}, label="bias", visible=False),
            gr.Dropdown(list(defaults.schedulers), value=None, label="scheduler", visible=False),
            gr.Radio(
                list(get_args(PromptSyntax)), value="plain", label="prompt_syntax", visible=False
            ),
        ]
        outputs = [
            gr.Image(type="filepath", format="png", label="picture", visible=False),
            gr.JSON(label="recipe", visible=False),
        ]
        # a button that nobody sees: gradio knows no other event with such components
        gr.Button(visible=False).click(
            self.draw,
            inputs,
            outputs,
            api_name="draw",
            api_description=(
                f"Draw one picture. Seed: 0 to {MAX_SEED}; steps: 1 to {MAX_STEPS}; guidance: 0 to "
                f"{_MAX_GUIDANCE:g}; height and width: multiples of {defaults.multiple} up to "
                f"{MAX_PIXELS}. Bias: for each expert a number, or numbers for down, mid and up. "
                "The PNG contains the recipe, which is the second result."
            ),
            preprocess=False,  # would round numbers and convert texts; the request is checked
            concurrency_limit=1,
            concurrency_id="draw",
        )

    def draw(
        self,
        prompt: str,
        drawn_by: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        speed: str,
        height: int,
        width: int,
        bias: dict[str, Any],
        scheduler: str | None = None,
        prompt_syntax: str = "plain",
    ) -> Iterator[Any]:
        """Draw one picture, and yield its file and its recipe."""
        values = {name: value for name, value in locals().items() if name != "self"}
        stop = threading.Event()
        try:
            request = read_request(values, self._studio.contenders.names, self._experts)
            fields = request.model_dump(exclude={"drawn_by", "bias"})
            by_stage = {
                key: value if isinstance(value, dict) else dict.fromkeys(STAGES, value)
                for key, value in request.bias.items()
            }
            recipe = self._recipe(fields, drawn_by, by_stage)
            for event in self._studio.draw([recipe], stop):
                if isinstance(event, Drawn):
                    yield self._saved(event)
                else:  # where a cancelled request stops
                    yield gr.skip(), gr.skip()
        except AfaError as error:
            raise gr.Error(f"{error} ({error.code})", print_exception=False) from None
        except Stopped:
            raise gr.Error("Stopped.", print_exception=False) from None
        finally:
            stop.set()

    def _saved(self, drawn: Drawn) -> tuple[str, dict[str, Any]]:
        """Write a picture; return its file and its recipe."""
        recipe = drawn.recipe
        name = f"{secrets.token_hex(4)}-{slug(recipe.prompt)}-{slug(recipe.drawn_by)}.png"
        for folder in self._folders:
            folder.mkdir(exist_ok=True)
            save_picture(drawn.picture, folder / name, recipe, self._device, drawn.scheduler)
        return str(self._folders[0] / name), recipe.model_dump(mode="json", exclude_defaults=True)


#: what gradio raises for such calls
CALL_ERRORS = (TypeError, KeyError, FnIndexInferError)


async def refuse_call(request: Request, error: Exception) -> JSONResponse:
    """Answer a call whose parameters or endpoint do not exist, which gradio cannot map.

    Raises:
        Exception: the error itself, if the request was not a call.
    """
    if "/gradio_api/call/" not in request.url.path:
        raise error
    problem = str(error).split(" Please click")[0].strip("'\"")
    if isinstance(error, KeyError | FnIndexInferError):
        problem = f"there is no such endpoint: {problem}"
    refusal = AfaError(
        "AFA-APP-015",
        f"The call is invalid: {problem}. The only endpoint is draw, with the parameters "
        f"{', '.join(DrawRequest.model_fields)}.",
    )
    return JSONResponse({"error": f"{refusal} ({refusal.code})"}, status_code=422)
