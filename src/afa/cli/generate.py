"""`afa generate`: draw pictures of prompts, or reproduce a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from afa.cli.check import RunCheck, require_sound
from afa.cli.console import require_new_folder, say, say_warnings
from afa.cli.drafts import Drafts, NoDrafts, drafts_for, say_own
from afa.cli.folder import draw_into, require_same_pictures, stems_of
from afa.cli.trust import OPTIONS as TRUST_OPTIONS
from afa.ensemble.prompt_syntax import PromptSyntax, words_of_prompt
from afa.errors import AfaError
from afa.files import slug
from afa.machine.quiet import quieten_loading
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline

    from afa.drawing.recorded import PictureRecipe
    from afa.loading.memory.budget import MemoryPlan

DTYPES = ("float32", "bfloat16", "float16")
ON_NONFINITE = ("stop", "mask")
#: parameters allowed with --from-image; the picture itself provides all others
BESIDE_A_PICTURE = (
    "ensemble",
    "output",
    "from_image",
    "weights",
    "device",
    "memory_budget",
    "cuda_graphs",
    *TRUST_OPTIONS,
)


def _option(panel: str) -> Any:
    """Return a function that makes options of one panel of the help."""

    def option(text: str, *, name: str | None = None, **limits: Any) -> Any:
        return typer.Option(*filter(None, [name]), help=text, rich_help_panel=panel, **limits)

    return option


_picture, _speed = _option("Pictures"), _option("Speed and memory")


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
        typer.Option(help="PNG of afa to reproduce from its recorded settings."),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also draw the fusion weights.")
    ] = False,
    steps: Annotated[int, _picture("Denoising steps.", min=1)] = 50,
    guidance: Annotated[float, _picture("Classifier-free guidance scale.", min=0)] = 7.5,
    seed: Annotated[
        int, _picture("Seed of the first picture; each next one adds 1.", min=0, max=MAX_SEED)
    ] = 0,
    num_images: Annotated[int, _picture("Pictures per prompt.", min=1)] = 1,
    negative_prompt: Annotated[str, _picture("Negative prompt.")] = "",
    prompt_syntax: Annotated[
        str, _picture("plain text; or weighted: (word:1.3), BREAK and long prompts.")
    ] = "plain",
    height: Annotated[int | None, _picture("Pixels; default: the experts' own.", min=8)] = None,
    width: Annotated[int | None, _picture("Pixels; default: the experts' own.", min=8)] = None,
    bias: Annotated[
        list[str] | None,
        _picture("Bias towards an expert: animals=+1.0 or animals@up=+1.0; repeatable."),
    ] = None,
    drafts: Drafts = None,
    no_drafts: NoDrafts = False,
    device: Annotated[str, _speed("auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, _speed(f"dtype of the experts: {', '.join(DTYPES)}.")] = "float32",
    speed: Annotated[
        str, _speed("exact, balanced or fast: how much steps reuse of earlier steps.")
    ] = "exact",
    plan: Annotated[Path | None, _speed("Plan of afa prune: experts to skip.")] = None,
    memory_budget: Annotated[
        str | None, _speed("Device memory to use, such as 8GB; places experts to fit.")
    ] = None,
    quantize: Annotated[str | None, _speed("Quantize experts to int8 or float8.")] = None,
    compile_blocks: Annotated[
        bool, _speed("Compile the blocks first; faster for many pictures.", name="--compile")
    ] = False,
    cuda_graphs: Annotated[
        bool, _speed("Run steps as CUDA graphs; faster for small models.", name="--cuda-graphs")
    ] = False,
    on_nonfinite: Annotated[
        str, _picture("At NaN or infinity in an expert: stop, or mask (skip) it there.")
    ] = "stop",
    run_check: RunCheck = True,
) -> None:
    """Generate pictures with a trained ensemble.

    Every PNG records its settings. --from-image reproduces it, bit for bit on the same machine.
    Several processes share the pictures: accelerate launch -m afa generate ..., or without a GPU:
    torchrun --nproc_per_node 2 -m afa generate ...

    [bold]Example[/bold]: afa generate zoo:ensemble "a fox on the left and a pizza on the right,
    blue background" --output pictures --guidance 3 --weights
    """
    from afa.machine.processes import Processes

    processes = Processes()
    if processes.is_main and from_image is not None:
        require_new_folder(output)
    elif processes.is_main:
        require_same_pictures(output, stems_of(prompts or [], seed, num_images))
    _require_one_of("--dtype", dtype, DTYPES)
    _require_one_of("--on-nonfinite", on_nonfinite, ON_NONFINITE)
    _require_one_of("--prompt-syntax", prompt_syntax, get_args(PromptSyntax))
    syntax = cast("PromptSyntax", prompt_syntax)
    words = [words_of_prompt(prompt, syntax) for prompt in prompts or []]
    words_of_prompt(negative_prompt, syntax)  # checked before anything is loaded

    from afa.ensemble.caching.settings import acceleration_of
    from afa.ensemble.steering import parse_bias

    acceleration = acceleration_of(speed)
    parsed_bias = parse_bias(bias or [])
    if from_image is not None:
        _require_nothing_else(context)
    elif ensemble is None or not prompts:
        raise AfaError(
            "AFA-CLI-007",
            "afa generate requires an ensemble and a prompt, or --from-image. For example: "
            'afa generate zoo:ensemble "a fox on the left and a pizza on the right" --output new',
        )

    import torch

    from afa.denoisers.kinds import denoiser_of
    from afa.drawing import pictures, recorded
    from afa.loading.ensemble_folder import ensemble_folder
    from afa.loading.planned import plan_of_ensemble
    from afa.loading.prompt_warnings import require_syntax
    from afa.loading.truncation import warnings_for
    from afa.loading.vocabulary import word_warnings
    from afa.reading import counted
    from afa.training.engine import pick_device

    quieten_loading()
    loading: dict[str, Any] = {"device": pick_device(processes.device or device)}
    if cuda_graphs:
        loading["cuda_graphs"] = True
    pixels = height * width if height and width else None
    if memory_budget is not None:
        loading |= {"memory_budget": memory_budget, "on_plan": say_plan}
        loading["pixels"] = pixels
    before: str | None = None
    if from_image is not None:
        pipeline, recipe, before = _reproduce(from_image, ensemble, weights, loading)
        planned = [(f"00-{slug(recipe.prompt)}-seed{recipe.seed}", recipe)]
    else:
        assert ensemble is not None, "checked above"
        assert prompts, "checked above"
        if quantize is not None:
            loading["quantize"] = quantize
        chosen = drafts_for(ensemble, drafts, words, without=no_drafts)
        if chosen is not None and drafts is None:
            options = {
                "--plan": plan is not None,
                "--cuda-graphs": cuda_graphs,
                "--on-nonfinite mask": on_nonfinite == "mask",
            }
            excluded = next((option for option, given in options.items() if given), None)
            if processes.is_main:
                say_own(chosen, ensemble, words, excluded)
            chosen = chosen if excluded is None else None
        if syntax == "weighted":
            require_syntax(plan_of_ensemble(ensemble, torch.float32, loading["device"]), syntax)
        # the estimate of memory does not know budgets and quantization
        if run_check and processes.is_main and not (quantize or memory_budget):
            require_sound(
                plan_of_ensemble(
                    ensemble,
                    getattr(torch, dtype),
                    loading["device"],
                    samples_each=2 if guidance > 1 else 1,
                    num_steps=steps * num_images * len(prompts or []),
                    pixels=pixels,
                    judge=None if chosen is None else chosen.judge,
                ),
                with_weights=False,
            )
        pipeline = pictures.prepare(
            ensemble,
            acceleration=acceleration,
            plan=plan,
            bias=parsed_bias,
            drafts=chosen,
            compiled=compile_blocks,
            on_nonfinite=on_nonfinite,
            torch_dtype=getattr(torch, dtype),
            **loading,
        )
        size = _picture_size(pipeline, height, width)
        recipe = recorded.picture_recipe(
            ensemble=ensemble,
            identity=pictures.identity_of(denoiser_of(pipeline)),
            prompt="",
            negative_prompt=negative_prompt,
            prompt_syntax=prompt_syntax,
            seed=seed,
            steps=steps,
            guidance=guidance,
            height=size[0],
            width=size[1],
            bias=parsed_bias,
            acceleration=acceleration.describe(),
            plan=denoiser_of(pipeline).plan,
            dtype=dtype,
            quantize=quantize,
            compiled=compile_blocks,
            on_nonfinite=on_nonfinite,
        )
        planned = _each(pipeline, recipe, prompts, num_images)
    if processes.is_main:
        texts = list(dict.fromkeys(each.prompt for _, each in planned))
        warnings = warnings_for(
            pipeline, texts, recipe.negative_prompt, recipe.guidance, recipe.prompt_syntax
        )
        fused = [each.words for _, each in planned if each.drafts is None]
        warnings += word_warnings(ensemble_folder(recipe.ensemble), fused)
        say_warnings(warnings)
    processes.wait()  # the main process checks that the folder is new before any one writes
    hashed = draw_into(pipeline, list(processes.share(planned)), output, weights, processes.is_main)
    processes.wait()
    if not processes.is_main:
        return
    say_masked(denoiser_of(pipeline))
    say(f"{counted(len(planned), 'picture')} in {output}")
    if before is not None:
        say(
            "The picture is identical, bit for bit."
            if before == hashed
            else "The pixels differ. Another machine, number of threads or version of torch rounds "
            "differently."
        )


def _require_one_of(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise AfaError("AFA-CLI-008", f"{option} must be one of {', '.join(known)}; got '{given}'.")


def _reproduce(
    picture: Path, ensemble: str | None, weights: bool, loading: dict[str, Any]
) -> tuple[DiffusionPipeline, PictureRecipe, str]:
    """The pipeline that draws a picture again, its recipe, and the hash of its pixels."""
    from afa.drawing import pictures, recorded
    from afa.drawing.contenders import ENSEMBLE

    made = recorded.read_picture(picture)
    recipe = made.recipe.model_copy(update={"ensemble": ensemble or made.recipe.ensemble})
    if weights and recipe.drawn_by != ENSEMBLE:
        raise AfaError(
            "AFA-CLI-009",
            f"'{picture}' has no fusion weights: {recipe.drawn_by} drew it. Remove --weights.",
        )
    return pictures.prepare_again(recipe, **loading), recipe, made.pixels


def _each(
    pipeline: DiffusionPipeline, recipe: PictureRecipe, prompts: Sequence[str], num_images: int
) -> list[tuple[str, PictureRecipe]]:
    """The stem of each picture's file name, and its recipe."""
    from afa.drawing import pictures, recorded

    planned = itertools.product(prompts, range(recipe.seed, recipe.seed + num_images))
    recipes = (
        recorded.picture_recipe(**{**dict(recipe), "prompt": prompt, "seed": seed})
        for prompt, seed in planned
    )
    recipes = (each.model_copy(update=pictures.drafts_of(pipeline, each.words)) for each in recipes)
    return list(zip(stems_of(prompts, recipe.seed, num_images), recipes, strict=True))


def _require_nothing_else(context: typer.Context) -> None:
    """Raise AfaError if an option is given whose value comes from the picture."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in BESIDE_A_PICTURE and source is not None and source.name == "COMMANDLINE":
            raise AfaError(
                "AFA-CLI-012",
                f"--from-image takes all settings from the picture. Remove {parameter.opts[0]}.",
            )


def say_masked(denoiser: Any) -> None:
    """Warn of experts that were skipped at a site, and in how many steps."""
    for (expert, site), count in sorted(getattr(denoiser, "masked", {}).items()):
        say(
            f"warning: '{expert}' gave non-finite values (NaN or infinity) at '{site}' in {count} "
            "steps, and was skipped there."
        )


def say_plan(plan: MemoryPlan) -> None:
    """Print where a memory budget places the experts."""
    for line in plan.lines():
        say(line)


def _picture_size(
    pipeline: DiffusionPipeline, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width in pixels; defaults to the experts' own.

    Raises:
        AfaError: if one is not a multiple of the experts' smallest step.
    """
    from afa.loading.task import native_resolution, size_multiple

    native, multiple = native_resolution(pipeline), size_multiple(pipeline)
    for name, size in (("--height", height), ("--width", width)):
        if size is not None and size % multiple:
            raise AfaError(
                "AFA-CLI-013", f"{name} must be a multiple of {multiple} pixels; got {size}."
            )
    # diffusers ignores one without the other
    return height or native[0], width or native[1]
