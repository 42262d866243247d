"""The options about drafts, which `afa generate` and `afa app` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from afa.cli.console import say, say_warnings
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.drafting import DraftsRecipe

_PANEL = "Pictures"

Drafts = Annotated[
    str | None,
    typer.Option(
        help="Model that judges drafts of all experts, best their base, for all prompts; default: "
        "the ensemble's own drafts. See docs/drafts.md.",
        rich_help_panel=_PANEL,
    ),
]
NoDrafts = Annotated[
    bool,
    typer.Option(
        "--no-drafts",
        help="Do not use the ensemble's own drafts.",
        rich_help_panel=_PANEL,
    ),
]


def drafts_for(
    ensemble: str, judge: str | None, prompts: Sequence[str] | None = None, *, without: bool = False
) -> DraftsRecipe | None:
    """The drafts of an ensemble's pictures: with a judge, or its own.

    With a judge, trained aggregators are kept for prompts of known words, if these are recorded.

    Args:
        ensemble: its folder, or `zoo:ensemble`.
        judge: of all prompts; None for the ensemble's own drafts.
        prompts: all prompts; None if they are not known yet.
        without: use no drafts.

    Raises:
        AfaError: if there are a judge and `without`, or the ensemble's folder is damaged.
    """
    from afa.drafting import DraftsRecipe, own_drafts
    from afa.loading.ensemble_folder import ensemble_folder
    from afa.loading.expert_source import ExpertSource
    from afa.loading.vocabulary import read_words

    if without and judge is not None:
        raise AfaError("AFA-CLI-027", "--drafts and --no-drafts exclude each other. Remove one.")
    if without:
        return None
    if judge is not None:
        words = read_words(ensemble_folder(ensemble))
        return DraftsRecipe(
            judge=ExpertSource(judge), aggregators="ignore" if words is None else "known_words"
        )
    return own_drafts(ensemble, prompts)


def say_own(
    drafts: DraftsRecipe, ensemble: str, prompts: Sequence[str], excluded_by: str | None = None
) -> None:
    """Print for which words an ensemble's own drafts are used, before the judge is loaded.

    Args:
        drafts: the ensemble's own.
        ensemble: its folder.
        prompts: all prompts.
        excluded_by: the option with which drafts cannot be used; None if there is none.
    """
    from afa.loading.ensemble_folder import ensemble_folder
    from afa.loading.vocabulary import listed, read_words, unknown_words

    why, unknown = "The ensemble draws all prompts by drafts", list[str]()
    if drafts.needs_words:
        unknown = unknown_words(read_words(ensemble_folder(ensemble)) or (), prompts)
    if drafts.prompts == "unknown_words":
        why = f"No training caption has {listed(unknown)}; such prompts are drawn by drafts"
    elif unknown:
        why += f", without the aggregators for {listed(unknown)}, which no training caption has"
    if excluded_by is not None:
        say_warnings(
            [
                f"The ensemble's own drafts are not used, because drafts cannot be combined with "
                f"{excluded_by}."
            ]
        )
        return
    say(f"{why}, judged by {drafts.judge.source}. To use the aggregators alone, pass --no-drafts.")
