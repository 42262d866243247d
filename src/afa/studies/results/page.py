"""Write `docs/results.md` and `docs/results.json`: the results of the study."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from afa.evaluation.report import curve_table
from afa.files import read_json, write_atomic
from afa.provenance import made_from
from afa.studies.results.conclusions import conclusions, own_domain_means, signed
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
_FIGURES = ("scores", "curve", "pictures", "failures", "weights")
_SHOWN = ("both", "objects", "clip_t", "clip_i")
_SETS = ("fid", "cmmd")


def results_of(
    work: Path,
    settings: StudySettings,
    chosen: dict[str, dict[str, Any]],
    costs: dict[str, dict[str, float]],
    base_learning_rate: float,
) -> dict[str, Any]:
    """The content of `results.json`, from which the page is generated.

    Args:
        work: folder of the study, with the finished comparison.
        settings: settings of the study.
        chosen: selected settings, by baseline.
        costs: training costs, by row.
        base_learning_rate: selected learning rate of the tuned base.
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
    """Write `results.md`, `results.json` and `images/results-*.png`.

    Args:
        docs: output folder; an existing section of `write_section` is included in the page.
        results: see `results_of`.
        comparison: folder with the figures.
    """
    _copy_figures(docs, comparison, "results")
    write_atomic(docs / "results.json", json.dumps(results, indent=1) + "\n")
    text, other = page(results), docs / _SECTION
    if other.exists():
        text += "\n" + section(read_json(other))
    write_atomic(docs / "results.md", text)


def write_section(docs: Path, results: dict[str, Any], comparison: Path) -> None:
    """Write the section on transformers at the end of `results.md`, its JSON and its figures.

    Args:
        docs: output folder.
        results: see `results_of`.
        comparison: folder with the figures.
    """
    _copy_figures(docs, comparison, "results-dit")
    write_atomic(docs / _SECTION, json.dumps(results, indent=1) + "\n")
    path = docs / "results.md"
    current = f"\n{path.read_text(encoding='utf-8')}" if path.exists() else ""
    before = current.partition(f"\n{_HEADING}\n")[0]
    write_atomic(path, f"{before.strip()}\n\n{section(results)}".lstrip())


def _copy_figures(docs: Path, comparison: Path, stem: str) -> None:
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name in _FIGURES:
        figure = comparison / f"{name}.png"
        if figure.exists():
            shutil.copyfile(figure, images / f"{stem}-{name}.png")


def row_of(report: dict[str, Any], row: dict[str, Any], group: str) -> dict[str, Any]:
    """The row of a method for a group of prompts in `results.json`."""
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
    """The paired difference in `both`, subject minus method; None for the subject itself."""
    for row in report["paired"]:
        key = (row["group"], row["role"], row["score"], row["against"])
        if key == (group, "subject", "both", method):
            return {
                **row["difference"],
                **{k: row[k] for k in ("wins", "losses", "ties", "p_value")},
            }
    return None


def trained_at(work: Path) -> str:
    """The commits at which the trainings finished."""
    notes = [read_json(file) for file in sorted(work.glob("*/*/finished.json"))]
    return ", ".join(sorted({str(note["commit"]) for note in notes if "commit" in note}))


# -- the page ---------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """The text of `results.md`."""
    made, settings = results["made_from"], results["settings"]
    rows = {row["method"]: row for row in results["rows"]}
    return _blocks(
        "# Results on emoji scenes",
        "Written by `make results`; the figures are in [results.json](results.json). Commit "
        f"{made['commit']}{_trained(made)}; {made['machine']}; {made['software']}.",
        "Each picture shows two emojis, one on each side. The base model was trained briefly "
        "on all 48 objects; each expert is the base, fine-tuned on the objects of one domain. "
        "*Mixed* prompts combine objects of two domains, in pairs that are in no training set. "
        "`both` is the fraction of pictures with the correct objects on both sides, according "
        "to a classifier of real scenes.",
        "## Limits of these figures",
        NEXT_STUDY,
        "From the tables below, the source code and earlier commits:",
        [f"- {sentence}" for sentence in limits(results)],
        REVIEW_HEAD,
        [f"- {sentence}" for sentence in REVIEW],
        "## Summary",
        "Results of this run, within the limits above; evidence against AFA comes first.",
        [f"- {sentence}" for sentence in conclusions(results)],
        f"## Mixed prompts: {results['groups'][_MIXED]}",
        f"{results['sampling']['num_steps']} DDIM steps, guidance "
        f"{results['sampling']['guidance']:g}; all methods start from the same noise. "
        f"{SUBJECT} and the tuned bases are means over {settings['num_seeds']} training seeds; "
        "the ablations and other numbers of experts use only the first seed, so their "
        "intervals do not include the variation between seeds. "
        "Brackets are 95 % intervals: Wilson's over the prompts for fractions, widened if "
        "training seeds differ; the paired bootstrap over prompts and seeds for differences. "
        f"*{SUBJECT} minus this* is the difference in `both`; wins and losses count prompts. "
        "`fid` and `cmmd` use scenes of the same prompts as references and have no intervals. "
        "`calls` are evaluations of one expert's denoiser per picture; in *fast* rows "
        "([speed.md](speed.md)) some of them are partial.",
        _table(list(rows.values())),
        "![All methods with their intervals, by kind of prompt.](images/results-scores.png)",
        "![The first mixed prompts, drawn by all methods.](images/results-pictures.png)",
        "## Own-domain prompts",
        "Prompts of one domain, for which one expert was fine-tuned.",
        _domain_table(results),
        "## Training costs",
        _cost_table(rows, results["training"]),
        "The tuned base is the base's U-Net and text encoder, trained on the same batches, "
        "noise and learning rate schedule as the aggregators with the same seed; *(time)* is "
        "trained for more steps. No row of this table includes the training of the experts.",
        "## Quality against time",
        curve_table(results),
        "![Fraction of correct pictures against seconds.](images/results-curve.png)",
        "## Ablations, other sizes, other numbers of experts",
        "*The paper's size*: `hidden_ratio: null, min_scale: 1`, with the same number of "
        "channels at all sites and weights at every pixel. *conv_out only* has the default "
        "size, which is too small there: see [the limits](#limits-of-these-figures).",
        _table([rows[SUBJECT], *(rows[name] for name in (*VARIANTS, *OTHER_EXPERTS))]),
        "## Fusion weights",
        "Mean weight of each expert by site (from input to output) and step, for the first seed.",
        "![Mean weights by site and step.](images/results-weights.png)",
        f"## Failures of {SUBJECT}",
        f"The mixed prompts with the lowest scores of {SUBJECT}.",
        "![Failures, next to the pictures of other methods.](images/results-failures.png)",
        "## Tuning of the baselines",
        f"The settings of each baseline were selected on {settings['num_tuning']} mixed "
        f"prompts with pairs that are not in the test, at {settings['tuning_steps']} steps; "
        f"autoMBW had {settings['num_trials']} trials on the same prompts. The learning rate "
        f"and schedule of {SUBJECT} were chosen in a few runs of the demo, **on the prompts of "
        "this test**.",
        [
            f"- {name}: {_settings(chosen)}{_tried(name)}"
            for name, chosen in results["chosen"].items()
        ],
    )


def section(results: dict[str, Any]) -> str:
    """The section on transformers."""
    made, settings, sampling = results["made_from"], results["settings"], results["sampling"]
    rows = {row["method"]: row for row in results["rows"]}
    return _blocks(
        _HEADING,
        "Scenes, prompts, judges and autoencoder are the same; base and experts are small "
        "transformers of the PixArt family (`afa zoo build --family dit`), and SABW fuses "
        "their tokens on a grid of 8x8. Written by `make results-dit`; the figures are in "
        f"[{_SECTION}]({_SECTION}). Commit {made['commit']}{_trained(made)}; "
        f"{made['machine']}; {made['software']}.",
        "Test prompts and references are of the same kind as above, with the same limits. "
        "These limits differ:",
        [f"- {sentence}" for sentence in limits_of_transformers(results)],
        "Summary, within these limits; evidence against AFA comes first:",
        [f"- {sentence}" for sentence in conclusions(results)],
        f"{results['groups'][_MIXED]} mixed prompts, {sampling['num_steps']} DDIM steps, "
        f"guidance {sampling['guidance']:g}; {SUBJECT} and the tuned bases are means over "
        f"{settings['num_seeds']} seeds. The settings of each baseline were selected on "
        f"{settings['num_tuning']} other prompts, as above; block-wise merges only apply to "
        "U-Nets.",
        _table(list(rows.values())),
        "![The first mixed prompts, drawn by all methods.](images/results-dit-pictures.png)",
        _domain_table(results),
        _cost_table(rows, results["training"]),
        curve_table(results),
        "![Mean weights by site and step.](images/results-dit-weights.png)",
        [f"- {name}: {_settings(chosen)}" for name, chosen in results["chosen"].items()],
    )


def _blocks(*blocks: str | list[str]) -> str:
    """Join blocks with blank lines; a list is the lines of a table or of a list."""
    joined = ("\n".join(block) if isinstance(block, list) else block for block in blocks)
    return "\n\n".join(joined) + "\n"


def _trained(made: dict[str, str]) -> str:
    return "" if made["trained_at"] == made["commit"] else f" (trained at {made['trained_at']})"


def _settings(chosen: dict[str, Any]) -> str:
    """The settings of a baseline on one line, with rounded numbers."""

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
    """State the number of candidates of a baseline."""
    listed = candidates().get(name)
    return "" if listed is None else f", of {len(listed)} candidates"


def _interval(score: dict[str, float]) -> str:
    return f"{score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """The table of one group of prompts, the best row first."""
    head = ["method", *_SHOWN, *_SETS, f"{SUBJECT} minus this", "wins/losses", "calls", "s/image"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: -row["both"]["mean"]):
        minus = row["afa_minus_this"]
        cells = [f"**{row['method']}**" if row["method"] == SUBJECT else row["method"]]
        cells += [_interval(row[name]) for name in _SHOWN]
        cells += [f"{row[name]['mean']:.3g}" if name in row else "-" for name in _SETS]
        cells += [
            "" if minus is None else signed(minus),
            "" if minus is None else f"{minus['wins']}/{minus['losses']}",
            f"{row['expert_calls_per_image']:.0f}",
            f"{row['seconds_per_image']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _domain_table(results: dict[str, Any]) -> list[str]:
    """The table of `both` by method and domain, with the mean of the domains."""
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
