"""`afa demo`: an ensemble is trained on the emoji scenes in minutes, and compared.

Three experts know one domain of objects each. The prompts ask for two domains in one picture, in
pairs that no training set held. The experts, their base, simple ways to combine them and the
ensemble draw the same prompts from the same noise, and one judge counts the right objects on the
right sides.

No other row is trained on the ensemble's scenes, and the ensemble's schedule was chosen on these
prompts: docs/results.md has more rows, and the limits of both comparisons.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from afa.denoisers.kinds import denoiser_of
from afa.drawing.plots import comparison, filmstrip
from afa.ensemble.recording import record_weights
from afa.evaluation import EvaluateRecipe, evaluate
from afa.evaluation.recipe import slug
from afa.evaluation.work import open_pictures
from afa.files import read_json
from afa.loading.ensemble_folder import save_ensemble
from afa.loading.pipeline import load_pipeline
from afa.statistics import Interval, wilson
from afa.studies.zoo_build.evaluate import GUIDANCE_SCALE, draw_pictures
from afa.training import SceneImages, TrainingRecipe, seeded, train_aggregators
from afa.zoo import EXPERTS
from afa.zoo.models import AGGREGATOR
from afa.zoo.scenes import evaluation_prompts, parse_caption

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from diffusers import DiffusionPipeline


#: the trained ensemble at the speeds that are shown; all other rows are its rivals
OURS = {"AFA": "exact", "AFA, fast": "fast"}
_SCORES = ("both", "objects", "left", "right")


@dataclass(frozen=True)
class DemoSettings:
    """How long the demo trains and how much it draws; the default takes minutes on two cores."""

    num_train_steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3
    num_prompts: int = 96
    num_steps: int = 12
    guidance_scale: float = GUIDANCE_SCALE
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """How far the demo is: so much of one stage, and what to say about it."""

    stage: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One way of combining the experts, judged.

    Attributes:
        method: its name.
        both: share of pictures with the right object on the right side, twice.
        objects: share of pictures with both objects, in any order.
        left: share of pictures with the right object on that side; likewise `right`.
        seconds_per_image: wall time of drawing.
        pictures: the files, in the order of the prompts.
    """

    method: str
    both: Interval
    objects: Interval
    left: Interval
    right: Interval
    seconds_per_image: float
    pictures: Sequence[Path] = ()

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in `report.json`."""
        return {key: value for key, value in asdict(self).items() if key != "pictures"}


def run_demo(output: Path, settings: DemoSettings | None = None) -> Generator[Progress, None, None]:
    """Train an ensemble of the zoo's experts, compare it with its rivals, write the report.

    `output` gets `report.json`, `report.md`, `pictures.png`, `weights.png`, the `ensemble`, the
    `comparison` of `afa evaluate` and its recipe, all at once at the end; a run that fails or is
    stopped leaves nothing behind.

    Args:
        output: a new or empty folder.
        settings: how much of everything.
    """
    settings = settings or DemoSettings()
    output = output.resolve()
    started = time.perf_counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        with seeded(settings.seed):
            pipeline = load_pipeline([f"zoo:{name}" for name in EXPERTS], AGGREGATOR)
        train_started = time.perf_counter()
        yield from _train(pipeline, settings)
        train_seconds = time.perf_counter() - train_started
        save_ensemble(pipeline, partial / "ensemble")

        compared, ensemble = partial / "comparison", str(partial / "ensemble")
        yield from _compare(comparison_recipe(settings, ensemble), compared)
        # the control is of the best expert, which is known now
        best = max(read_rows(compared)[: len(EXPERTS)], key=lambda row: row.both.mean).method
        yield from _compare(comparison_recipe(settings, ensemble, best), compared)

        yield Progress("report", 0, 1)
        recipe = comparison_recipe(settings, "ensemble", best)
        (partial / "comparison.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        rows = sorted(read_rows(compared), key=lambda row: row.both.mean)
        report = {
            "settings": asdict(settings),
            "aggregator_parameters": sum(p.numel() for p in pipeline.unet.aggregators.parameters()),
            "train_seconds": train_seconds,
            "total_seconds": time.perf_counter() - started,
            "rows": [row.as_json() for row in rows],
        }
        (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (partial / "report.md").write_text(report_text(rows, settings, train_seconds))
        # the first prompts, whatever came of them
        prompts = evaluation_prompts(settings.num_prompts)
        draw_comparison(rows, prompts[:8], partial / "pictures.png")
        _draw_maps(pipeline, prompts[:4], settings, partial / "weights.png")
        partial.chmod(0o755)
        os.replace(partial, output)
        yield Progress("report", 1, 1)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _train(pipeline: DiffusionPipeline, settings: DemoSettings) -> Iterator[Progress]:
    recipe = TrainingRecipe(
        num_steps=settings.num_train_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        num_warmup_steps=min(50, settings.num_train_steps),
        learning_rate_schedule="cosine",  # or a run this short ends wherever its last steps led
        seed=settings.seed,
    )
    # any pair that is not held out; what a user would have is pictures of everything, too
    data = SceneImages(100_000, seed=settings.seed + 3)
    loss = None
    for step in train_aggregators(pipeline, data, recipe):
        loss = step.loss if loss is None else loss + 0.05 * (step.loss - loss)
        yield Progress("train", step.step, step.num_steps, f"loss {loss:.4f}")


# -- the comparison ---------------------------------------------------------------------------


def comparison_recipe(
    settings: DemoSettings, ensemble: str, best: str | None = None
) -> dict[str, Any]:
    """What `afa evaluate` compares: the experts, their base, ways to combine them, the ensemble.

    Args:
        settings: how much is drawn.
        ensemble: the trained one, a folder.
        best: the expert that is drawn alone in the ensemble's shell, as a control.
    """
    ways: dict[str, dict[str, Any]] = {
        **{name: {"model": f"zoo:{name}"} for name in (*EXPERTS, "base")},
        "weight merge": {"merge": {"method": "weighted"}},
        "noise mean": {"fusion": {"rule": "noise_mean"}},
        "feature mean": {"fusion": {"rule": "feature_mean"}},
        **{name: {"ensemble": ensemble, "acceleration": speed} for name, speed in OURS.items()},
    }
    if best is not None:
        fusion = {"rule": "shell", "expert": EXPERTS.index(best)}
        ways[f"{best} in the ensemble's shell"] = {"fusion": fusion}
    return {
        "experts": [f"zoo:{name}" for name in EXPERTS],
        "prompts": {"zoo": {"kinds": {"mixed": settings.num_prompts}}},
        "methods": [{"name": name, **way} for name, way in ways.items()],
        "sampling": {
            "num_steps": settings.num_steps,
            "guidance": settings.guidance_scale,
            "seeds": [settings.seed],
            "batch_size": 32,
        },
        "metrics": ["scenes"],
        "subject": next(iter(OURS)),
    }


def _compare(recipe: dict[str, Any], folder: Path) -> Iterator[Progress]:
    for event in evaluate(EvaluateRecipe.model_validate(recipe), folder):
        yield Progress(event.stage, event.done, event.total, event.note)


def read_rows(folder: Path) -> list[Row]:
    """The rows of a finished comparison, in the order of its recipe."""
    report = read_json(folder / "report.json")
    ((group, count),) = report["groups"].items()
    rows = []
    for row in report["rows"]:
        scores = row["groups"][group]["scores"]
        shares = {name: wilson(scores[name]["mean"], count) for name in _SCORES}
        seconds = row["measured"]["seconds_per_image"]
        places = (folder / "methods" / slug(row["method"])).rglob("*.png")
        rows.append(
            Row(row["method"], **shares, seconds_per_image=seconds, pictures=sorted(places))
        )
    return rows


# -- the report -------------------------------------------------------------------------------


def rivals_reached(rows: Sequence[Row], method: str = "AFA") -> list[str]:
    """The rivals whose `both` interval is not wholly below the method's own."""
    low = next(row.both.low for row in rows if row.method == method)
    return [row.method for row in rows if row.method not in OURS and row.both.high >= low]


def verdict(rows: Sequence[Row]) -> str:
    """Is AFA above the other rows, beyond chance, and what that does not show."""
    reached = rivals_reached(rows)
    if not reached:
        return (
            "AFA is above every other row of this table, with 95 % intervals that do not overlap. "
            "This does not show that it is the best use of the experts or of the training: no "
            "other row was trained on AFA's scenes, and AFA's schedule was chosen on these "
            "prompts. See the limits in docs/results.md."
        )
    return f"AFA is not clearly above: {', '.join(reached)}."


def report_text(rows: Sequence[Row], settings: DemoSettings, train_seconds: float) -> str:
    """The report as Markdown."""
    lines = [
        "# Emoji scenes: three experts, one picture",
        "",
        f"{settings.num_prompts} prompts with objects of two domains, in pairs that no model was "
        f"trained on; {settings.num_steps} DDIM steps, guidance {settings.guidance_scale:g}, seed "
        f"{settings.seed}, the same noise for every method. The aggregators were trained for "
        f"{settings.num_train_steps} steps of {settings.batch_size} pictures "
        f"({train_seconds:.0f} s); the experts were not changed.",
        "",
        "`both`: the right object on the right side, twice. `objects`: both are there, in any "
        "order. Brackets are 95 % intervals (Wilson).",
        "",
        "| method | both | objects | left | right | seconds per image |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.method} | {row.both} | {row.objects} | {row.left} | {row.right} "
            f"| {row.seconds_per_image:.2f} |"
        )
    return "\n".join([*lines, "", verdict(rows), ""])


def draw_comparison(rows: Sequence[Row], prompts: Sequence[str], path: Path) -> None:
    """Draw methods (rows) by prompts (columns), each method labelled with its `both`.

    Args:
        rows: judged methods, in the order to draw.
        prompts: the captions above the columns; pictures are the first of every row.
        path: PNG or SVG, by its suffix.
    """
    labels = {row.method: f"{row.method}: {row.both.mean:.0%} right" for row in rows}
    comparison(
        {labels[row.method]: list(open_pictures(row.pictures[: len(prompts)])) for row in rows},
        [_title(prompt) for prompt in prompts],
        path,
        bold=[labels[row.method] for row in rows if row.method in OURS],
    )


def _title(prompt: str) -> str:
    scene = parse_caption(prompt)
    return f"{scene.left} | {scene.right} ({scene.background})"


def _draw_maps(
    pipeline: DiffusionPipeline, prompts: Sequence[str], settings: DemoSettings, path: Path
) -> None:
    """Draw the fusion weights of the first prompts."""
    with record_weights(denoiser_of(pipeline)) as record:
        pictures = draw_pictures(
            pipeline,
            prompts,
            seed=settings.seed,
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
        )
    filmstrip(record, pictures, path, experts=EXPERTS, titles=[_title(p) for p in prompts])
