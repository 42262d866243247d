"""The table of pairs in docs/compatibility.md, which these tests write and are held against.

make pairs      # tries every pair and writes the table
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tests.pairs.features import NAMES, SPREAD
from tests.pairs.matrix import Outcome

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
#: what came of every pair, by family
RECORD = PAGE.parent / "pairs.json"
_BEGIN, _END = "<!-- pairs: written by the tests -->\n", "<!-- end of pairs -->\n"
#: features that transformers with packed latents refuse, alone and beside all others
UNET_ONLY = frozenset({"mixed predictions"})
#: experts of several architectures, whose table would only differ by what is refused
PREDICTIONS = "predictions"
SYMBOLS = {"equal": "=", "close": "≈", "ordered": "order", "refused": "no"}


def key_of(first: str, second: str) -> str:
    """A pair's name, whichever was switched on first."""
    one, other = sorted((first, second), key=NAMES.index)
    return f"{one} + {other}"


def every_pair() -> list[tuple[str, str]]:
    """All pairs, a feature with itself included."""
    return [(a, b) for n, a in enumerate(NAMES) for b in NAMES[n:]]


def recorded() -> dict[str, dict[str, Outcome]]:
    """What came of every pair when the table was written, by family and pair."""
    told = json.loads(RECORD.read_text(encoding="utf-8"))
    return {
        family: {key: Outcome(*outcome) for key, outcome in pairs.items()}
        for family, pairs in told.items()
    }


def write(outcomes: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Write the record and the table."""
    told = {
        family: {key: [o.kind, o.message] for key, o in sorted(pairs.items())}
        for family, pairs in sorted(outcomes.items())
    }
    RECORD.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    PAGE.write_text(before + _BEGIN + rendered(outcomes) + _END + after, encoding="utf-8")


def in_page() -> str:
    """The table as the page has it."""
    return PAGE.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]


def rendered(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The table and the refusals as Markdown."""
    numbers = range(1, len(NAMES) + 1)
    lines = [f"| | {' | '.join(map(str, numbers))} |", "|---" * (len(NAMES) + 1) + "|"]
    refusals: dict[str, list[str]] = {}
    for n, first in enumerate(NAMES):
        cells = []
        for second in NAMES[: n + 1]:
            key = key_of(first, second)
            is_general = UNET_ONLY.isdisjoint((first, second))
            families = ["unet", "flux"] if is_general else ["unet"]
            of_pair = [outcomes[family][key] for family in families]
            kinds = {outcome.kind for outcome in of_pair}
            assert len(kinds) == 1 or kinds == {"equal", "close"}, f"{key} depends on the family"
            cells.append(SYMBOLS["close" if "close" in kinds else kinds.pop()])
            if of_pair[0].message:
                refusals.setdefault(of_pair[0].message, []).append(key)
        cells += [""] * (len(NAMES) - len(cells))
        lines.append(f"| {n + 1} {first} | {' | '.join(cells)} |")
    lines += ["", "What a refusal says:", ""]
    lines += [f'- {", ".join(keys)}: "{message}"' for message, keys in refusals.items()]
    lines += ["", *_of_predictions(outcomes[PREDICTIONS])]
    return "\n".join(["", *lines, ""]) + "\n"


def _of_predictions(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What is refused where predictions alone are fused: features beside all others, and pairs."""
    refused = {key for key, each in outcomes.items() if each.kind in ("refused", "ordered")}
    always = [name for name in NAMES if _pairs_with(name, outcomes) <= refused]
    always.remove(SPREAD.name)  # is not tried
    of_these = set().union(*(_pairs_with(name, outcomes) for name in always))
    return [
        "Two U-Nets and a transformer with different text encoders, whose predictions alone are "
        "fused ([`fuse: predictions`](checkpoints.md#experts-of-different-architectures)):",
        "",
        f"- refused beside everything: {', '.join(always)};",
        f"- refused, or equal in one order: {'; '.join(sorted(refused - of_these))};",
        f"- the other {len(outcomes.keys() - refused - of_these)} pairs are equal.",
    ]


def _pairs_with(name: str, outcomes: Mapping[str, Outcome]) -> set[str]:
    return {key for key in outcomes if name in key.split(" + ")}
