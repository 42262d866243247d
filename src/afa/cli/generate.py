"""`afa generate`: prompts to pictures, or a picture once more."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afa.cli.console import console, progress_bar, quieten_loading, require_new_folder
from afa.errors import AfaError
from afa.files import slug
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from afa.memory.budget import MemoryPlan

DTYPES = ("float32", "bfloat16", "float16")
#: what may be said beside a picture that is to be made again; all else comes from it
BESIDE_A_PICTURE = (
    "ensemble",
    "output",
    "from_image",
    "weights",
    "device",
    "memory_budget",
    "cuda_graphs",
)


def generate(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="New folder for the pictures.")],
    ensemble: Annotated[
        str | None, typer.Argument(help="Ensemble folder, or zoo:ensemble.")
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts, each in quotes.")
    ] = None,
    from_image: Annotated[
        Path | None,
        typer.Option(help="Make this picture again: a PNG of afa, which holds all it needs."),
    ] = None,
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
    bias: Annotated[
        list[str] | None,
        typer.Option(
            help="Lean on an expert: animals=+1.0, or animals@up=+1.0; as often as asked."
        ),
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
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Launch steps at once; for small work on a GPU.")
    ] = False,
    dtype: Annotated[str, typer.Option(help=f"Of the experts: {', '.join(DTYPES)}.")] = "float32",
) -> None:
    """Generate pictures with a trained ensemble.

    Every PNG holds what it was made from; --from-image makes it again, bit for bit on the same
    machine. Several processes share the pictures: accelerate launch -m afa generate ..., or,
    without a GPU, torchrun --nproc_per_node 2 -m afa generate ...

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
    from afa.steering import expert_names, parse_bias

    acceleration = acceleration_of(speed)
    asked_bias = parse_bias(bias or [])
    if from_image is not None:
        _require_nothing_else(context)
    elif ensemble is None or not prompts:
        raise AfaError(
            "afa generate must have an ensemble and a prompt, or --from-image with a picture. Try "
            'afa generate zoo:ensemble "a fox on the left and a pizza on the right" --output new.'
        )

    import torch

    from afa import pictures, record_weights
    from afa.contenders import ENSEMBLE
    from afa.kinds import denoiser_of
    from afa.plots import filmstrip
    from afa.training.engine import pick_device

    quieten_loading()
    loading: dict[str, Any] = {"device": pick_device(processes.device or device)}
    if cuda_graphs:
        loading["cuda_graphs"] = True
    if memory_budget is not None:
        loading |= {"memory_budget": memory_budget, "on_plan": say_plan}
        loading["pixels"] = height * width if height and width else None
    before: str | None = None
    asked: list[tuple[str, pictures.PictureRecipe]]
    if from_image is not None:
        made = pictures.read_picture(from_image)
        recipe = made.recipe.model_copy(update={"ensemble": ensemble or made.recipe.ensemble})
        if weights and recipe.drawn_by != ENSEMBLE:
            raise AfaError(f"Fusion weights are an ensemble's; this is by {recipe.drawn_by} alone.")
        pipeline = pictures.prepare_again(recipe, **loading)
        asked, before = [(f"00-{slug(recipe.prompt)}-seed{recipe.seed}", recipe)], made.pixels
    else:
        assert ensemble is not None, "it was asked for above"
        if quantize is not None:
            loading["quantize"] = quantize
        pipeline = pictures.prepare(
            ensemble,
            acceleration=acceleration,
            plan=plan,
            bias=asked_bias,
            compiled=compile_blocks,
            torch_dtype=getattr(torch, dtype),
            **loading,
        )
        size = _picture_size(pipeline, height, width)
        recipe = pictures.picture_recipe(
            ensemble=ensemble,
            identity=pictures.identity_of(denoiser_of(pipeline)),
            prompt="",
            negative_prompt=negative_prompt,
            seed=seed,
            steps=steps,
            guidance=guidance,
            height=size[0],
            width=size[1],
            bias=asked_bias,
            acceleration=acceleration.describe(),
            plan=denoiser_of(pipeline).plan,
            dtype=dtype,
            quantize=quantize,
            compiled=compile_blocks,
        )
        numbered = itertools.product(enumerate(prompts or []), range(seed, seed + num_images))
        asked = [
            (
                f"{number:02d}-{slug(prompt)}-seed{own_seed}",
                pictures.picture_recipe(**{**dict(recipe), "prompt": prompt, "seed": own_seed}),
            )
            for (number, prompt), own_seed in numbered
        ]
    processes.wait()  # nobody writes before the main process has seen that the folder is new
    output.mkdir(parents=True, exist_ok=True)
    mine = list(processes.share(asked))
    with progress_bar() as progress:
        task = progress.add_task("generate", total=len(mine), note="", visible=processes.is_main)
        for stem, recipe in mine:
            with record_weights(denoiser_of(pipeline)) if weights else nullcontext() as record:
                picture = pictures.draw(pipeline, recipe)
            path = output / f"{stem}.png"
            pictures.save_picture(picture, path, recipe, denoiser_of(pipeline).device)
            if record is not None:
                names = expert_names(denoiser_of(pipeline))
                filmstrip(record, [picture], output / f"{stem}-weights.png", experts=names)
            progress.advance(task)
    processes.wait()
    if not processes.is_main:
        return
    count = len(asked)
    console.print(f"{count} {'picture' if count == 1 else 'pictures'} in {output}")
    if before is not None:
        _say_whether_the_same(before, pictures.hash_pixels(picture))


def _require_nothing_else(context: typer.Context) -> None:
    """Raise AfaError where something is asked for that the picture itself says."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in BESIDE_A_PICTURE and source is not None and source.name == "COMMANDLINE":
            given = name.replace("_", "-").removesuffix("-blocks")
            raise AfaError(
                f"With --from-image all comes from the picture; leave {given} out, or the picture."
            )


def _say_whether_the_same(before: str, now: str) -> None:
    if before == now:
        console.print("The same picture, bit for bit.")
    else:
        console.print(
            "The pixels are not the same: another machine, number of threads or release of torch "
            "rounds differently."
        )


def say_plan(plan: MemoryPlan) -> None:
    """Tell what a memory budget comes to."""
    for line in plan.lines():
        console.print(line)


def _picture_size(
    pipeline: DiffusionPipeline, height: int | None, width: int | None
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
