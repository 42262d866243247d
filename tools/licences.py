"""Write docs/licences.md: the licence of everything that afa installs or ships.

    python -m tools.licences .venv-all     # an environment with all extras

Licences are read from the metadata of the installed distributions. A licence that is unknown or
not allowed is an error.
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

#: permissive licences and file-level copyleft: neither affects the licence of afa itself
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
_FIELDS = {
    "2-clause BSD License": "BSD-2-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
} | dict.fromkeys(("Apache 2.0", "Apache 2.0 License", "Apache License 2.0"), "Apache-2.0")
#: licences read from the licence file, for distributions that have no metadata of it or cannot be
#: installed together with the others
READ = {
    "atheris": "Apache-2.0",
    "audioop-lts": "PSF-2.0",
    "torchao": "BSD-3-Clause",
}
_PREFIX = "License :: OSI Approved :: "

_INTRO = """# Licences

This page lists the licence of afa, of the files that ship with it, and of every dependency. afa is
under the Apache License, version 2.0. To write this page anew:

```bash
make licences
```

The command reads the metadata of the installed distributions. It fails if a licence is unknown or
not one of these:

{allowed}

All of them permit use, modification and redistribution. MPL-2.0 requires that modified MPL files
stay under MPL-2.0. *BSD* means that a distribution does not state the number of clauses.

This page does not list the third-party libraries inside the binary files of a wheel. Each wheel
contains their licences. A CUDA build of torch installs NVIDIA's libraries under NVIDIA's own
licence, which is not an open-source licence. afa does not require them.

## Files that ship with afa

The wheel contains all of these files, and also `NOTICE` and `LICENSE`.

{assets}
"""
_CORE = "`pip install afa` installs these distributions, including indirect dependencies."
_EXTRA = "`afa[{extra}]` adds these distributions{besides}."
_NOTHING = "This extra adds no distribution to the core."
_ELSEWHERE = "Only other systems or newer versions of Python need these distributions."


def licence_of(distribution: Distribution) -> str:
    """Return a distribution's licence as an SPDX expression.

    Raises:
        AfaError: if the metadata names no known licence.
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
            f"The metadata of {name} {distribution.version} names no licence. Read its licence "
            "file, and add the licence to READ in tools/licences.py.",
        )
    return licence


def check(name: str, licence: str) -> str:
    """Return the licence if every licence that it names is allowed.

    Raises:
        AfaError: if one is not allowed.
    """
    named = {each.strip() for each in re.split(r"\bAND\b|\bOR\b|[()]", licence)} - {""}
    if unknown := sorted(named - ALLOWED):
        raise AfaError(
            "AFA-TOOL-006",
            f"The licence '{', '.join(unknown)}' of {name} is not allowed. Remove {name}, or add "
            "the licence to ALLOWED in tools/licences.py if its terms are compatible with afa.",
        )
    return licence


def as_page(installed: Installed, pins: Pins) -> str:
    """The complete page as Markdown."""
    assets = [[f"`{row.path}`", row.what, row.who, row.licence, row.text] for row in ASSETS]
    head = ["path", "content", "author", "licence", "licence text"]
    sections = [
        _INTRO.format(
            allowed=fill(", ".join(sorted(ALLOWED)) + ".", 100), assets=_table(head, assets)
        ),
    ]
    for extra, (names, included) in installed.parts().items():
        besides = f", beyond those of {' and '.join(included)}" if included else ""
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
            f"The licence of {pin.name} is unknown, because it cannot be installed here. Read its "
            "licence file, and add the licence to READ in tools/licences.py.",
        )
    return READ[pin.name]


def _row(name: str, version: str, licence: str) -> list[str]:
    return [canonicalize_name(name), version, check(name, licence)]


def public(version: str) -> str:
    """Return a version without its build: 2.13.0 for 2.13.0+cpu."""
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
