"""Plain words for the study's figures; every sentence is decided by the figures themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.studies.results.plan import OTHER_EXPERTS, SPED_UP, STEPS, SUBJECT, TIME, VARIANTS, fast
from afa.zoo import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LEVEL = 0.05
_SAME = 1e-3  # of a mean score: rounding moves a picture by a level or two
_SAME_TIME = 1.1  # noise of timing must not decide who is compared
_TUNED = (STEPS, TIME)
_SETS = {"cmmd": "CMMD", "fid": "FID", "kid": "KID"}  # lower is better
_CONV_OUT = "ablation: conv_out only"
_SMALL = (
    " Its aggregator is too small to say anything about fusing predictions alone: at the paper's "
    "size it was not told apart, see the limits above."
)


def conclusions(results: dict[str, Any]) -> list[str]:
    """What a reader may take away: first what speaks against the subject, then the rest."""
    rows = {row["method"]: row for row in results["rows"]}
    variants = [*VARIANTS, *OTHER_EXPERTS]
    no_rivals = {SUBJECT, *variants, *_TUNED, *map(fast, SPED_UP)}
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
    """`above`, `below`, or `not told apart`.

    Told apart are methods whose interval excludes zero and whose wins and losses an exact sign test
    tells apart, too; of few prompts a bootstrap alone is too sure.
    """
    if difference["p_value"] >= _LEVEL:
        return "not told apart"
    if difference["low"] > 0:
        return "above"
    return "below" if difference["high"] < 0 else "not told apart"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)


def _signed(difference: dict[str, float]) -> str:
    return f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def _other_scores(rows: dict[str, Any]) -> list[str]:
    """Which rows are lower than the subject by a distance of the whole set of pictures."""
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
            f"By {score} on mixed prompts (lower is better; no interval) {SUBJECT} has "
            f"{_with_seeds(ours)}"
            + (f" and is **not the lowest**; lower are: {listed}." if lower else "; no row less.")
        )
    return sentences


def _with_seeds(score: dict[str, Any]) -> str:
    """A score with its range over the seeds of training, where there are several."""
    by_seed = score["by_replica"]
    text = f"{score['mean']:.3g}"
    return f"{text} (seeds {min(by_seed):.3g} to {max(by_seed):.3g})" if len(by_seed) > 1 else text


def _against(rows: dict[str, Any], rivals: Sequence[str]) -> list[str]:
    """Mixed prompts against everything that combines or is an expert, and the base."""
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
            f"By `both` on mixed prompts {SUBJECT} ({ours['mean']:.2f} of the pictures right) is "
            f"above {'all of ' if everyone else ''}{_names(above)}; the closest of them is "
            f"{closest} with {rows[closest]['both']['mean']:.2f}, a difference of "
            f"{_signed(rows[closest]['afa_minus_this'])}. None of these was trained on the scenes "
            "that the aggregators were trained on."
        )
    for kind, text in (("not told apart", "cannot be told apart from"), ("below", "is below")):
        if by_verdict.get(kind):
            sentences.append(
                f"By `both` on mixed prompts {SUBJECT} {text} {_names(by_verdict[kind])}."
            )
    return sentences


def _tuned(rows: dict[str, Any], name: str) -> str:
    """The control that needs no ensemble at all."""
    difference, theirs = rows[name]["afa_minus_this"], rows[name]["both"]["mean"]
    outcome = {
        "above": f"{SUBJECT} is above it",
        "below": f"**{SUBJECT} is below it**: training the base on such data is the better choice",
        "not told apart": f"**{SUBJECT} cannot be told apart from it**",
    }[verdict(difference)]
    cost = rows[SUBJECT]["seconds_per_image"] / rows[name]["seconds_per_image"]
    return (
        f"The {name} gets {theirs:.2f}: {outcome} ({_signed(difference)}), at a budget that counts "
        f"the training of the aggregators alone. A picture of {SUBJECT} takes {cost:.1f} times as "
        "long."
    )


def _own_domain(results: dict[str, Any]) -> list[str]:
    """In an expert's own domain: is the ensemble as good as that expert? Where not, first."""
    sentences = []
    for domain in EXPERTS:
        rows = {row["method"]: row for row in results["own_domain"][domain]}
        expert = rows[f"expert: {domain}"]
        difference = expert["afa_minus_this"]
        outcome = verdict(difference)
        words = {
            "above": "is above",
            "below": "is **below**",
            "not told apart": "cannot be told apart from",
        }[outcome]
        sentence = (
            f"On prompts of {domain} alone {SUBJECT} ({rows[SUBJECT]['both']['mean']:.2f}) {words} "
            f"the expert of {domain} ({expert['both']['mean']:.2f}; {_signed(difference)})."
        )
        sentences.append((outcome != "below", sentence))
    return [sentence for _, sentence in sorted(sentences, key=lambda pair: pair[0])]


def _shell(results: dict[str, Any]) -> str:
    """What the shell by itself does, on an expert's own prompts."""
    gaps = []
    for domain in EXPERTS:
        rows = {row["method"]: row for row in results["own_domain"][domain]}
        alone, shell = rows[f"expert: {domain}"], rows[f"shell: {domain}"]
        gaps += [abs(shell[score]["mean"] - alone[score]["mean"]) for score in ("both", "clip_t")]
    if max(gaps) < _SAME:
        return (
            "An expert in the ensemble's shell scores what it scores alone: the shell explains "
            "none of the differences. (All models of the zoo have one autoencoder and one "
            "tokenizer; with checkpoints from the web the shell may well matter.)"
        )
    return (
        f"An expert in the ensemble's shell differs from the same expert alone, on its own "
        f"prompts, by at most {max(gaps):.2f} of `both` and of CLIP-T."
    )


def _fast(rows: dict[str, Any]) -> list[str]:
    """What taking features over from earlier steps saves and costs."""
    ours = rows.get(fast(SUBJECT))
    if ours is None:
        return []
    words = {
        "above": "worse than",
        "below": "**better** than",
        "not told apart": "not told apart from",
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
        f"(which is {_signed(ours['afa_minus_this'])} above), in {cost:.1f} times the time of one "
        "expert." + (f" It is worse by {', '.join(worse)}." if worse else "")
    ]


def _at_equal_time(results: dict[str, Any]) -> list[str]:
    """The paper's claim of few steps, at equal cost; and the fast one at the usual steps."""
    curve = results["curve"]
    fewest = min((row["num_steps"] for row in curve), default=0)
    points = {SUBJECT: fewest, fast(SUBJECT): results["sampling"]["num_steps"]}
    return [
        _in_the_time_of(row, curve)
        for row in curve
        if points.get(row["method"]) == row["num_steps"]
    ]


def _in_the_time_of(ours: dict[str, Any], curve: Sequence[dict[str, Any]]) -> str:
    """What the rivals get in the time that one point of the curve takes."""
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
    rivals = "; ".join(parts) or "none of the others draws one"
    return (
        f"At {ours['num_steps']} steps {ours['method']} takes {taken:.2f} s for a picture and gets "
        f"{ours['scores']['both']['mean']:.2f} right; in as much time, "
        f"give or take a tenth, {rivals}. (The first {ours['num_prompts']} mixed prompts; these "
        "differences were not tested.)"
    )


def _variants(results: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Other aggregators and other numbers of experts against the whole method.

    One of a single seed is only told apart where it is outside of what the whole method's seeds
    got, since its own luck is not in the interval.
    """
    rows = {row["method"]: row for row in results["rows"]}
    own = own_domain_means(results)
    ours = rows[SUBJECT]["both"]["by_replica"]
    sentences = []
    for name in names:
        difference, mean = rows[name]["afa_minus_this"], rows[name]["both"]["mean"]
        outcome = verdict(difference)
        if min(ours) <= mean <= max(ours):
            outcome = "not told apart"
        words = {
            "above": f"worse than {SUBJECT}",
            "below": f"**better** than {SUBJECT}",
            "not told apart": f"not told apart from {SUBJECT}",
        }[outcome]
        sentence = f"{name} ({mean:.2f}, one seed) is {words}; difference {_signed(difference)}."
        if outcome == "above":
            sentence += (
                f" On own-domain prompts it gets {own[name]:.2f}, {SUBJECT} {own[SUBJECT]:.2f}."
            )
        if name == _CONV_OUT and "hidden_ratio" not in VARIANTS[name]:
            sentence += _SMALL
        sentences.append(sentence)
    return sentences


def own_domain_means(results: dict[str, Any]) -> dict[str, float]:
    """`both` of every method, averaged over the domains' own prompts."""
    sums: dict[str, float] = {}
    for domain in EXPERTS:
        for row in results["own_domain"][domain]:
            sums[row["method"]] = sums.get(row["method"], 0.0) + row["both"]["mean"]
    return {method: total / len(EXPERTS) for method, total in sums.items()}
