"""The drafts that an ensemble uses by itself: what its folder stores, and what it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from afa.denoisers.kinds import denoiser_of
from afa.drafting.drafter import load_judge
from afa.drafting.settings import OwnDrafts
from afa.errors import AfaError
from afa.loading.ensemble_folder import ensemble_folder
from afa.loading.published import is_published
from afa.loading.saved import read_config, source_of
from afa.loading.vocabulary import WORDS, read_words, unknown_words

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.loading.single_file.load import Companions


def own_drafts(ensemble: str | Path, prompts: Iterable[str] | None = None) -> OwnDrafts | None:
    """The drafts that an ensemble uses by itself; None if it uses none.

    Args:
        ensemble: its folder, or `zoo:ensemble`. The judge must have the weights that it had when
            the ensemble was trained.
        prompts: if given, also None if it uses drafts for none of these prompts.

    Raises:
        AfaError: if the folder is damaged, or lacks the words of the training captions.
    """
    folder = ensemble_folder(ensemble)
    if is_published(folder):
        return None
    saved = read_config(folder)
    if saved["judge"] is None:
        return None
    try:
        drafts = OwnDrafts(**(saved["drafts"] or {}), judge=source_of(saved["judge"], folder))
    except (ValidationError, TypeError) as error:
        raise AfaError(
            "AFA-DRAFT-009",
            f"The drafts in '{folder / 'config.json'}' are not as afa train writes them: {error} "
            "Restore that file.",
        ) from None
    if not drafts.needs_words:
        return drafts
    words = read_words(folder)
    if words is None:
        raise AfaError(
            "AFA-DRAFT-010",
            f"'{folder / WORDS}', the words of the training captions, is missing or damaged; it "
            "says how prompts are drawn by drafts. Restore it. Or pass --no-drafts, or --drafts "
            "MODEL for all prompts.",
        )
    if drafts.prompts == "all" or prompts is None or unknown_words(words, prompts):
        return drafts
    return None


def keep_drafts(pipeline: DiffusionPipeline, settings: OwnDrafts, companions: Companions) -> None:
    """Let an ensemble use drafts by itself: `afa.save_ensemble` then stores them in its folder.

    Args:
        pipeline: with the ensemble.
        settings: the settings; the judge is loaded once, to check it.
        companions: parts that a single file lacks.

    Raises:
        AfaError: if the judge cannot be used; see `use_drafts`.
    """
    _, judge = load_judge(settings, pipeline, companions)
    denoiser = denoiser_of(pipeline)
    chosen = settings.model_dump(mode="json", exclude={"judge"})
    denoiser.provenance = replace(denoiser.provenance, judge=judge, drafts=chosen)
