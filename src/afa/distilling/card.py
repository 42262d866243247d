"""The record of a distillation, and the model card that is written from it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from afa.loading.expert_source import ExpertSource
from afa.provenance import __version__
from afa.training.continuing import digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from afa.distilling.passes import Pass
    from afa.distilling.recipe import DistillRecipe
    from afa.distilling.teacher import Teacher

CARD = "README.md"


def record_of(
    recipe: DistillRecipe,
    teacher: Teacher,
    passes: Sequence[Pass],
    hashes: Sequence[str],
    losses: Sequence[tuple[int, float]],
) -> dict[str, Any]:
    """Return what a student was made from and how, without times and paths of this machine.

    Args:
        recipe: of the distillation.
        teacher: the teacher.
        passes: the recorded sources.
        hashes: of the student's initial weights and of the autoencoder.
        losses: steps and their validation losses.
    """
    init = recipe.student.init
    return {
        "format": "afa-distillation",
        "version": 1,
        "afa_version": __version__,
        "teacher": {
            "kind": _kind(recipe),
            "experts": [
                {**_named(manifest.source), "sha256": manifest.sha256}
                for manifest in teacher.manifests()
            ],
            "identity": digest(teacher.identity()),
        },
        "student": {
            **recipe.student.model_dump(mode="json", exclude={"init"}),
            "init": _named(init) if isinstance(init, ExpertSource) else _as_json(init),
            "initial_weights": list(hashes),
        },
        "recorded": {each.name: {"number": each.num_items, **each.inputs} for each in passes},
        "guidance": _as_json(recipe.guidance),
        "features": recipe.features and recipe.features.model_dump(),
        "training": recipe.training.model_dump(
            mode="json",
            exclude={"device", "trackers", "log_every", "checkpoint_every", "keep_checkpoints"},
        ),
        "validation_loss": [{"step": step, "loss": loss} for step, loss in losses],
    }


def _as_json(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump(mode="json")


def _kind(recipe: DistillRecipe) -> str:
    named = recipe.teacher
    return next(
        key for key in ("model", "ensemble", "merge", "fusion") if getattr(named, key) is not None
    )


def _named(source: ExpertSource) -> dict[str, Any]:
    """Return a source with the last part of its path: other machines have other folders."""
    found = {key: value for key, value in asdict(source).items() if value is not None}
    for key in ("source", "lora", "config"):
        if key in found and not str(found[key]).startswith("zoo:"):
            found[key] = str(found[key]).rstrip("/").rpartition("/")[2]
    return found


def card_of(record: dict[str, Any], folder: Path, files: Sequence[Path]) -> str:
    """Return the text of a model card in the format of the Hugging Face hub.

    Args:
        record: of `record_of`.
        folder: of the student.
        files: LoRA files; empty for a complete pipeline.
    """
    names = [expert["source"] for expert in record["teacher"]["experts"]]
    training, student = record["training"], record["student"]
    tags = ["text-to-image", "diffusers", "distillation", *(["lora"] if files else [])]
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {folder.name}",
        "",
        _what(record, files),
        "",
        "## How it was made",
        "",
        f"- Teacher: {record['teacher']['kind']} of {', '.join(f'`{name}`' for name in names)}. "
        "Hashes of all weights are in `distill.json`.",
        f"- Initial weights: {_init(student['init'])}.",
        *(f"- Recorded: {_recorded(name, each)}." for name, each in record["recorded"].items()),
        f"- Training: {training['num_steps']:,} steps of "
        f"{training['batch_size'] * training['gradient_accumulation_steps']} predictions, AdamW, "
        f"learning rate {training['learning_rate']:g} ({training['learning_rate_schedule']}), "
        f"seed {training['seed']}. The loss is the mean squared error of the teacher's "
        f"{'guided ' if isinstance(record['guidance'], dict) else ''}prediction.",
        *(f"- {line}" for line in record.get("history", [])),
        f"- Made with afa {record['afa_version']}, `afa distill`.",
        "",
        "## How it is used",
        "",
        *_use(record, files),
        "",
        "## How it compares",
        "",
        *_compares(record),
        "",
        "The student repeats the teacher's errors, biases and licences: it may only be used as all "
        "of the teacher's models may.",
        "",
    ]
    return "\n".join(lines)


def _what(record: dict[str, Any], files: Sequence[Path]) -> str:
    count = len(record["teacher"]["experts"])
    what = "An ordinary model"
    if files:
        what = f"A LoRA of rank {record['student']['rank'] or 16}"
    many = f"an ensemble of {count} models" if count > 1 else "one model"
    return f"{what} that makes the predictions of {many}, at the cost of one model."


def _init(init: Any) -> str:
    if isinstance(init, str):
        return "the mean of the teacher's experts"
    return f"`{init.get('source') or init.get('expert')}`"


def _recorded(name: str, each: dict[str, Any]) -> str:
    if name == "pictures":
        return f"{each['number']:,} noised pictures"
    steps = ", ".join(map(str, each["num_steps"]))
    guidance = each["sampling"]["guidance"]
    return f"{each['number']:,} pictures drawn in {steps} steps with guidance {guidance:g}"


def _use(record: dict[str, Any], files: Sequence[Path]) -> list[str]:
    baked = isinstance(record["guidance"], dict)
    lines = []
    if files:
        base = _init(record["student"]["init"])
        lines += [f"Load `{files[0].name}` with strength 1 on {base}."]
        if len(files) > 1:
            lines += [f"`{files[1].name}` is the same for diffusers; ComfyUI ignores a part of it."]
    else:
        lines += [
            "Load this folder with `DiffusionPipeline.from_pretrained`, or write one file for "
            "ComfyUI and the web UIs: `afa export FOLDER --output student.safetensors`."
        ]
    if baked:
        scale = record["guidance"]["bake_in"]
        lines += [
            "",
            f"Guidance of {scale:g} is part of its prediction: **draw with "
            "guidance (CFG) 1**, which takes one call a step. Negative prompts have no effect.",
        ]
    return lines


def _compares(record: dict[str, Any]) -> list[str]:
    losses = record["validation_loss"]
    if not losses:
        return [
            "It was not validated. Compare it with its teacher by `afa evaluate`, and add the "
            "table here."
        ]
    first, last = losses[0], losses[-1]
    return [
        "Mean squared difference from the teacher's prediction, on pictures that it was not "
        "trained on:",
        "",
        "| steps | loss |",
        "|---|---|",
        *(f"| {each['step']:,} | {each['loss']:.5f} |" for each in losses),
        "",
        f"After {last['step']:,} steps it is {last['loss'] / first['loss']:.2f} times that after "
        f"{first['step']:,}. Compare pictures by `afa evaluate`, and add the table here.",
    ]
