"""`afa generate`: draw pictures of prompts, or reproduce a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from afa.cli.check import RunCheck, require_sound
from afa.cli.console import require_new_folder, say, say_warnings
from afa.cli.drafts import Drafts, NoDrafts, drafts_for, say_own
from afa.cli.folder import draw_into, require_same_pictures, stems_of
from afa.cli.prompts_file import wanted_by
from afa.cli.recipes import (
    fields_of_inputs,
    most_pixels,
    prompt_warnings,
    recipes_of,
    reproduced,
    wanted_by_picture,
)
from afa.cli.trust import OPTIONS as TRUST_OPTIONS
from afa.cli.wanted import Wanted, is_random, parse_seed, size_of_options
from afa.ensemble.prompt_syntax import PromptSyntax, words_of_prompt
from afa.errors import AfaError
from afa.files import slug
from afa.machine.quiet import quieten_loading

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        typer.Option(
            help="PNG of afa to reproduce from its recorded settings; or a picture of A1111 whose "
            "settings are used."
        ),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also draw the fusion weights.")
    ] = False,
    steps: Annotated[int, _picture("Denoising steps.", min=1)] = 50,
    guidance: Annotated[float, _picture("Classifier-free guidance scale.", min=0)] = 7.5,
    seed: Annotated[
        str, _picture("Seed of the first picture, or random; each next one adds 1.")
    ] = "0",
    num_images: Annotated[int, _picture("Pictures per prompt.", min=1)] = 1,
    negative_prompt: Annotated[str, _picture("Negative prompt.")] = "",
    prompt_syntax: Annotated[
        str, _picture("plain text; or weighted: (word:1.3), BREAK and long prompts.")
    ] = "plain",
    scheduler: Annotated[
        str | None,
        _picture("euler_a, dpmpp_2m_karras, unipc, ddim, ...; default: the experts' own."),
    ] = None,
    size: Annotated[str | None, _picture("Width and height, such as 512x768.")] = None,
    height: Annotated[int | None, _picture("Pixels; default: the experts' own.", min=8)] = None,
    width: Annotated[int | None, _picture("Pixels; default: the experts' own.", min=8)] = None,
    prompts_file: Annotated[
        Path | None,
        _picture("File of prompts, one per line, with settings as in A1111 or kohya's scripts."),
    ] = None,
    image: Annotated[Path | None, _picture("Picture to start from (image to image).")] = None,
    mask: Annotated[
        Path | None, _picture("With --image: white is drawn again, black is kept.")
    ] = None,
    strength: Annotated[
        float | None, _picture("With --image: from 0 (keep it) to 1; default: 0.8.")
    ] = None,
    hires: Annotated[
        float | None, _picture("Draw again, enlarged by this factor, such as 1.5.")
    ] = None,
    hires_strength: Annotated[
        float | None, _picture("With --hires: strength of that pass; default: 0.5.")
    ] = None,
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
    _require_one_of("--dtype", dtype, DTYPES)
    _require_one_of("--on-nonfinite", on_nonfinite, ON_NONFINITE)
    _require_one_of("--prompt-syntax", prompt_syntax, get_args(PromptSyntax))
    syntax = cast("PromptSyntax", prompt_syntax)

    from afa.denoisers.scheduler_names import canonical_name
    from afa.ensemble.caching.settings import acceleration_of
    from afa.ensemble.steering import parse_bias

    acceleration = acceleration_of(speed)
    parsed_bias = parse_bias(bias or [])
    rows, columns = size_of_options(size, height, width)
    defaults = Wanted(
        prompt="",
        negative_prompt=negative_prompt,
        seed=parse_seed(seed, room=num_images, num_processes=processes.count),
        steps=steps,
        guidance=guidance,
        height=rows,
        width=columns,
        scheduler=scheduler and canonical_name(scheduler),
    )
    wanted = wanted_by(defaults, prompts, prompts_file, processes.count)
    drawn_from = fields_of_inputs(image, mask, strength, hires, hires_strength)
    if from_image is not None:
        found = wanted_by_picture(
            from_image, defaults, ensemble, _given(context), syntax, is_main=processes.is_main
        )
        _require_nothing_else(context, is_foreign=found is not None)
        if found is not None:
            wanted, from_image = [found], None
    elif ensemble is None or not wanted:
        raise AfaError(
            "AFA-CLI-007",
            "afa generate requires an ensemble and a prompt, or --from-image. For example: "
            'afa generate zoo:ensemble "a fox on the left and a pizza on the right" --output new',
        )
    # all are read before anything is loaded
    words = [words_of_prompt(each.prompt, syntax) for each in wanted]
    for each in wanted:
        words_of_prompt(each.negative_prompt, syntax)
    if processes.is_main and from_image is not None:
        require_new_folder(output)
    elif processes.is_main:
        require_same_pictures(output, stems_of(wanted, num_images))
        if is_random(seed):
            say(f"seed {defaults.seed}")

    import torch

    from afa.denoisers.kinds import denoiser_of
    from afa.drawing import pictures
    from afa.loading.planned import plan_of_ensemble
    from afa.loading.prompt_warnings import require_syntax
    from afa.reading import counted
    from afa.training.engine import pick_device

    quieten_loading()
    loading: dict[str, Any] = {"device": pick_device(processes.device or device)}
    if cuda_graphs:
        loading["cuda_graphs"] = True
    pixels = most_pixels(wanted, drawn_from)
    if memory_budget is not None:
        loading |= {"memory_budget": memory_budget, "on_plan": say_plan}
        loading["pixels"] = pixels
    before: str | None = None
    if from_image is not None:
        pipeline, recipe, before = reproduced(from_image, ensemble, weights, loading)
        planned = [(f"00-{slug(recipe.prompt)}-seed{recipe.seed}", recipe)]
    else:
        assert ensemble is not None, "checked above"
        if quantize is not None:
            loading["quantize"] = quantize
        chosen = drafts_for(ensemble, drafts, words, without=no_drafts)
        if chosen is not None and drafts is None:
            options = {
                "--plan": plan is not None,
                "--cuda-graphs": cuda_graphs,
                "--on-nonfinite mask": on_nonfinite == "mask",
                "--image": image is not None,
                "--hires": hires is not None,
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
                    samples_each=2 if any(each.guidance > 1 for each in wanted) else 1,
                    num_steps=num_images * sum(each.steps for each in wanted),
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
        shared = {
            "ensemble": ensemble,
            "prompt_syntax": syntax,
            "identity": pictures.identity_of(denoiser_of(pipeline)),
            "bias": parsed_bias,
            "acceleration": acceleration.describe(),
            "plan": denoiser_of(pipeline).plan,
            "dtype": dtype,
            "quantize": quantize,
            "compiled": compile_blocks,
            "on_nonfinite": on_nonfinite,
            **drawn_from,
        }
        planned = recipes_of(pipeline, wanted, num_images, shared)
    if processes.is_main:
        say_warnings(prompt_warnings(pipeline, planned))
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


def _given(context: typer.Context) -> list[str]:
    """The names of the parameters that the user has passed."""
    named = [parameter.name or "" for parameter in context.command.params]
    sources = {name: context.get_parameter_source(name) for name in named}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def _require_nothing_else(context: typer.Context, *, is_foreign: bool) -> None:
    """Raise AfaError if an option is given whose value comes from the picture."""
    refused = set(_given(context))
    # what a picture of another program says can be replaced by options, but not its prompt
    refused &= {"prompts", "prompts_file"} if is_foreign else refused - {*BESIDE_A_PICTURE}
    for parameter in context.command.params:
        if parameter.name in refused:
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
