"""What the study's figures do not show: faults of its design, and evidence that contradicts it.

`limits` is computed from the results and from the settings in the source. `EARLIER` quotes earlier
commits of this repository. `REVIEW` quotes a review whose scripts are not part of it; these figures
can only be checked once they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.studies.results.plan import SUBJECT, TIME, candidates
from afa.studies.zoo_build.transformer import TransformerRecipe
from afa.studies.zoo_build.workshop import ModelsRecipe
from afa.zoo import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Sequence

#: settings of rivals that were tried along a line, so that the best one may lie beyond its end
_LINES = ("weights", "density", "temperatures")

NEXT_STUDY = (
    "These limits were found after the run. The tables below are as they were measured, but they "
    "do not answer whether adaptive fusion pays against everything else that can be made of the "
    "same models, data and computation. A new study follows: disjoint pairs of objects for "
    "development, tuning and test, independent references, every row charged for all of its "
    "training, and the missing rows. It can come out either way."
)

EARLIER = (
    "**The verdict on the tuned base depends on that rule.** In an earlier run of this page "
    "(commit a581f52: larger aggregators, which take longer to train, and another order of the "
    "data) equal time was 1,944 steps. The tuned base got 0.83 [0.74, 0.90] and AFA 0.89: not "
    "told apart, +0.06 [-0.02, +0.15]. The tuned base had the lower CMMD: 0.027, AFA 0.082. (The "
    "tuned base (steps), whose budget is the same in both runs, moved from 0.69 to 0.63 between "
    "them.)",
    "**The ablation *conv_out only* measures the size of its aggregator.** In the present run "
    "that aggregator has 32 channels on half the grid (51,000 parameters). In the earlier run it "
    "had 64 channels on the whole grid (180,000 parameters) and got 0.89 [0.81, 0.95]: not told "
    "apart from AFA, +0.00 [-0.07, +0.08], with lower FID (2.53, AFA 3.04) and CMMD (0.048, AFA "
    "0.082). Nothing here shows that fusing features is better than fusing predictions with "
    "trained weights.",
    "**The test prompts are not untouched.** This page, the demo, the zoo's report and the "
    "[training study](training.md#what-improves-the-pictures) judge the same 96 mixed prompts "
    "(seed 1,000,000). The cosine schedule was chosen on them (commit b6baced), and fifteen "
    "settings of training were compared on them. Rivals were tuned on other pairs of objects. So "
    "the figures of AFA may be too high, by an unknown amount.",
    "**The scenes were made so that there is something to gain.** The base stopped early. Each "
    "expert then lost what the base knew of the other domains: in the zoo's report an expert gets "
    "0.00 to 0.01 of another domain's prompts right, the base 0.38 to 0.86. Weight merges begin "
    "with such experts. The length of the transformers' training was chosen so that their base "
    "does not draw every mixed prompt right (a note in "
    "`src/afa/studies/zoo_build/transformer.py`, without committed figures).",
    '**"Not told apart" does not mean equal.** The intervals of differences reach 0.03 to 0.10 to '
    "either side, ablations have one seed of training, and nothing corrects for the number of "
    "comparisons.",
)

REVIEW_HEAD = (
    "From a separate review of this page. Its scripts are not in the repository yet, so **these "
    "figures cannot be reproduced from it**. One run each, on the 96 mixed prompts with 20 steps "
    "and guidance 3, unless something else is said; brackets are 95 % intervals:"
)
REVIEW = (
    "A fixed mask without any training solves these scenes: the left object's expert predicts the "
    "left half, the right object's expert the right half. It gets 1.00 [0.96, 1.00] at two expert "
    "calls a step. The mask is told the layout and which expert knows which object, which "
    "ordinary prompts do not say. So the ceiling is 1.00, and no trained aggregator is needed to "
    "reach it here.",
    "The tuned base, given 3,000 steps of 16 (48,000 scenes, a quarter of the experts' 192,000), "
    "gets 0.91 [0.83, 0.95], and 0.90 on own-domain prompts. AFA gets 0.88 and 0.88, and a "
    "picture takes three times as long. The intervals overlap: at this budget no advantage of AFA "
    "is shown, and none of the tuned base in `both` either.",
    "*conv_out only* with an aggregator of 0.18 million parameters (`hidden_ratio: null, "
    "min_scale: 1`) gets 0.885, 0.82 and 0.83 with three seeds, FID 2.57 and CMMD 0.050. AFA gets "
    "0.88, 3.13 and 0.087.",
    "A perfect copy of the references has a KID of -0.37, and two sets of real scenes have an FID "
    "of 9.6 between them. So the values of this page are not on the scale of independent samples.",
    "The experts are far from the base: the norm of the difference is 0.31 of the base's, the "
    "cosines of the differences are 0.25. The best static merges then degenerate to the base plus "
    "5 % of the differences.",
    "Two routers without training that do not know the layout (by distance from the base, by "
    "guidance response) get 0.38.",
    "In favour of AFA: with experts closer to the base (400 steps at 3e-4, norm 0.04; one seed, "
    "64 prompts, 12 steps) the experts get 0.44 to 0.59, merges 0.59, the base 0.62 and AFA 0.80 "
    "[0.68, 0.88]. So its lead over merges does not come from far experts alone.",
    "Found sound: the judge (1.00 on real scenes, 0.997 through the autoencoder), the paired "
    "bootstrap, AFA's equal scores at 10 and 20 steps, and that rivals were tuned on other "
    "prompts.",
    "In simulations the intervals covered the true value in 95.5 to 99.5 % of cases with two or "
    "three trainings, and in 93 % with one. With two seeds, as for the transformers below, up to "
    "9.8 % of verdicts were false where trainings vary much.",
)


def limits(results: dict[str, Any]) -> list[str]:
    """What limits the comparison on U-Nets, the figures of the run itself first."""
    return [*_references(results), budget(results, ModelsRecipe()), *EARLIER, *edges(results)]


def limits_of_transformers(results: dict[str, Any]) -> list[str]:
    """What has other figures in the comparison on transformers."""
    return [budget(results, TransformerRecipe()), *edges(results)]


def _references(results: dict[str, Any]) -> list[str]:
    ours = next(row for row in results["rows"] if row["method"] == SUBJECT)
    if "kid" not in ours:
        return []
    return [
        "**FID, KID and CMMD take the test's own prompts as references:** one rendered scene for "
        "each prompt that is drawn. Generated and reference pictures are not independent, so these "
        "scores reward following the prompt, and no value can be compared with one from elsewhere. "
        "They have no intervals, and no value of real against real scenes stands beside them. KID, "
        "whose mean is zero for two independent samples of one distribution, is "
        f"{ours['kid']['mean']:.2f} for {SUBJECT}."
    ]


def budget(results: dict[str, Any], experts: ModelsRecipe) -> str:
    """What "equal time" of the tuned base counts, and what it does not.

    Args:
        results: see `afa.studies.results.page.results_of`.
        experts: how the experts that are compared were trained.
    """
    settings, batch_size = results["settings"], results["settings"]["batch_size"]
    num_steps = results["training"][TIME]["num_steps"]
    aggregators = settings["num_train_steps"] * batch_size
    fine_tuning = len(EXPERTS) * experts.expert_steps * experts.batch_size
    return (
        f'**"Equal time" counts the training of the aggregators alone.** The {TIME} had '
        f"{num_steps:,.0f} steps of {batch_size} ({num_steps * batch_size:,.0f} scenes), which "
        f"take as long as the aggregators' {aggregators:,} scenes. The three experts, which "
        f"{SUBJECT} needs and the tuned base does not, were fine-tuned on {fine_tuning:,} scenes, "
        "and no row is charged for these. That is right for someone who has the experts already; "
        f"as a comparison of methods it favours {SUBJECT}."
    )


def edges(results: dict[str, Any]) -> list[str]:
    """Rivals whose chosen setting is the smallest or the largest that was tried."""
    chosen, found = results["chosen"], []
    for name, tried in candidates().items():
        if name in chosen:
            found += [f"{name}: {end}" for end in _ends(chosen[name], tried)]
    rates = results["settings"]["base_learning_rates"]
    rate = chosen["tuned base"]["learning_rate"]
    found += [f"tuned base: {end}" for end in _end("learning rate", rate, rates)]
    if not found:
        return []
    return [
        "**Some rivals were tuned to the edge of what was tried,** so a better setting may lie "
        f"beyond it: {'; '.join(found)}."
    ]


def _ends(chosen: dict[str, Any], tried: Sequence[dict[str, Any]]) -> list[str]:
    """Of one rival, the settings along a line that are at an end of it."""
    ends = []
    for key in _LINES:
        values = [_on_line(settings, key) for settings in tried]
        value = _on_line(chosen, key)
        if value is not None and None not in values:
            ends += _end(key, value, [v for v in values if v is not None])
    return ends


def _on_line(settings: dict[str, Any], key: str) -> float | None:
    """A setting as one number: a number, or a list of equal ones; None where it is neither."""
    value = next(iter(settings.values())).get(key)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    return float(value) if isinstance(value, int | float) else None


def _end(key: str, value: float, values: Sequence[float]) -> list[str]:
    different = sorted(set(values))
    if len(different) < 2 or different[0] < value < different[-1]:
        return []
    which = "smallest" if value <= different[0] else "largest"
    return [f"{key} {value:.2g}, the {which} of {len(different)}"]
