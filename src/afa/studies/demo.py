"""`afa demo`: train an ensemble on emoji scenes in minutes, and compare it with baselines.

Each of three experts knows one domain of objects. The prompts combine objects of two domains, in
pairs that are in no training set. The experts, their base, simple baselines and the ensemble draw
the same prompts from the same noise. A classifier counts correct objects on the correct sides.

No baseline is trained on the ensemble's scenes, and the ensemble's learning rate schedule was
chosen on these prompts. docs/results.md compares more methods, on pairs of objects of their own.
"""

from __future__ import annotations

import json
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
from afa.evaluation import EvaluateProgress, EvaluateRecipe, evaluate
from afa.evaluation.recipe import slug
from afa.evaluation.work import open_pictures
from afa.files import put_in_place, read_json, write_atomic
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


#: rows of the trained ensemble, with their speeds; all other rows are baselines
OURS = {"AFA": "exact", "AFA, fast": "fast"}
_SCORES = ("both", "objects", "left", "right")


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo; the default takes minutes on two cores."""

    num_train_steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3
    num_prompts: int = 96
    num_steps: int = 12
    guidance_scale: float = GUIDANCE_SCALE
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """The scores of one method.

    Attributes:
        method: name of the method.
        both: fraction of pictures with the correct objects on both sides.
        objects: fraction of pictures with both objects, in any order.
        left: fraction of pictures with the correct object on the left.
        right: fraction of pictures with the correct object on the right.
        seconds_per_image: wall time per picture.
        pictures: files of the pictures, in the order of the prompts.
    """

    method: str
    both: Interval
    objects: Interval
    left: Interval
    right: Interval
    seconds_per_image: float
    pictures: Sequence[Path] = ()

    def as_json(self) -> dict[str, Any]:
        """The row in `report.json`."""
        return {key: value for key, value in asdict(self).items() if key != "pictures"}


def run_demo(
    output: Path, settings: DemoSettings | None = None
) -> Generator[EvaluateProgress, None, None]:
    """Train an ensemble of the zoo's experts, compare it with baselines, and write the report.

    Writes `report.json`, `report.md`, `pictures.png`, `weights.png`, the `ensemble`, the
    `comparison` of `afa evaluate` and its recipe to `output` at the end. A run that fails or is
    interrupted leaves no files.

    Args:
        output: a new or empty folder.
        settings: settings of the demo; None uses the defaults.

    Yields:
        The progress.
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
        recipe = comparison_recipe(settings, ensemble)
        yield from evaluate(EvaluateRecipe.model_validate(recipe), compared)
        # the control row needs the best expert, which is known only now
        best = max(read_rows(compared)[: len(EXPERTS)], key=lambda row: row.both.mean).method
        recipe = comparison_recipe(settings, ensemble, best)
        yield from evaluate(EvaluateRecipe.model_validate(recipe), compared)

        yield EvaluateProgress("report", 0, 1)
        recipe = comparison_recipe(settings, "ensemble", best)
        write_atomic(partial / "comparison.yaml", yaml.safe_dump(recipe, sort_keys=False))
        rows = sorted(read_rows(compared), key=lambda row: row.both.mean)
        report = {
            "settings": asdict(settings),
            "aggregator_parameters": sum(p.numel() for p in pipeline.unet.aggregators.parameters()),
            "train_seconds": train_seconds,
            "total_seconds": time.perf_counter() - started,
            "rows": [row.as_json() for row in rows],
        }
        write_atomic(partial / "report.json", json.dumps(report, indent=2) + "\n")
        write_atomic(partial / "report.md", report_text(rows, settings, train_seconds))
        # always the first prompts, to avoid selecting good pictures
        prompts = evaluation_prompts(settings.num_prompts)
        draw_comparison(rows, prompts[:8], partial / "pictures.png")
        _draw_maps(pipeline, prompts[:4], settings, partial / "weights.png")
        partial.chmod(0o755)
        put_in_place(partial, output)
        yield EvaluateProgress("report", 1, 1)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _train(pipeline: DiffusionPipeline, settings: DemoSettings) -> Iterator[EvaluateProgress]:
    recipe = TrainingRecipe(
        num_steps=settings.num_train_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        num_warmup_steps=min(50, settings.num_train_steps),
        learning_rate_schedule="cosine",  # a short run with a constant rate ends at a noisy point
        seed=settings.seed,
    )
    # all pairs that are not held out
    data = SceneImages(100_000, seed=settings.seed + 3)
    loss = None
    for step in train_aggregators(pipeline, data, recipe):
        loss = step.loss if loss is None else loss + 0.05 * (step.loss - loss)
        yield EvaluateProgress("train", step.step, step.num_steps, f"loss {loss:.4f}")


# -- the comparison ---------------------------------------------------------------------------


def comparison_recipe(
    settings: DemoSettings, ensemble: str, best: str | None = None
) -> dict[str, Any]:
    """The recipe of `afa evaluate`: the experts, their base, simple baselines and the ensemble.

    Args:
        settings: settings of the demo.
        ensemble: folder of the trained ensemble.
        best: adds this expert alone as an ensemble (rule `shell`), as a control.
    """
    methods: dict[str, dict[str, Any]] = {
        **{name: {"model": f"zoo:{name}"} for name in (*EXPERTS, "base")},
        "weight merge": {"merge": {"method": "weighted"}},
        "noise mean": {"fusion": {"rule": "noise_mean"}},
        "feature mean": {"fusion": {"rule": "feature_mean"}},
        **{name: {"ensemble": ensemble, "acceleration": speed} for name, speed in OURS.items()},
    }
    if best is not None:
        fusion = {"rule": "shell", "expert": EXPERTS.index(best)}
        methods[f"{best} in the ensemble's shell"] = {"fusion": fusion}
    return {
        "experts": [f"zoo:{name}" for name in EXPERTS],
        "prompts": {"zoo": {"kinds": {"mixed": settings.num_prompts}}},
        "methods": [{"name": name, **method} for name, method in methods.items()],
        "sampling": {
            "num_steps": settings.num_steps,
            "guidance": settings.guidance_scale,
            "seeds": [settings.seed],
            "batch_size": 32,
        },
        "metrics": ["scenes"],
        "subject": next(iter(OURS)),
    }


def read_rows(folder: Path) -> list[Row]:
    """The rows of a finished comparison, in the order of its recipe."""
    report = read_json(folder / "report.json")
    ((group, count),) = report["groups"].items()
    rows = []
    for row in report["rows"]:
        scores = row["groups"][group]["scores"]
        shares = {name: wilson(scores[name]["mean"], count) for name in _SCORES}
        seconds = row["measured"]["seconds_per_image"]
        files = (folder / "methods" / slug(row["method"])).rglob("*.png")
        rows.append(Row(row["method"], **shares, seconds_per_image=seconds, pictures=sorted(files)))
    return rows


# -- the report -------------------------------------------------------------------------------


def rivals_reached(rows: Sequence[Row]) -> list[str]:
    """The baselines whose `both` interval is not completely below that of AFA."""
    low = next(row.both.low for row in rows if row.method == "AFA")
    return [row.method for row in rows if row.method not in OURS and row.both.high >= low]


def verdict(rows: Sequence[Row]) -> str:
    """State whether AFA is clearly above all baselines, and what this does not show."""
    reached = rivals_reached(rows)
    if not reached:
        return (
            "AFA is above every baseline of this table, and the 95 % intervals do not overlap. "
            "This does not show that AFA is the best use of the experts or of the training: no "
            "baseline was trained on AFA's scenes, and AFA's learning rate schedule was chosen "
            "on these prompts. docs/results.md compares with rows that were."
        )
    return f"AFA is not clearly above: {', '.join(reached)}."


def report_text(rows: Sequence[Row], settings: DemoSettings, train_seconds: float) -> str:
    """The report as Markdown."""
    lines = [
        "# Emoji scenes: three experts, one picture",
        "",
        f"{settings.num_prompts} prompts with objects of two domains, in pairs that no model was "
        f"trained on; {settings.num_steps} DDIM steps, guidance {settings.guidance_scale:g}, seed "
        f"{settings.seed}; all methods start from the same noise. The aggregators were trained for "
        f"{settings.num_train_steps} steps of {settings.batch_size} pictures "
        f"({train_seconds:.0f} s); the experts stayed frozen.",
        "",
        "`both`: the correct objects on both sides. `objects`: both objects, in any order. "
        "Brackets are 95 % intervals (Wilson).",
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
        rows: methods from top to bottom.
        prompts: the first prompts, which become the captions of the columns.
        path: a PNG or SVG file.
    """
    labels = {row.method: f"{row.method}: {row.both.mean:.0%} correct" for row in rows}
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
