"""`afa generate`: prompts to pictures."""

from __future__ import annotations

import io
import itertools
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afa.cli.console import console, progress_bar, quieten_loading, require_new_folder
from afa.errors import AfaError
from afa.files import write_atomic
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from afa.memory.budget import MemoryPlan

DTYPES = ("float32", "bfloat16", "float16")


def generate(
    ensemble: Annotated[str, typer.Argument(help="Ensemble folder, or zoo:ensemble.")],
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts, each in quotes.")],
    output: Annotated[Path, typer.Option(help="New folder for the pictures.")],
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance scale.")] = 7.5,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the first picture; then one more each.")
    ] = 0,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    weights: Annotated[
        bool, typer.Option("--weights", help="Draw the fusion weights too.")
    ] = False,
    negative_prompt: Annotated[str, typer.Option(help="What to stay away from.")] = "",
    height: Annotated[
        int | None, typer.Option(min=8, help="Pixels; by default the experts'.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=8, help="Pixels; by default the experts'.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    speed: Annotated[
        str, typer.Option(help="exact, balanced or fast: how much is taken over between steps.")
    ] = "exact",
    plan: Annotated[
        Path | None, typer.Option(help="Of afa prune: which experts run where.")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Of the device, such as 8GB; says and does what fits.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or float8: smaller experts, by torchao.")
    ] = None,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks first; pays for many pictures.")
    ] = False,
    dtype: Annotated[str, typer.Option(help=f"Of the experts: {', '.join(DTYPES)}.")] = "float32",
) -> None:
    """Generate pictures with a trained ensemble.

    Several processes share them: accelerate launch -m afa generate ..., or, without a GPU,
    torchrun --nproc_per_node 2 -m afa generate ...

    [bold]Example[/bold]: afa generate zoo:ensemble "a fox on the left and a pizza on the right,
    blue background" --output pictures --guidance 3 --weights
    """
    from afa.evaluation.processes import Processes

    processes = Processes()
    if processes.is_main:
        require_new_folder(output)
    if dtype not in DTYPES:
        raise AfaError(f"--dtype must be one of {', '.join(DTYPES)}, came '{dtype}'.")

    from afa.acceleration.settings import acceleration_of

    acceleration = acceleration_of(speed)

    import torch

    import afa
    from afa.kinds import denoiser_of, kind_of_pipeline
    from afa.maps import draw_weights
    from afa.pipeline import check_text_to_image
    from afa.training.engine import pick_device

    quieten_loading()
    memory: dict[str, Any] = {"quantize": quantize} if quantize is not None else {}
    if memory_budget is not None:
        memory |= {"memory_budget": memory_budget, "on_plan": _say_plan}
        memory["pixels"] = height * width if height and width else None
    pipeline = afa.load_ensemble(
        ensemble,
        torch_dtype=getattr(torch, dtype),
        device=pick_device(processes.device or device),
        **memory,
    )
    check_text_to_image(pipeline)
    pipeline = afa.accelerate(
        pipeline, acceleration, plan=plan, compile="regional" if compile_blocks else None
    )
    pipeline.set_progress_bar_config(disable=True)
    size = _picture_size(pipeline, height, width)
    names = [reference.name for reference in denoiser_of(pipeline).references]
    processes.wait()  # nobody writes before the main process has seen that the folder is new
    output.mkdir(parents=True, exist_ok=True)
    asked = itertools.product(enumerate(prompts), range(seed, seed + num_images))
    mine = list(processes.share(asked))
    with progress_bar() as progress:
        task = progress.add_task("generate", total=len(mine), note="", visible=processes.is_main)
        for (number, prompt), picture_seed in mine:
            settings = {
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "seed": picture_seed,
                "steps": steps,
                "guidance": guidance,
                "speed": speed,
                "plan": plan and str(plan),
                "ensemble": ensemble,
            }
            recording = afa.record_weights(denoiser_of(pipeline)) if weights else nullcontext()
            with recording as record:
                picture = pipeline(
                    prompt,
                    negative_prompt=negative_prompt,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    height=size[0],
                    width=size[1],
                    generator=torch.Generator().manual_seed(picture_seed),
                    **kind_of_pipeline(pipeline).call,
                ).images[0]
            stem = f"{number:02d}-{_slug(prompt)}-seed{picture_seed}"
            _save_picture(picture, output / f"{stem}.png", settings)
            if record is not None:
                draw_weights(record, [picture], output / f"{stem}-weights.png", experts=names)
            progress.advance(task)
    processes.wait()
    if not processes.is_main:
        return
    count = len(prompts) * num_images
    console.print(f"{count} {'picture' if count == 1 else 'pictures'} in {output}")


def _say_plan(plan: MemoryPlan) -> None:
    for line in plan.lines():
        console.print(line)


def _picture_size(
    pipeline: StableDiffusionPipeline, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width in pixels, the experts' own where none is asked for.

    Raises:
        AfaError: one is no multiple of what the experts work in.
    """
    from afa.pipeline import native_resolution, size_multiple

    native, multiple = native_resolution(pipeline), size_multiple(pipeline)
    for name, size in (("--height", height), ("--width", width)):
        if size is not None and size % multiple:
            raise AfaError(f"{name} must be a multiple of {multiple} pixels, came {size}.")
    # the library ignores one without the other
    return height or native[0], width or native[1]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "prompt"


def _save_picture(picture: Image.Image, path: Path, settings: dict[str, object]) -> None:
    """Write a PNG with its settings inside, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("afa", json.dumps(settings))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    write_atomic(path, buffer.getvalue())
