"""The outcomes of every picture of `benchmarks.unseen`, and the tables of docs/drafts.md.

python -m benchmarks.unseen_outcomes    # docs/unseen/ZOO-CHOICE.json to docs/drafts.md
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afa.files import read_json
from afa.statistics import mean_interval, paired_difference
from afa.zoo.scenes import parse_caption
from afa.zoo.sprites import DOMAIN_OF
from benchmarks.outcomes import bits_of, clusters_of, outcomes_of, replace_between, write_content
from benchmarks.unseen_prompts import GROUPS, OWN_SEEN, OWN_UNSEEN, SEEN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from afa.statistics import Clusters, Interval, Scores

DOCS = Path(__file__).parent.parent / "docs"
FOLDER, PAGE = "unseen", "drafts.md"
BASE, DRAFTS, ORACLE, EXPERT = "base", "drafts alone", "oracle mask", "expert: "
#: the row of each prompt's own expert, on prompts of one domain
OWN_EXPERT = "the domain's expert"
#: after the name of aggregators: with drafts for prompts that name unseen objects
DEFAULT = ", drafts for unknown words"
#: with the judgement of drafts added to the aggregators' logits; and the same without the
#: aggregators for prompts that name unseen objects
KEPT, OF_KNOWN = " and drafts", " and drafts, AFA for known words"


def write_outcomes(
    path: Path,
    recipe: Mapping[str, Any],
    output: Path,
    oracle: Sequence[bool],
    about: Mapping[str, Any],
) -> None:
    """Write what every row drew, right or wrong.

    Args:
        path: of the file.
        recipe: of the comparison.
        output: its folder.
        oracle: the outcomes of the mask that knows the layout, in the order of the prompts.
        about: further content: the zoo, the choice, and the lengths of trainings.
    """
    content = {**about, **outcomes_of(recipe, output)}
    content["rows"][ORACLE] = {"both": [bits_of(oracle)], "calls": None}
    write_content(path, content)


class Outcomes:
    """The outcomes of several choices of unseen objects in one zoo, as one set of prompts.

    Args:
        contents: of the files of `write_outcomes`, one for each choice.
    """

    def __init__(self, contents: Sequence[Mapping[str, Any]]) -> None:
        self.contents = contents
        listed = [prompt for content in contents for prompt in content["prompts"]]
        self._captions = [caption for caption, _ in listed]
        self._groups = [group for _, group in listed]
        shared = [{*content["rows"]} for content in contents]
        self._drawn = [name for name in contents[0]["rows"] if all(name in s for s in shared)]

        self._on_scenes = {*contents[0]["trained_on_scenes"]}

    @property
    def names(self) -> Iterator[str]:
        """The rows, in the order of the table: single experts are one row."""
        for name in self._drawn:
            if not name.startswith(EXPERT):
                yield name
            if self.has_default(name):
                yield name + DEFAULT
                if name + KEPT in self._drawn:
                    yield name + OF_KNOWN
        if any(name.startswith(EXPERT) for name in self._drawn):
            yield OWN_EXPERT

    @staticmethod
    def _of_known(name: str) -> str:
        """The row whose pictures of prompts with seen objects a row has."""
        if name.endswith(OF_KNOWN):
            return name.removesuffix(OF_KNOWN) + KEPT
        return name.removesuffix(DEFAULT)

    def has_default(self, name: str) -> bool:
        """Whether a row has trained aggregators that do not know the words of unseen objects."""
        return name in self._on_scenes and DRAFTS in self._drawn

    def scores(self, name: str, group: str) -> Scores | None:
        """The outcomes [trainings, prompts] of a row; None if it has none in this group.

        Ensembles with a judge draw prompts with unknown words as drafts alone do, and all others as
        without a judge; see `afa.drafting`. The words of unseen objects are the unknown ones.
        """
        places = [n for n, each in enumerate(self._groups) if each == group]
        known, is_seen = self._of_known(name), group in (SEEN, OWN_SEEN)
        if known != name:
            return self.scores(known if is_seen else DRAFTS, group)
        if name == OWN_EXPERT:
            if group not in (OWN_SEEN, OWN_UNSEEN):
                return None
            owners = [EXPERT + DOMAIN_OF[parse_caption(self._captions[n]).left] for n in places]
            by_owner = {owner: self._all(owner) for owner in {*owners}}
            return np.stack([by_owner[o][:, n] for o, n in zip(owners, places, strict=True)], 1)
        return self._all(name)[:, places]

    def _all(self, name: str) -> Scores:
        listed = [content["rows"][name]["both"] for content in self.contents]
        count = min(len(each) for each in listed)
        joined = ["".join(each[n] for each in listed) for n in range(count)]
        return np.array([[float(bit) for bit in bits] for bits in joined])

    def mean(self, name: str, group: str) -> Interval | None:
        """The share of right pictures, with an interval over pairs of objects and trainings."""
        scores = self.scores(name, group)
        if scores is None:
            return None
        return mean_interval(scores, is_outcome=True, clusters=self._clusters(group))

    def difference(self, name: str, other: str, group: str) -> Interval | None:
        """The difference of two rows with its interval; None if one has no outcomes."""
        ours, theirs = self.scores(name, group), self.scores(other, group)
        if ours is None or theirs is None:
            return None
        return paired_difference(ours, theirs, clusters=self._clusters(group)).difference

    def _clusters(self, group: str) -> Clusters:
        listed = zip(self._captions, self._groups, strict=True)
        return clusters_of(caption for caption, each in listed if each == group)

    def calls(self, name: str) -> str:
        """The evaluations of one expert's denoiser for a picture."""

        def of(drawn: str) -> str:
            found = self.contents[0]["rows"][drawn]["calls"]
            return "" if found is None else f"{found:.0f}"

        if name == OWN_EXPERT:
            return next(of(each) for each in self._drawn if each.startswith(EXPERT))
        known = self._of_known(name)
        return (
            of(known)
            if of(known) == of(DRAFTS) or known == name
            else f"{of(known)} or {of(DRAFTS)}"
        )

    def table(self) -> Iterator[str]:
        """The shares of right pictures of all rows."""
        yield f"| row | {' | '.join(GROUPS)} | calls | trainings |"
        yield "|---" * (len(GROUPS) + 3) + "|"
        for name in self.names:
            cells = [str(self.mean(name, group) or "") for group in GROUPS]
            drawn = self._of_known(name).removesuffix(KEPT)
            counts = [
                len(content["rows"].get(drawn, {}).get("both", ())) for content in self.contents
            ]
            # trainings without scenes do not depend on the choice
            of_choices = sum(counts) if drawn in self._on_scenes else max(counts)
            shown = str(of_choices) if drawn in self.contents[0]["trainings"] else ""
            yield f"| {' | '.join([name, *cells, self.calls(name), shown])} |"

    def checks(self) -> Iterator[str]:
        """The rows that combine experts against the base and against each domain's expert."""
        of_base = [f"{group}: minus base" for group in GROUPS[1:3]]
        of_expert = [f"{group}: minus expert" for group in GROUPS[3:]]
        yield f"| {' | '.join(['row', *of_base, *of_expert])} |"
        yield "|---" * 5 + "|"
        for name in self.names:
            drawn = self._of_known(name).removesuffix(KEPT)
            if drawn != DRAFTS and drawn not in self.contents[0]["trainings"]:
                continue
            found = [self.difference(name, BASE, group) for group in GROUPS[1:3]]
            found += [self.difference(name, OWN_EXPERT, group) for group in GROUPS[3:]]
            cells = [f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]" if d else "" for d in found]
            yield f"| {' | '.join([name, *cells])} |"


def read_zoos(folder: Path) -> dict[str, Outcomes]:
    """The outcomes in a folder, by zoo."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        found.setdefault(content["zoo"], []).append(content)
    return {zoo: Outcomes(contents) for zoo, contents in found.items()}


def write_page(docs: Path) -> None:
    """Replace the tables between the marks of docs/drafts.md."""
    for zoo, outcomes in read_zoos(docs / FOLDER).items():
        replace_between(docs / PAGE, zoo, [*outcomes.table(), "", *outcomes.checks()])


if __name__ == "__main__":
    write_page(DOCS)
