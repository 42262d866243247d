"""Findings about what a recipe names besides models."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.loading.finding import Finding, Level

if TYPE_CHECKING:
    from collections.abc import Iterator

    from afa.training.data.summary import DataSummary
    from afa.training.transform import Transform


@dataclass
class Inputs:
    """The result of checking inputs.

    Attributes:
        summary: one line about the data; None without a data set.
        findings: in the order of the checks.
        details: sizes, crops, captions and duplicates of the data; None without pictures.
        transform: crops and flips of the training pictures; None if they are unknown.
        has_data: whether the data could be opened.
    """

    summary: str | None = None
    findings: list[Finding] = field(default_factory=list)
    details: DataSummary | None = None
    transform: Transform | None = None
    has_data: bool = False

    @contextmanager
    def refusals(self, check: str) -> Iterator[None]:
        """Record an `AfaError` raised inside the block as a finding."""
        try:
            yield
        except AfaError as error:
            if not any(each.text == str(error) for each in self.findings):
                self.findings.append(Finding(error.code, "error", check, str(error)))

    def say(self, check: str, lines: Any, level: Level = "warning") -> None:
        """Record warnings or notes."""
        self.findings += [Finding("AFA-CHECK-001", level, check, line) for line in lines]
