"""The controls and the four tabs of the page; `page` handles their events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import gradio as gr

from afa.app import views
from afa.ensemble.caching.settings import PRESETS
from afa.ensemble.prompt_syntax import PromptSyntax
from afa.ensemble.steering import STAGES
from afa.files import slug
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_STEPS, MAX_PIXELS, MAX_BIAS = 150, 2048, 4.0
#: the scheduler of the models
OWN = "the experts' own"
CSS = """
#gallery .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(clamp(96px, 11vw, 140px), 1fr)) !important}
.afa-legend {list-style: none; display: flex; flex-wrap: wrap; gap: 1em; margin: 0; padding: 0}
.afa-legend span {display: inline-block; width: 1em; height: 1em; margin-right: .4em;
  border: 1px solid; vertical-align: -.15em}
.afa-error {border-left: 4px solid #D55E00; padding-left: .6em; font-weight: 600}
.afa-status progress {width: 100%}
.afa-pictures .image-frame, .afa-pictures img, .afa-map .image-frame, .afa-map img {
  width: 100% !important; height: auto !important; object-fit: contain !important}
@media (max-width: 480px) {
  .tab-container button {padding: 0 .5em !important; font-size: .85em !important}}
.afa-small, .afa-small > * {padding: 0 !important; min-height: 0 !important; margin: 0}
"""


@dataclass(frozen=True)
class Defaults:
    """Initial values of the controls.

    `multiple` is the step of height and width in pixels; `schedulers` are those that fit.
    """

    prompt: str
    steps: int
    guidance: float
    height: int
    width: int
    multiple: int
    schedulers: Sequence[str] = ()


@dataclass(frozen=True)
class Slot:
    """A picture and its caption."""

    name: str
    image: gr.Image
    caption: gr.HTML

    def cleared(self) -> dict[Any, Any]:
        """The values of its components without a picture."""
        return {self.image: None, self.caption: views.caption(self.name)}


class Controls:
    """Prompt, contenders and sampling settings."""

    def __init__(self, defaults: Defaults, names: Sequence[str]) -> None:
        self.prompt = gr.Textbox(defaults.prompt, label="Prompt", lines=2, elem_id="prompt")
        self.contenders = gr.CheckboxGroup(
            list(names), value=list(names), label="Drawn by", elem_id="who"
        )
        with gr.Row():
            self.go = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
            self.cancel = gr.Button(
                "Cancel", variant="stop", elem_id="cancel", min_width=100, interactive=False
            )
        self.status = gr.HTML(elem_id="status", elem_classes=["afa-status", "afa-small"])
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            self.dice = gr.Button("Random seed", size="sm")
        self.steps = gr.Slider(1, MAX_STEPS, defaults.steps, step=1, label="Steps", elem_id="steps")
        self.guidance = gr.Slider(0, 20, defaults.guidance, step=0.1, label="Guidance")
        with gr.Accordion("More", open=False):
            self.negative = gr.Textbox("", label="Negative prompt")
            self.syntax = gr.Radio(
                list(get_args(PromptSyntax)),
                value="plain",
                label="Prompt syntax (weighted: long prompts, (word:1.3), [word], BREAK)",
                elem_id="syntax",
            )
            self.speed = gr.Radio(list(PRESETS), value="exact", label="Speed")
            self.scheduler = gr.Dropdown(
                [OWN, *defaults.schedulers],
                value=OWN,
                label="Scheduler",
                elem_id="scheduler",
            )
            size: dict[str, Any] = {"step": defaults.multiple, "minimum": defaults.multiple}
            size["maximum"] = MAX_PIXELS
            self.height = gr.Slider(value=defaults.height, label="Height", **size)
            self.width = gr.Slider(value=defaults.width, label="Width", **size)

    @property
    def sampling(self) -> list[Any]:
        """The controls of a recipe, in the order that `Page._read` expects."""
        first = [self.prompt, self.negative, self.seed, self.steps, self.guidance]
        return [*first, self.syntax, self.speed, self.scheduler, self.height, self.width]


class FusionWeights:
    """The fusion weights of a picture by step and site."""

    def __init__(self, experts: Sequence[str]) -> None:
        self.title = gr.HTML(
            "<p>Draw a picture first.</p>", elem_id="caption", elem_classes="afa-small"
        )
        with gr.Row():
            with gr.Column(min_width=280):
                self.map = gr.Image(
                    label="Click on the picture for the weights there",
                    type="pil",
                    interactive=False,
                    elem_id="map",
                    elem_classes="afa-map",
                    buttons=["fullscreen", "download"],
                )
                self.legend = gr.HTML(elem_id="legend", elem_classes="afa-small")
                self.numbers = gr.HTML(elem_id="numbers", elem_classes="afa-small")
            with gr.Column(min_width=280):
                label = "Step (0: mean of all steps)"
                self.step = gr.Slider(0, 1, 0, step=1, label=label, elem_id="step")
                self.site = gr.Dropdown([views.ALL_SITES], label="Site", elem_id="site")
                colours = dict(zip(experts, views.hex_colours(len(experts)), strict=False))
                self.shares = gr.LinePlot(
                    x="step",
                    y="share",
                    color="expert",
                    color_map=colours,
                    y_lim=[0, 1],
                    title="Mean share of the picture, by step",
                    height=240,
                )
        self.maps = slots(experts, "weights")

    @property
    def seen(self) -> list[Any]:
        """The components that depend on step and site."""
        maps = [part for slot in self.maps for part in (slot.image, slot.caption)]
        return [self.map, self.legend, self.numbers, *maps]


class Steering:
    """Biases of the experts."""

    def __init__(self, experts: Sequence[str]) -> None:
        gr.Markdown(
            "Bias the fusion towards an expert (positive) or away from it (negative), and draw. +1 "
            "multiplies the odds of the expert by 2.7 at every pixel; 0 has no effect."
        )

        def slider(label: str, name: str) -> gr.Slider:
            return gr.Slider(-MAX_BIAS, MAX_BIAS, 0, step=0.1, label=label, elem_id=slug(name))

        with gr.Row():
            everywhere = [slider(name, f"bias {n}") for n, name in enumerate(experts)]
        by_stage = []
        with gr.Accordion("By stage of the network (added to the values above)", open=False):
            for n, name in enumerate(experts):
                with gr.Row():
                    by_stage += [slider(f"{name}: {part}", f"bias {n} {part}") for part in STAGES]
        #: one per expert for the whole network, then one per expert and stage
        self.biases = [*everywhere, *by_stage]
        with gr.Row():
            self.go = gr.Button("Draw with and without", variant="primary", elem_id="steer")
            self.reset = gr.Button("Reset to 0")
        self.without, self.steered = slots(["without", "with"], "steered")


class History:
    """The pictures of the session."""

    def __init__(self) -> None:
        self.gallery = gr.Gallery(
            label="Pictures of this session",
            show_label=False,
            columns=6,
            height="auto",
            elem_id="gallery",
            allow_preview=False,
            interactive=False,
            buttons=[],
        )
        with gr.Row():
            self.download = gr.DownloadButton("Download", elem_id="download", interactive=False)
            self.use = gr.Button("Use these settings", interactive=False, elem_id="use")
            self.look = gr.Button("Fusion weights", interactive=False, elem_id="look")
        self.details = gr.Code(label="Recipe of the picture", language="json", interactive=False)


class Layout:
    """The page; must be created inside a `Blocks`. `names` are the contenders."""

    def __init__(self, defaults: Defaults, experts: Sequence[str], names: Sequence[str]) -> None:
        gr.Markdown("# afa: one generator from several experts")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self.controls = Controls(defaults, names)
            with gr.Column(scale=3, min_width=320), gr.Tabs() as self.tabs:
                with gr.Tab("Compare"):
                    self.compare = {slot.name: slot for slot in slots(names, "picture")}
                with gr.Tab("Fusion weights", id="who"):
                    self.weights = FusionWeights(experts)
                with gr.Tab("Steer"):
                    self.steering = Steering(experts)
                with gr.Tab("History"):
                    self.history = History()


def slots(names: Sequence[str], kind: str) -> list[Slot]:
    """Create empty pictures side by side in a row that wraps."""
    made = []
    with gr.Row(elem_classes="afa-pictures"):
        for n, name in enumerate(names):
            with gr.Column(min_width=150):
                image = gr.Image(
                    type="filepath",
                    format="png",
                    interactive=False,
                    show_label=False,
                    label=name,
                    elem_id=f"{kind}-{n}",
                    buttons=["download", "fullscreen"],
                )
                caption = gr.HTML(views.caption(name), elem_classes="afa-small")
                made.append(Slot(name, image, caption))
    return made


def parts(slots: Iterable[Slot]) -> list[Any]:
    """The components of pictures, in their order."""
    return [part for slot in slots for part in (slot.image, slot.caption)]
