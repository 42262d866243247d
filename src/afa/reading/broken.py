"""Errors of single samples, of which a data set may contain a few."""

from __future__ import annotations

from afa.errors import AfaError


class BrokenSample(AfaError):
    """A sample that cannot be used; `data.max_broken` is the number that a training accepts."""


class BrokenPicture(BrokenSample):
    """A picture that cannot be read completely and correctly."""


class MissingCaption(BrokenSample):
    """A picture whose caption is missing or null."""
