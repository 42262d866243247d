"""Write docs/licences.md: under what terms everything is that afa installs or ships.

    python -m tools.licences .venv-all     # an environment with all extras

Licences are read from the metadata of what is installed. One that is not known, or not among the
allowed, is an error.
"""

from __future__ import annotations

import argparse
import re
from importlib.metadata import Distribution
from pathlib import Path
from textwrap import fill

from packaging.utils import canonicalize_name

from afa.errors import AfaError
from afa.files import write_atomic
from tools import ROOT, run, say
from tools.assets import ASSETS
from tools.installed import EVERYTHING, Installed
from tools.pins import EXTRAS_LOCK, LOCK, Pin, Pins, read_pins

PAGE = ROOT / "docs" / "licences.md"

#: permissive ones, and of copyleft those that end at the file: afa may be used and passed on with
#: these beside it under its own terms
ALLOWED = frozenset(
    {
        *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause"),
        *("BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU", "PSF-2.0"),
        *("Zlib", "MPL-2.0"),
    }
)
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
_FIELDS = {"3-Clause BSD License": "BSD-3-Clause"} | dict.fromkeys(
    ("Apache 2.0", "Apache 2.0 License", "Apache License 2.0"), "Apache-2.0"
)
#: where the metadata says nothing, or the distribution cannot be installed with the others: read in
#: its licence file
READ = {
    "atheris": "Apache-2.0",
    "audioop-lts": "PSF-2.0",
    "torchao": "BSD-3-Clause",
}
_PREFIX = "License :: OSI Approved :: "

_INTRO = """# Licences

afa itself is under the Apache License, version 2.0. This page is written by `make licences` from
the metadata of what is installed, which fails for a licence that is unknown or not among these:

{allowed}

All of them permit use, change and redistribution; MPL-2.0 asks that changes to its own files stay
under it. *BSD* stands where a distribution does not say how many clauses.

The binary files of a wheel can hold libraries of others, whose licences the wheel brings along;
they are not listed here. A CUDA build of torch installs NVIDIA's libraries, whose terms are
NVIDIA's own and no open licence; afa does not ask for them.

## What ships with afa

All of it is in the wheel. `NOTICE` and `LICENSE` are in it, too.

{assets}
"""
_CORE = "What `pip install afa` installs besides, dependencies of dependencies included."
_EXTRA = "What `afa[{extra}]` adds{besides}."
_NOTHING = "Nothing that the core does not need as well."
_ELSEWHERE = "On other systems or newer Pythons than this page was written on."


def licence_of(distribution: Distribution) -> str:
    """A distribution's licence as an SPDX expression.

    Raises:
        AfaError: it says nothing that is understood.
    """
    metadata, name = distribution.metadata, canonicalize_name(distribution.name)
    (expression, *_) = metadata.get_all("License-Expression") or [""]
    if expression:
        return expression
    (field, *_) = metadata.get_all("License") or [""]
    given = _FIELDS.get(field.strip(), field.strip())
    found = sorted(
        {
            _CLASSIFIERS.get(each.removeprefix(_PREFIX), each)
            for each in metadata.get_all("Classifier") or []
            if each.startswith("License :: ")
        }
    )
    if found and not (found == ["BSD"] and given.startswith("BSD-") and given in ALLOWED):
        return " AND ".join(found)
    licence = given if given and "\n" not in given else READ.get(name)
    if licence is None:
        raise AfaError(
            "AFA-TOOL-005",
            f"The licence of every distribution must be known, and {name} {distribution.version} "
            "names none. Read its licence file, and add it to READ in tools/licences.py.",
        )
    return licence


def check(name: str, licence: str) -> str:
    """The licence, if all that it names are allowed.

    Raises:
        AfaError: one is not.
    """
    named = {each.strip() for each in re.split(r"\bAND\b|\bOR\b|[()]", licence)} - {""}
    if unknown := sorted(named - ALLOWED):
        raise AfaError(
            "AFA-TOOL-006",
            f"Licences must be among the allowed of tools/licences.py, came '{', '.join(unknown)}' "
            f"of {name}. Do without {name}, or allow it there if its terms suit afa.",
        )
    return licence


def as_page(installed: Installed, pins: Pins) -> str:
    """The whole page."""
    assets = [[f"`{row.path}`", row.what, row.who, row.licence, row.text] for row in ASSETS]
    head = ["what", "is", "by", "licence", "its text"]
    sections = [
        _INTRO.format(
            allowed=fill(", ".join(sorted(ALLOWED)) + ".", 100), assets=_table(head, assets)
        ),
    ]
    for extra, (names, included) in installed.parts().items():
        besides = f" to what {' and '.join(included)} add" if included else ""
        text = _EXTRA.format(extra=extra, besides=besides) if extra else _CORE
        found = [installed.distributions[name] for name in sorted(names)]
        rows = [_row(each.name, public(each.version), licence_of(each)) for each in found]
        sections.append(_section(extra or "Core", text if rows else _NOTHING, rows))
    elsewhere = [
        pin for name, pin in pins.items() if canonicalize_name(name) not in installed.distributions
    ]
    if elsewhere:
        rows = [_row(pin.name, pin.version, _read(pin)) for pin in elsewhere]
        sections.append(_section("Elsewhere", _ELSEWHERE, rows))
    return "\n".join(sections)


def _read(pin: Pin) -> str:
    if pin.name not in READ:
        raise AfaError(
            "AFA-TOOL-007",
            f"The licence of every distribution must be known, and {pin.name} cannot be installed "
            "here. Read its licence file, and add it to READ in tools/licences.py.",
        )
    return READ[pin.name]


def _row(name: str, version: str, licence: str) -> list[str]:
    return [canonicalize_name(name), version, check(name, licence)]


def public(version: str) -> str:
    """A version without the build that it is of: 2.13.0+cpu is 2.13.0."""
    return version.partition("+")[0]


def _section(title: str, text: str, rows: list[list[str]]) -> str:
    table = [_table(["distribution", "version", "licence"], rows), ""] if rows else []
    return "\n".join([f"## {title}", "", text, "", *table])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path, nargs="?", default=EVERYTHING)
    installed = Installed(parser.parse_args().venv)
    page = as_page(installed, read_pins(LOCK) | read_pins(EXTRAS_LOCK))
    write_atomic(PAGE, page)
    say(f"{PAGE.relative_to(ROOT)}: {page.count(chr(10) + '| ')} rows")


if __name__ == "__main__":
    run(main)
