"""The parts of the study; each can be run on its own, and takes one to three hours on two cores."""

from __future__ import annotations

from enum import StrEnum


class Part(StrEnum):
    """A part of the study.

    `MAIN`: the students and what they could replace, with three seeds. `VARIANTS`: other ranks and
    numbers of steps and pictures, and a model that is distilled from itself. `BUDGET`: a base that
    is trained on pictures for the total time of a student. `TRANSFORMERS`: an ensemble of
    transformers as teacher, which is trained first.
    """

    MAIN = "main"
    VARIANTS = "variants"
    BUDGET = "budget"
    TRANSFORMERS = "transformers"
