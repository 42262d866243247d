"""`docs/results.md` and `docs/results.json`: the study's figures, and plain words for them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from afa.evaluation.report import curve_table
from afa.files import read_json, write_atomic
from afa.provenance import made_from
from afa.studies.results.conclusions import conclusions, own_domain_means
from afa.studies.results.limits import (
    NEXT_STUDY,
    REVIEW,
    REVIEW_HEAD,
    limits,
    limits_of_transformers,
)
from afa.studies.results.plan import OTHER_EXPERTS, SUBJECT, VARIANTS, candidates, training_name
from afa.zoo import EXPERTS

if TYPE_CHECKING:
    from pathlib import Path

    from afa.studies.results.plan import StudySettings

_MIXED = "mixed"
_SECTION, _HEADING = "results-dit.json", "## Diffusion transformers"
_DRAWINGS = ("scores", "curve", "pictures", "failures", "weights")
_SHOWN = ("both", "objects", "clip_t", "clip_i")
_SETS = ("fid", "cmmd")


def results_of(
    work: Path,
    settings: StudySettings,
    chosen: dict[str, dict[str, Any]],
    costs: dict[str, dict[str, float]],
    base_learning_rate: float,
) -> dict[str, Any]:
    """All that the page says, as `results.json` has it.

    Args:
        work: the study's folder, with the finished comparison.
        settings: how much of everything.
        chosen: the settings of every tuned rival.
        costs: what went into every trained row.
        base_learning_rate: the better one of the tuned base's.
    """
    report = read_json(work / "comparison" / "report.json")
    return {
        "made_from": {**made_from(), "trained_at": trained_at(work)},
        "settings": asdict(settings),
        "groups": report["groups"],
        "sampling": report["sampling"],
        "rows": [row_of(report, row, _MIXED) for row in report["rows"]],
        "own_domain": {
            domain: [row_of(report, row, domain) for row in report["rows"]] for domain in EXPERTS
        },
        "primary": report["primary"],
        "curve": report["curve"],
        "training": costs,
        "chosen": {**chosen, "tuned base": {"learning_rate": base_learning_rate}},
        "weights": report["weights"],
        "failures": report["failures"],
    }


def write_pages(docs: Path, results: dict[str, Any], comparison: Path) -> None:
    """Write `results.md`, `results.json` and `images/results-*.png` into `docs`.

    Args:
        docs: is made; what `write_section` put there becomes a part of the page again.
        results: see `results_of`.
        comparison: the folder with the drawings.
    """
    _copy_drawings(docs, comparison, "results")
    write_atomic(docs / "results.json", json.dumps(results, indent=1) + "\n")
    text, other = page(results), docs / _SECTION
    if other.exists():
        text += "\n" + section(read_json(other))
    write_atomic(docs / "results.md", text)


def write_section(docs: Path, results: dict[str, Any], comparison: Path) -> None:
    """Write what came of transformers: the end of `results.md`, and a file and drawings of its own.

    Args:
        docs: see `write_pages`, like the others.
        results: see `results_of`.
        comparison: the folder with the drawings.
    """
    _copy_drawings(docs, comparison, "results-dit")
    write_atomic(docs / _SECTION, json.dumps(results, indent=1) + "\n")
    place = docs / "results.md"
    page_now = f"\n{place.read_text()}" if place.exists() else ""
    before = page_now.partition(f"\n{_HEADING}\n")[0]
    write_atomic(place, f"{before.strip()}\n\n{section(results)}".lstrip())


def _copy_drawings(docs: Path, comparison: Path, stem: str) -> None:
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name in _DRAWINGS:
        drawing = comparison / f"{name}.png"
        if drawing.exists():
            shutil.copyfile(drawing, images / f"{stem}-{name}.png")


def row_of(report: dict[str, Any], row: dict[str, Any], group: str) -> dict[str, Any]:
    """One method's row for a group of prompts, as `results.json` has it."""
    scores, sets = row["groups"][group]["scores"], row["groups"][group]["sets"]
    return {
        "method": row["method"],
        "num_seeds": row["num_replicas"],
        **scores,
        **sets,
        "afa_minus_this": difference(report, row["method"], group),
        "expert_calls_per_image": row["expert_calls_per_image"],
        **row["measured"],
    }


def difference(report: dict[str, Any], method: str, group: str) -> dict[str, Any] | None:
    """The subject's `both` minus a method's, paired by prompt; None for the subject itself."""
    for row in report["paired"]:
        place = (row["group"], row["role"], row["score"], row["against"])
        if place == (group, "subject", "both", method):
            return {
                **row["difference"],
                **{k: row[k] for k in ("wins", "losses", "ties", "p_value")},
            }
    return None


def trained_at(work: Path) -> str:
    """The commits at which the trainings were finished, where other ones than the page's."""
    notes = [read_json(file) for file in sorted(work.glob("*/*/finished.json"))]
    return ", ".join(sorted({str(note["commit"]) for note in notes if "commit" in note}))


# -- the page ---------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """`results.md`."""
    made, settings = results["made_from"], results["settings"]
    rows = {row["method"]: row for row in results["rows"]}
    return "\n".join(
        [
            "# Results on emoji scenes",
            "",
            "Written by `make results`; the figures are in [results.json](results.json). Commit "
            f"{made['commit']}{_trained(made)}; {made['machine']}; {made['software']}.",
            "",
            "Each picture shows two emojis, each in its place. The base model was trained on all "
            "48 objects for a short time; each expert is the base, fine-tuned on the objects of "
            "one domain. *Mixed* prompts ask for objects of two domains, in pairs that no "
            "training held. `both` is the share of pictures with the right object on either side, "
            "as a classifier of real scenes sees it.",
            "",
            "## Limits of these figures",
            "",
            NEXT_STUDY,
            "",
            "From the tables below, the source and earlier commits:",
            "",
            *(f"- {sentence}" for sentence in limits(results)),
            "",
            REVIEW_HEAD,
            "",
            *(f"- {sentence}" for sentence in REVIEW),
            "",
            "## In plain words",
            "",
            "Of this run, within the limits above; what speaks against AFA comes first.",
            "",
            *(f"- {sentence}" for sentence in conclusions(results)),
            "",
            f"## Mixed prompts: {results['groups'][_MIXED]}",
            "",
            f"{results['sampling']['num_steps']} DDIM steps, guidance "
            f"{results['sampling']['guidance']:g}, the same noise for every method. {SUBJECT} and "
            f"the tuned bases are means over {settings['num_seeds']} seeds of training; the "
            "ablations and other numbers of experts are of the first seed, whose luck their "
            "intervals do not hold. "
            "Brackets are 95 % intervals: of a share Wilson's over the prompts, widened where "
            "seeds of training differ; of a difference the paired bootstrap over prompts and "
            f"seeds. *{SUBJECT} minus this* is of `both`; wins and losses count prompts. `fid` and "
            "`cmmd` are against scenes of the same prompts and have no intervals. `calls` are runs "
            "of one expert's denoiser for one picture, in whole or, where a row is *fast* "
            "([speed.md](speed.md)), in part.",
            "",
            *_table(list(rows.values())),
            "",
            "![Every method with its interval, by kind of prompt.](images/results-scores.png)",
            "",
            "![The first mixed prompts, drawn by every method.](images/results-pictures.png)",
            "",
            "## Own-domain prompts",
            "",
            "Prompts of one domain, which its own expert was fine-tuned for.",
            "",
            *_domain_table(results),
            "",
            "## What was trained, and for how long",
            "",
            *_cost_table(rows, results["training"]),
            "",
            "The tuned base is the base's U-Net and text encoder, trained on the very batches, "
            "noise and schedule that the aggregators of the same seed saw; *(time)* goes on with "
            "more of them. The experts' own training is in no row of this table.",
            "",
            "## Quality against time",
            "",
            *curve_table(results),
            "",
            "![Share of right pictures against seconds.](images/results-curve.png)",
            "",
            "## Ablations, other sizes, other numbers of experts",
            "",
            "*The paper's size*: `hidden_ratio: null, min_scale: 1`, the same many channels at "
            "every site and weights at every pixel. *conv_out only* has the default size, which is "
            "too small there: see [the limits](#limits-of-these-figures).",
            "",
            *_table([rows[SUBJECT], *(rows[name] for name in _variants())]),
            "",
            "## Whom it listens to",
            "",
            "Mean weight of each expert by site (from the input down to the output) and step, of "
            "the first seed.",
            "",
            "![Mean weights by site and step.](images/results-weights.png)",
            "",
            "## Where it fails",
            "",
            "The mixed prompts that it gets right least often.",
            "",
            "![Failures, beside what others drew.](images/results-failures.png)",
            "",
            "## How the rivals were tuned",
            "",
            f"Each had its settings chosen on {settings['num_tuning']} mixed prompts whose pairs "
            f"the test does not ask for, at {settings['tuning_steps']} steps; autoMBW had "
            f"{settings['num_trials']} trials on the same prompts. The learning rate and schedule "
            f"of {SUBJECT} were chosen in a few runs of the demo, **on the prompts of this test**.",
            "",
            *(
                f"- {name}: {_settings(chosen)}{_tried(name)}"
                for name, chosen in results["chosen"].items()
            ),
            "",
        ]
    )


def section(results: dict[str, Any]) -> str:
    """What the page says of transformers."""
    made, settings, sampling = results["made_from"], results["settings"], results["sampling"]
    rows = {row["method"]: row for row in results["rows"]}
    return "\n".join(
        [
            _HEADING,
            "",
            "The same scenes, prompts, judges and autoencoder; base and experts are small "
            "transformers of PixArt's kind (`afa zoo build --family dit`), and SABW fuses their "
            "tokens on their grid of 8x8. Written by `make results-dit`; the figures are in "
            f"[{_SECTION}]({_SECTION}). Commit {made['commit']}{_trained(made)}; "
            f"{made['machine']}; {made['software']}.",
            "",
            "The test prompts and the kind of references are those of the page, and so are their "
            "limits. Other figures:",
            "",
            *(f"- {sentence}" for sentence in limits_of_transformers(results)),
            "",
            "In plain words, within these limits; what speaks against AFA comes first:",
            "",
            *(f"- {sentence}" for sentence in conclusions(results)),
            "",
            f"{results['groups'][_MIXED]} mixed prompts, {sampling['num_steps']} DDIM steps, "
            f"guidance {sampling['guidance']:g}; {SUBJECT} and the tuned bases are means over "
            f"{settings['num_seeds']} seeds. Each rival had its settings chosen on "
            f"{settings['num_tuning']} other prompts, as above; merges by block are for U-Nets "
            "alone.",
            "",
            *_table(list(rows.values())),
            "",
            "![The first mixed prompts, drawn by every method.](images/results-dit-pictures.png)",
            "",
            *_domain_table(results),
            "",
            *_cost_table(rows, results["training"]),
            "",
            *curve_table(results),
            "",
            "![Mean weights by site and step.](images/results-dit-weights.png)",
            "",
            *(f"- {name}: {_settings(chosen)}" for name, chosen in results["chosen"].items()),
            "",
        ]
    )


def _trained(made: dict[str, str]) -> str:
    return "" if made["trained_at"] == made["commit"] else f" (trained at {made['trained_at']})"


def _settings(chosen: dict[str, Any]) -> str:
    """A rival's settings in a line, numbers rounded."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.2g}")
        if isinstance(value, list):
            return [rounded(item) for item in value]
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return value

    return f"`{json.dumps(rounded(chosen))}`"


def _tried(name: str) -> str:
    """Out of how many settings a rival's were chosen."""
    listed = candidates().get(name)
    return "" if listed is None else f", of {len(listed)} that were tried"


def _variants() -> list[str]:
    return [*VARIANTS, *OTHER_EXPERTS]


def _interval(score: dict[str, float]) -> str:
    return f"{score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def _signed(score: dict[str, float] | None) -> str:
    if score is None:
        return ""
    return f"{score['mean']:+.2f} [{score['low']:+.2f}, {score['high']:+.2f}]"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of one group of prompts, the best first."""
    head = ["method", *_SHOWN, *_SETS, f"{SUBJECT} minus this", "wins/losses", "calls", "s/image"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: -row["both"]["mean"]):
        minus = row["afa_minus_this"]
        cells = [f"**{row['method']}**" if row["method"] == SUBJECT else row["method"]]
        cells += [_interval(row[name]) for name in _SHOWN]
        cells += [f"{row[name]['mean']:.3g}" if name in row else "-" for name in _SETS]
        cells += [
            _signed(minus),
            "" if minus is None else f"{minus['wins']}/{minus['losses']}",
            f"{row['expert_calls_per_image']:.0f}",
            f"{row['seconds_per_image']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _domain_table(results: dict[str, Any]) -> list[str]:
    """`both` of every method by domain, and the mean of the three."""
    counts = [f"{domain} ({results['groups'][domain]})" for domain in EXPERTS]
    lines = [f"| method | {' | '.join(counts)} | mean |", "|---|---|---|---|---|"]
    by_domain = {
        domain: {row["method"]: row["both"] for row in rows}
        for domain, rows in results["own_domain"].items()
    }

    means = own_domain_means(results)
    for method in sorted(means, key=means.__getitem__, reverse=True):
        name = f"**{method}**" if method == SUBJECT else method
        cells = [_interval(by_domain[domain][method]) for domain in EXPERTS]
        lines.append(f"| {name} | {' | '.join(cells)} | {means[method]:.2f} |")
    return lines


def _cost_table(rows: dict[str, dict[str, Any]], costs: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| row | steps | minutes | mixed prompts, both |", "|---|---|---|---|"]
    names = {f"{SUBJECT.lower()}-0": SUBJECT}
    names |= {training_name(row): row for row in VARIANTS}
    for key, cost in costs.items():
        name = names.get(key, key)
        if name not in rows:  # further seeds of the same row
            continue
        steps = cost.get("num_steps")
        amount = f"{cost['num_trials']:.0f} trials" if steps is None else f"{steps:.0f}"
        lines.append(
            f"| {name} | {amount} | {cost['seconds'] / 60:.1f} | {_interval(rows[name]['both'])} |"
        )
    return lines
