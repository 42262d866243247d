"""Serve the page: to this machine only, or with a password to others."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from afa.app.access import LOOPBACK, Access, Guard, check_reach, read_access
from afa.errors import AfaError
from afa.machine.environment import changed_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline

    from afa.drawing.contenders import Student

USER = "afa"


def _settings_of_gradio(folder: str) -> dict[str, str]:
    """Environment variables of gradio; `folder` is deleted when the page is closed."""
    return {
        "GRADIO_TEMP_DIR": str(Path(folder) / "gradio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",  # would store runs at the hub
    }


@contextmanager
def served(
    pipeline: DiffusionPipeline,
    ensemble: str,
    *,
    host: str = LOOPBACK[0],
    port: int | None = None,
    password: str | None = None,
    keep: Path | None = None,
    student: Student | None = None,
    access: Access | None = None,
    open_to_all: bool = False,
) -> Iterator[str]:
    """Serve the page of an ensemble while the block runs.

    Args:
        pipeline: the pipeline of the ensemble.
        ensemble: its folder, or `zoo:ensemble`.
        host: address to listen on.
        port: port to listen on; None uses the first free one from 7860.
        password: password of the user `afa`; None requires no login.
        keep: folder for all pictures; None keeps none.
        student: a student of the ensemble, to compare; None for none.
        access: its address behind a proxy, see `read_access`; None for none.
        open_to_all: whether the page behind a proxy needs no password.

    Yields:
        The address of the page.

    Raises:
        AfaError: see `check_reach`; or if the port is not free, or gradio is missing.
    """
    access = access or read_access(host)
    check_reach(host, password, access.named, open_to_all=open_to_all)
    # set before importing gradio, so that its copies are deleted with the folder
    with (
        tempfile.TemporaryDirectory(prefix="afa-app-", ignore_cleanup_errors=True) as folder,
        changed_environment(_settings_of_gradio(folder)),
    ):
        try:
            import gradio as gr
            from starlette.middleware import Middleware
        except ImportError as error:
            raise AfaError(
                "AFA-APP-006", "The page requires gradio. Run: pip install 'afa[app]'."
            ) from error

        from afa.app.api import CALL_ERRORS, refuse_call
        from afa.app.drawing import Studio
        from afa.app.layout import CSS
        from afa.app.page import Page

        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        page = Page(Studio(pipeline, student), ensemble, pictures, keep)
        page.blocks.queue(max_size=32)
        try:
            _, address, _ = page.blocks.launch(
                server_name=host,
                server_port=port,
                auth=None if password is None else (USER, password),
                auth_message=None if password is None else f"The user is: {USER}",
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=["api"],
                ssr_mode=False,
                enable_monitoring=False,
                max_file_size=1,
                theme=gr.themes.Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                css=CSS,
                root_path=access.path,
                show_error=True,
                app_kwargs={
                    "middleware": [Middleware(Guard, access=access)],
                    "exception_handlers": dict.fromkeys(CALL_ERRORS, refuse_call),
                },
            )
        except OSError as error:
            raise AfaError(
                "AFA-APP-007", f"The page cannot be served at {host}: {error} Pass another --port."
            ) from None
        try:
            yield f"{address.rstrip('/')}{access.path}/"
        finally:
            page.blocks.close(verbose=False)
