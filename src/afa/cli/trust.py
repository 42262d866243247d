"""Options of all commands that read untrusted files."""

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

_PANEL = "Untrusted files"
_option = functools.partial(typer.Option, rich_help_panel=_PANEL)
#: by argument name
OPTIONS: dict[str, Any] = {
    "allow_pickle": Annotated[
        bool,
        _option(
            "--allow-pickle",
            help="Also read tensors from .ckpt, .pt and .bin; never run their code.",
        ),
    ],
    "offline": Annotated[bool, _option("--offline", help="Use the hub's cache only, no network.")],
    "allow_folder": Annotated[
        list[Path] | None, _option(help="Allow paths in this folder in recipes; repeatable.")
    ],
    "rehash": Annotated[
        bool, _option("--rehash", help="Hash all files again, even if the hash is cached.")
    ],
}
#: read by libraries, by some only once at import
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def with_trust(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for untrusted files to a command; they apply to the whole process."""

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
