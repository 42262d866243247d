"""The experiments of the study and the stages of each, by which a command chooses its work."""

from __future__ import annotations

from enum import StrEnum


class Experiment(StrEnum):
    """A question of the study; each has one world, or a series of them."""

    MAIN = "main"
    PRIVATE = "private"
    DATA = "data"
    DIVERGENCE = "divergence"
    EXPERTS = "experts"


class Stage(StrEnum):
    """A part of the work of an experiment, in this order."""

    WORLDS = "worlds"
    DEVELOPMENT = "development"
    CANDIDATES = "candidates"
    TRAININGS = "trainings"
    TEST = "test"
