"""What every command takes that reads files of others: what of them is allowed."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afa.machine.environment import changed_environment
from afa.policy import grant_to_process

if TYPE_CHECKING:
    from collections.abc import Callable

_PANEL = "Files from strangers"
#: by the names of their arguments
OPTIONS: dict[str, Any] = {
    "allow_pickle": Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read .ckpt, .pt and .bin too: their tensors, no code in them.",
            rich_help_panel=_PANEL,
        ),
    ],
    "offline": Annotated[
        bool,
        typer.Option(
            "--offline", help="Ask no hub; what its cache has is used.", rich_help_panel=_PANEL
        ),
    ],
    "allow_folder": Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder that recipes may name paths in; as often as needed.",
            rich_help_panel=_PANEL,
        ),
    ],
    "rehash": Annotated[
        bool,
        typer.Option(
            "--rehash",
            help="Hash all files again, also those whose hash is in the cache.",
            rich_help_panel=_PANEL,
        ),
    ],
}
#: what libraries look at, some of them once, when they are imported
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def with_trust(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options that say what is allowed, for the whole process."""

    @functools.wraps(command)
    def run(
        *args: Any,
        allow_pickle: bool = False,
        offline: bool = False,
        allow_folder: list[Path] | None = None,
        rehash: bool = False,
        **kwargs: Any,
    ) -> None:
        folders = tuple(allow_folder or ())
        with (
            changed_environment(dict.fromkeys(_OFFLINE, "1") if offline else {}),
            grant_to_process(
                allow_pickle=allow_pickle, offline=offline, folders=folders, rehash=rehash
            ),
        ):
            command(*args, **kwargs)

    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(
            name, keyword, default=None if name == "allow_folder" else False, annotation=annotation
        )
        for name, annotation in OPTIONS.items()
    ]
    signature = inspect.signature(command, eval_str=True)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    run.__annotations__ = {**command.__annotations__, **OPTIONS}
    return run
