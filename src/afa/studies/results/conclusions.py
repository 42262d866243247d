"""The summary of the study; the results determine every sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.studies.results.plan import OTHER_EXPERTS, SPED_UP, STEPS, SUBJECT, TIME, VARIANTS, fast
from afa.zoo import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LEVEL = 0.05
_SAME = 1e-3  # tolerance of a mean score, for rounding differences in pixels
_SAME_TIME = 1.1  # tolerance for noise of timing
_TUNED = (STEPS, TIME)
_SETS = {"cmmd": "CMMD", "fid": "FID", "kid": "KID"}  # lower is better
_CONV_OUT = "ablation: conv_out only"
_SMALL = (
    " Its aggregator is too small for conclusions on fusing predictions only: with the paper's "
    "size it was not significantly different, see the limits above."
)


def conclusions(results: dict[str, Any]) -> list[str]:
    """The sentences of the summary, those against the subject first."""
    rows = {row["method"]: row for row in results["rows"]}
    variants = [*VARIANTS, *OTHER_EXPERTS]
    students = [name for name in rows if name.startswith("distilled")]  # of the subject
    no_rivals = {SUBJECT, *variants, *_TUNED, *students, *map(fast, SPED_UP)}
    rivals = [name for name in rows if name not in no_rivals]
    return [
        *_other_scores(rows),
        *_own_domain(results),
        *(_tuned(rows, name) for name in _TUNED),
        *_against(rows, rivals),
        _shell(results),
        *_fast(rows),
        *_at_equal_time(results),
        *_variants(results, [name for name in variants if name in rows]),
    ]


def verdict(difference: dict[str, float]) -> str:
    """`above`, `below` or `not significant`.

    A difference is significant if its interval excludes zero and an exact sign test of wins and
    losses agrees; with few prompts, bootstrap intervals alone are too narrow.
    """
    if difference["p_value"] >= _LEVEL:
        return "not significant"
    if difference["low"] > 0:
        return "above"
    return "below" if difference["high"] < 0 else "not significant"


def signed(difference: dict[str, float]) -> str:
    """Format a difference and its interval with signs."""
    return f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def _other_scores(rows: dict[str, Any]) -> list[str]:
    """State which rows have a lower distance (FID, KID, CMMD) than the subject."""
    sentences = []
    for key, score in _SETS.items():
        if key not in rows[SUBJECT]:
            continue
        scores = {name: row[key] for name, row in rows.items() if key in row}
        ours = scores[SUBJECT]
        lower = [name for name in scores if scores[name]["mean"] < ours["mean"]]
        lower.sort(key=lambda name: scores[name]["mean"])
        listed = "; ".join(f"{name} {_with_seeds(scores[name])}" for name in lower)
        sentences.append(
            f"{SUBJECT} has a {score} of {_with_seeds(ours)} on mixed prompts (lower is better; no "
            "interval)" + (f". **Lower are:** {listed}." if lower else "; no row is lower.")
        )
    return sentences


def _with_seeds(score: dict[str, Any]) -> str:
    """Format a score, with its range over the training seeds if there are several."""
    by_seed = score["by_replica"]
    text = f"{score['mean']:.3g}"
    return f"{text} (seeds {min(by_seed):.3g} to {max(by_seed):.3g})" if len(by_seed) > 1 else text


def _against(rows: dict[str, Any], rivals: Sequence[str]) -> list[str]:
    """Compare the subject with the baselines on mixed prompts."""
    by_verdict: dict[str, list[str]] = {}
    for name in rivals:
        by_verdict.setdefault(verdict(rows[name]["afa_minus_this"]), []).append(name)
    sentences = []
    ours = rows[SUBJECT]["both"]
    above = by_verdict.get("above", [])
    if above:
        closest = min(above, key=lambda name: rows[name]["afa_minus_this"]["mean"])
        everyone = len(above) == len(rivals)
        sentences.append(
            f"In `both` on mixed prompts, {SUBJECT} ({ours['mean']:.2f}) is significantly above "
            f"{'all of ' if everyone else ''}{', '.join(above)}; the closest of them is "
            f"{closest} with {rows[closest]['both']['mean']:.2f}, a difference of "
            f"{signed(rows[closest]['afa_minus_this'])}. None of these was trained on the scenes "
            "that the aggregators were trained on."
        )
    for kind, text in (
        ("not significant", "is not significantly different from"),
        ("below", "is significantly below"),
    ):
        if by_verdict.get(kind):
            sentences.append(
                f"In `both` on mixed prompts, {SUBJECT} {text} {', '.join(by_verdict[kind])}."
            )
    return sentences


def _tuned(rows: dict[str, Any], name: str) -> str:
    """Compare the subject with the tuned base, which needs no ensemble."""
    difference, theirs = rows[name]["afa_minus_this"], rows[name]["both"]["mean"]
    outcome = {
        "above": f"{SUBJECT} is significantly above it",
        "below": f"**{SUBJECT} is significantly below it**: tuning the base is the better choice",
        "not significant": f"**{SUBJECT} is not significantly different**",
    }[verdict(difference)]
    cost = rows[SUBJECT]["seconds_per_image"] / rows[name]["seconds_per_image"]
    return (
        f"The {name} gets {theirs:.2f}: {outcome} ({signed(difference)}), at a budget that only "
        f"includes the training of the aggregators. {SUBJECT} takes {cost:.1f} times as long per "
        "picture."
    )


def _own_domain(results: dict[str, Any]) -> list[str]:
    """Compare the subject with each expert in its own domain, losses first."""
    sentences = []
    for domain in EXPERTS:
        rows = {row["method"]: row for row in results["own_domain"][domain]}
        expert = rows[f"expert: {domain}"]
        difference = expert["afa_minus_this"]
        outcome = verdict(difference)
        words = {
            "above": "is significantly above",
            "below": "is significantly **below**",
            "not significant": "is not significantly different from",
        }[outcome]
        sentence = (
            f"On prompts of {domain} only, {SUBJECT} ({rows[SUBJECT]['both']['mean']:.2f}) {words} "
            f"the expert of {domain} ({expert['both']['mean']:.2f}; {signed(difference)})."
        )
        sentences.append((outcome != "below", sentence))
    return [sentence for _, sentence in sorted(sentences, key=lambda pair: pair[0])]


def _shell(results: dict[str, Any]) -> str:
    """State the effect of the ensemble's shell on an expert's own prompts."""
    gaps = []
    for domain in EXPERTS:
        rows = {row["method"]: row for row in results["own_domain"][domain]}
        alone, shell = rows[f"expert: {domain}"], rows[f"shell: {domain}"]
        gaps += [abs(shell[score]["mean"] - alone[score]["mean"]) for score in ("both", "clip_t")]
    if max(gaps) < _SAME:
        return (
            "An expert in the ensemble's shell has the same scores as alone, so the shell does not "
            "explain any difference. (All models of the zoo share an autoencoder and a tokenizer; "
            "with public checkpoints the shell may have an effect.)"
        )
    return (
        "On its own prompts, an expert in the ensemble's shell differs from the same expert alone "
        f"by at most {max(gaps):.2f} in `both` and in CLIP-T."
    )


def _fast(rows: dict[str, Any]) -> list[str]:
    """State what reusing cached features saves and costs."""
    ours = rows.get(fast(SUBJECT))
    if ours is None:
        return []
    words = {
        "above": "significantly worse than",
        "below": "significantly **better** than",
        "not significant": "not significantly different from",
    }[verdict(ours["afa_minus_this"])]
    alone = [row["seconds_per_image"] for name, row in rows.items() if name.startswith("expert:")]
    cost = ours["seconds_per_image"] / (sum(alone) / len(alone))
    worse = [
        f"{score} ({ours[key]['mean']:.3g}, exact {rows[SUBJECT][key]['mean']:.3g})"
        for key, score in _SETS.items()
        if key in ours and ours[key]["mean"] > rows[SUBJECT][key]["mean"]
    ]
    return [
        f"{fast(SUBJECT)} gets {ours['both']['mean']:.2f}, {words} {SUBJECT} at the exact speed "
        f"(difference {signed(ours['afa_minus_this'])}), in {cost:.1f} times the time of one "
        "expert." + (f" It has a worse {', '.join(worse)}." if worse else "")
    ]


def _at_equal_time(results: dict[str, Any]) -> list[str]:
    """Compare the subject at few steps, and its fast row, with others at equal time."""
    curve = results["curve"]
    fewest = min((row["num_steps"] for row in curve), default=0)
    points = {SUBJECT: fewest, fast(SUBJECT): results["sampling"]["num_steps"]}
    return [
        _in_the_time_of(row, curve)
        for row in curve
        if points.get(row["method"]) == row["num_steps"]
    ]


def _in_the_time_of(ours: dict[str, Any], curve: Sequence[dict[str, Any]]) -> str:
    """Compare one point of the curve with all other methods at equal time."""
    taken = ours["measured"]["seconds_per_image"]
    budget = _SAME_TIME * taken
    parts = []
    for name in dict.fromkeys(row["method"] for row in curve):
        points = [row for row in curve if row["method"] == name]
        within = [row for row in points if row["measured"]["seconds_per_image"] <= budget]
        if name in {SUBJECT, fast(SUBJECT)} or not within:
            continue
        most = max(within, key=lambda row: row["num_steps"])
        parts.append(
            f"{name} gets {most['scores']['both']['mean']:.2f} with {most['num_steps']} steps "
            f"({most['measured']['seconds_per_image']:.2f} s)"
        )
    others = "; ".join(parts) or "no other method finishes a picture"
    return (
        f"At {ours['num_steps']} steps, {ours['method']} takes {taken:.2f} s per picture and gets "
        f"{ours['scores']['both']['mean']:.2f} right; in the same time (plus 10 %), {others}. (On "
        f"the first {ours['num_prompts']} mixed prompts; without a significance test.)"
    )


def _variants(results: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Compare the variants with the subject.

    A variant has a single seed, whose variation is not in its interval. It only counts as different
    if it is outside the range of the subject's seeds.
    """
    rows = {row["method"]: row for row in results["rows"]}
    own = own_domain_means(results)
    ours = rows[SUBJECT]["both"]["by_replica"]
    sentences = []
    for name in names:
        difference, mean = rows[name]["afa_minus_this"], rows[name]["both"]["mean"]
        outcome = verdict(difference)
        if min(ours) <= mean <= max(ours):
            outcome = "not significant"
        words = {
            "above": f"significantly worse than {SUBJECT}",
            "below": f"significantly **better** than {SUBJECT}",
            "not significant": f"not significantly different from {SUBJECT}",
        }[outcome]
        sentence = f"{name} ({mean:.2f}, one seed) is {words}; difference {signed(difference)}."
        if outcome == "above":
            sentence += (
                f" On own-domain prompts it gets {own[name]:.2f}, {SUBJECT} {own[SUBJECT]:.2f}."
            )
        if name == _CONV_OUT and "hidden_ratio" not in VARIANTS[name]:
            sentence += _SMALL
        sentences.append(sentence)
    return sentences


def own_domain_means(results: dict[str, Any]) -> dict[str, float]:
    """`both` of each method, averaged over the own-domain prompts."""
    sums: dict[str, float] = {}
    for domain in EXPERTS:
        for row in results["own_domain"][domain]:
            sums[row["method"]] = sums.get(row["method"], 0.0) + row["both"]["mean"]
    return {method: total / len(EXPERTS) for method, total in sums.items()}
