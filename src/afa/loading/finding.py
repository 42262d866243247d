"""What a look at experts has found."""

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
    """One thing that a user should know before any work.

    Attributes:
        code: stable name of what was found, see `afa.errors.AfaError`.
        level: `error` where the work cannot be done, `warning` where it can and may disappoint.
        check: what was looked at, such as `architecture`.
        says: what must hold and what came.
        means: what that would do to a picture.
        remedy: what to do about it.
    """

    code: str
    level: Level
    check: str
    says: str
    means: str = ""
    remedy: str = ""

    @property
    def text(self) -> str:
        """All of it, on one line."""
        return " ".join(part for part in (self.says, self.means, self.remedy) if part)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.level))


def require_none_wrong(findings: Iterable[Finding]) -> None:
    """Raise the first error among findings.

    Raises:
        AfaError: its text.
    """
    for finding in findings:
        if finding.level == "error":
            raise AfaError(finding.code, finding.text)
