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
from typing import TYPE_CHECKING

from diffusers import StableDiffusionPipeline

from afa.aggregators.fusion import feature_mean, noise_mean, shell
from afa.drawing.plots import comparison, filmstrip
from afa.ensemble.accelerate import accelerate
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.recording import record_weights
from afa.loading.ensemble_folder import save_ensemble
from afa.loading.pipeline import load_pipeline
from afa.merging.in_memory import weighted_merge
from afa.studies.zoo_build.evaluate import GUIDANCE_SCALE, Score, draw_pictures, evaluate
from afa.training import SceneImages, TrainingRecipe, seeded, train_aggregators
from afa.zoo import EXPERTS, expert_folder
from afa.zoo.judges import load_classifier
from afa.zoo.models import AGGREGATOR
from afa.zoo.scenes import evaluation_prompts, parse_caption

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from PIL import Image


#: the trained ensemble at the speeds that are shown; all other rows are its rivals
OURS = {"AFA": "exact", "AFA, fast": "fast"}


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
    """One way of combining the experts, judged."""

    method: str
    score: Score
    pictures: Sequence[Image.Image]

    def as_json(self) -> dict[str, object]:
        """The row as it stands in `report.json`."""
        return {"method": self.method, **asdict(self.score)}


def run_demo(
    output: Path, settings: DemoSettings | None = None
) -> Generator[Progress | Row, None, None]:
    """Train an ensemble of the zoo's experts, compare it with its rivals, write the report.

    `output` gets `report.json`, `report.md`, `pictures.png`, `weights.png` and `ensemble`, all at
    once at the end; a run that fails or is stopped leaves nothing behind.

    Args:
        output: a new or empty folder.
        settings: how much of everything.

    Yields: progress, and every method's row as soon as it is judged.
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

        prompts = evaluation_prompts(settings.num_prompts)
        rows: list[Row] = []
        for row in _compare(pipeline, prompts, settings):
            if isinstance(row, Row):
                rows.append(row)
            yield row

        yield Progress("pictures", 0, 1)
        rows.sort(key=lambda row: row.score.both.mean)
        total_seconds = time.perf_counter() - started
        report = {
            "settings": asdict(settings),
            "aggregator_parameters": sum(p.numel() for p in pipeline.unet.aggregators.parameters()),
            "train_seconds": train_seconds,
            "total_seconds": total_seconds,
            "rows": [row.as_json() for row in rows],
        }
        (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (partial / "report.md").write_text(report_text(rows, settings, train_seconds))
        # the first prompts, whatever came of them
        draw_comparison(rows, prompts[:8], partial / "pictures.png")
        _draw_maps(pipeline, prompts[:4], settings, partial / "weights.png")
        partial.chmod(0o755)
        os.replace(partial, output)
        yield Progress("pictures", 1, 1)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _train(pipeline: StableDiffusionPipeline, settings: DemoSettings) -> Iterator[Progress]:
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


def _compare(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], settings: DemoSettings
) -> Iterator[Progress | Row]:
    """Draw and judge all methods; the control in the shell is of the best expert alone."""
    classifier = load_classifier()
    best: tuple[float, int] = (-1.0, 0)
    # the control comes last, when it is known which expert is the best
    names = [*EXPERTS, "base", "weight merge", "noise mean", "feature mean", *OURS, "shell"]
    for done, name in enumerate(names):
        title = f"{EXPERTS[best[1]]} in the ensemble's shell" if name == "shell" else name
        yield Progress("compare", done, len(names), title)
        score, pictures = evaluate(
            _method(name, pipeline, best[1]),
            prompts,
            classifier,
            seed=settings.seed,
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
        )
        if name in EXPERTS:
            best = max(best, (score.both.mean, EXPERTS.index(name)), key=lambda pair: pair[0])
        yield Row(title, score, pictures)
    yield Progress("compare", len(names), len(names))


def _method(name: str, pipeline: StableDiffusionPipeline, best: int) -> StableDiffusionPipeline:
    """A stock pipeline that combines the experts of `pipeline` in one way."""
    experts = list(pipeline.unet.experts)
    if name in OURS:
        again = EnsembleDenoiser(experts, list(pipeline.unet.aggregators))
        return accelerate(_with_parts(pipeline, {"unet": again}), OURS[name])
    if name in (*EXPERTS, "base"):
        return _stock(name)
    if name == "weight merge":
        models = [_stock(expert) for expert in EXPERTS]
        merged = {
            "unet": weighted_merge([model.unet for model in models]),
            "text_encoder": weighted_merge([model.text_encoder for model in models]),
        }
        return _with_parts(models[0], merged)
    sites = pipeline.unet.sites
    rules = {
        "noise mean": noise_mean(sites),
        "feature mean": feature_mean(sites),
        "shell": shell(sites, best),
    }[name]
    return _with_parts(pipeline, {"unet": EnsembleDenoiser(experts, rules)})


def _stock(name: str) -> StableDiffusionPipeline:
    """One of the zoo's models, loaded as anyone would, without anything of this package."""
    return StableDiffusionPipeline.from_pretrained(expert_folder(name), safety_checker=None)


def _with_parts(
    pipeline: StableDiffusionPipeline, parts: Mapping[str, object]
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        **{**pipeline.components, **parts}, requires_safety_checker=False
    )


# -- the report -------------------------------------------------------------------------------


def rivals_reached(rows: Sequence[Row], method: str = "AFA") -> list[str]:
    """The rivals whose `both` interval is not wholly below the method's own."""
    low = next(row.score.both.low for row in rows if row.method == method)
    return [row.method for row in rows if row.method not in OURS and row.score.both.high >= low]


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
        s = row.score
        lines.append(
            f"| {row.method} | {s.both} | {s.objects} | {s.left} | {s.right} "
            f"| {s.seconds_per_image:.2f} |"
        )
    return "\n".join([*lines, "", verdict(rows), ""])


def draw_comparison(rows: Sequence[Row], prompts: Sequence[str], path: Path) -> None:
    """Draw methods (rows) by prompts (columns), each method labelled with its `both`.

    Args:
        rows: judged methods, in the order to draw.
        prompts: the captions above the columns; pictures are the first of every row.
        path: PNG or SVG, by its suffix.
    """
    scenes = [parse_caption(prompt) for prompt in prompts]
    comparison(
        {
            f"{row.method}: {row.score.both.mean:.0%} right": row.pictures[: len(prompts)]
            for row in rows
        },
        [f"{scene.left} | {scene.right} ({scene.background})" for scene in scenes],
        path,
        bold=[
            f"{row.method}: {row.score.both.mean:.0%} right" for row in rows if row.method in OURS
        ],
    )


def _draw_maps(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    settings: DemoSettings,
    path: Path,
) -> None:
    with record_weights(pipeline.unet) as record:
        pictures = draw_pictures(
            pipeline,
            prompts,
            seed=settings.seed,
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
        )
    scenes = [parse_caption(prompt) for prompt in prompts]
    titles = [f"{scene.left} | {scene.right}" for scene in scenes]
    filmstrip(record, pictures, path, experts=EXPERTS, titles=titles)
