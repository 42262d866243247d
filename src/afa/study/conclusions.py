"""Plain words for the study's figures; every sentence is decided by the figures themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.study.plan import OTHER_EXPERTS, SPED_UP, SUBJECT, VARIANTS, fast
from afa.zoo import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LEVEL = 0.05
_SAME = 1e-3  # of a mean score: rounding moves a picture by a level or two
_SAME_TIME = 1.1  # noise of timing must not decide who is compared
_TUNED = ("tuned base (steps)", "tuned base (time)")


def conclusions(results: dict[str, Any]) -> list[str]:
    """What a reader may take away, in the order of interest."""
    rows = {row["method"]: row for row in results["rows"]}
    variants = [*VARIANTS, *OTHER_EXPERTS]
    no_rivals = {SUBJECT, *variants, *_TUNED, *map(fast, SPED_UP)}
    rivals = [name for name in rows if name not in no_rivals]
    return [
        *_against(rows, rivals),
        *(_tuned(rows, name) for name in _TUNED),
        *_own_domain(results),
        _shell(results),
        *_fast(rows),
        *_at_equal_time(results),
        *_variants(rows, [name for name in variants if name in rows]),
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
            f"On mixed prompts {SUBJECT} ({ours['mean']:.2f} of the pictures right) is above "
            f"{'all of ' if everyone else ''}{_names(above)}; the closest of them is {closest} "
            f"with {rows[closest]['both']['mean']:.2f}, a difference of "
            f"{_signed(rows[closest]['afa_minus_this'])}."
        )
    for kind, text in (("not told apart", "cannot be told apart from"), ("below", "is below")):
        if by_verdict.get(kind):
            sentences.append(f"On mixed prompts {SUBJECT} {text} {_names(by_verdict[kind])}.")
    return sentences


def _tuned(rows: dict[str, Any], name: str) -> str:
    """The control that needs no ensemble at all."""
    difference, theirs = rows[name]["afa_minus_this"], rows[name]["both"]["mean"]
    outcome = {
        "above": f"{SUBJECT} is above it",
        "below": f"**{SUBJECT} is below it**: whoever can train the base on such data does "
        "better to do that",
        "not told apart": f"**{SUBJECT} cannot be told apart from it**",
    }[verdict(difference)]
    cost = rows[SUBJECT]["seconds_per_image"] / rows[name]["seconds_per_image"]
    return (
        f"The {name} gets {theirs:.2f}: {outcome} ({_signed(difference)}). A picture of {SUBJECT} "
        f"takes {cost:.1f} times as long."
    )


def _own_domain(results: dict[str, Any]) -> list[str]:
    """In an expert's own domain: is the ensemble as good as that expert?"""
    sentences = []
    for domain in EXPERTS:
        rows = {row["method"]: row for row in results["own_domain"][domain]}
        expert = rows[f"expert: {domain}"]
        difference = expert["afa_minus_this"]
        words = {
            "above": "is above",
            "below": "is **below**",
            "not told apart": "cannot be told apart from",
        }[verdict(difference)]
        sentences.append(
            f"On prompts of {domain} alone {SUBJECT} ({rows[SUBJECT]['both']['mean']:.2f}) {words} "
            f"the expert of {domain} ({expert['both']['mean']:.2f}; {_signed(difference)})."
        )
    return sentences


def _shell(results: dict[str, Any]) -> str:
    """What the shell by itself does, on an expert's own prompts."""
    gaps = []
    for domain in EXPERTS:
        rows = {row["method"]: row for row in results["own_domain"][domain]}
        alone, shell = rows[f"expert: {domain}"], rows[f"shell: {domain}"]
        gaps += [abs(shell[score]["mean"] - alone[score]["mean"]) for score in ("both", "clip_t")]
    if max(gaps) < _SAME:
        return (
            "An expert in the ensemble's shell scores what it scores alone: nothing of the gain "
            "comes from the shell. (All models of the zoo have one autoencoder and one tokenizer; "
            "with checkpoints from the web the shell may well matter.)"
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
    return [
        f"{fast(SUBJECT)} gets {ours['both']['mean']:.2f}, {words} {SUBJECT} at the exact speed "
        f"(which is {_signed(ours['afa_minus_this'])} above), in {cost:.1f} times the time of one "
        "expert."
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
        f"give or take a tenth, {rivals}."
    )


def _variants(rows: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Other aggregators and other numbers of experts against the whole method.

    One of a single seed is only told apart where it is outside of what the whole method's seeds
    got, since its own luck is not in the interval.
    """
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
        sentences.append(
            f"{name} ({mean:.2f}, one seed) is {words}; difference {_signed(difference)}."
        )
    return sentences
