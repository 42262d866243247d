"""Findings: the results of checking experts before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable

Level = Literal["error", "warning", "note"]
_ORDER: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One result of a check that the user should know before any work.

    Attributes:
        code: stable name of the finding, see `afa.errors.AfaError`.
        level: `error` if the work cannot be done, `warning` if the result may be bad.
        check: what was checked, such as `architecture`.
        says: what is wrong and what is required.
        means: the effect on pictures.
        remedy: how to fix it.
    """

    code: str
    level: Level
    check: str
    says: str
    means: str = ""
    remedy: str = ""

    @property
    def text(self) -> str:
        """The complete finding on one line."""
        return " ".join(part for part in (self.says, self.means, self.remedy) if part)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings, errors first."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.level))


def require_none_wrong(findings: Iterable[Finding]) -> None:
    """Raise the first error among findings.

    Raises:
        AfaError: if there is one, with its code and text.
    """
    for finding in findings:
        if finding.level == "error":
            raise AfaError(finding.code, finding.text)
