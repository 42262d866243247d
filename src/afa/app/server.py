"""Serving the page: on this machine alone unless asked otherwise, and then with a password."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.machine.environment import changed_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline

LOOPBACK = ("127.0.0.1", "localhost", "::1")
USER = "afa"
_LEAST_LETTERS = 8


def check_reach(host: str, password: str | None) -> None:
    """Refuse to be seen by others without a password.

    Raises:
        AfaError: the address is not this machine's alone, and there is none or a short one.
    """
    if host not in LOOPBACK and password is None:
        raise AfaError(
            "AFA-APP-004",
            f"A page that others can reach must have a password; --host {host} is not this machine "
            "alone. Put one into a file: --password-file FILE.",
        )
    if password is not None and len(password) < _LEAST_LETTERS:
        raise AfaError("AFA-APP-005", f"The password must have at least {_LEAST_LETTERS} letters.")


class RefuseUploads:
    """Middleware: nothing is taken from a browser but the values of the controls."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer what would upload a file with 403, and hand on all else."""
        path = scope.get("path", "")
        if scope["type"] == "http" and path.rstrip("/").endswith(("/upload", "/upload_progress")):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"Nothing can be uploaded here."})
            return
        await self._app(scope, receive, send)


def _settings_of_gradio(folder: str) -> dict[str, str]:
    """What gradio looks at; the folder is gone when the page is closed."""
    return {
        "GRADIO_TEMP_DIR": str(Path(folder) / "gradio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
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
) -> Iterator[str]:
    """Serve the page of an ensemble while the block runs.

    Args:
        pipeline: with the ensemble.
        ensemble: its folder, or `zoo:ensemble`.
        host: the address to listen at.
        port: likewise; None takes the first free one from 7860 on.
        password: of the user `afa`; None asks for none.
        keep: a folder that every picture is written to.

    Yields: the page's address.

    Raises:
        AfaError: see `check_reach`; a port that is taken; or no gradio.
    """
    check_reach(host, password)
    # before gradio is asked for anything: its own copies go with the rest
    with (
        tempfile.TemporaryDirectory(prefix="afa-app-") as folder,
        changed_environment(_settings_of_gradio(folder)),
    ):
        try:
            import gradio as gr
            from starlette.middleware import Middleware
            from starlette.middleware.trustedhost import TrustedHostMiddleware
        except ImportError as error:
            raise AfaError(
                "AFA-APP-006", "The page needs gradio: pip install 'afa[app]'."
            ) from error

        from afa.app.drawing import Studio
        from afa.app.layout import CSS
        from afa.app.page import Page

        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        page = Page(Studio(pipeline), ensemble, pictures, keep)
        middleware = [Middleware(RefuseUploads)]
        if host in LOOPBACK:  # a page elsewhere must not reach this one by a name of its own
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
        page.blocks.queue(max_size=32)
        try:
            _, address, _ = page.blocks.launch(
                server_name=host,
                server_port=port,
                auth=None if password is None else (USER, password),
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                ssr_mode=False,
                enable_monitoring=False,
                max_file_size=1,
                theme=gr.themes.Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                css=CSS,
                app_kwargs={"middleware": middleware},
            )
        except OSError as error:
            raise AfaError(
                "AFA-APP-007", f"The page cannot be served at {host}: {error} Name another --port."
            ) from None
        try:
            yield address
        finally:
            page.blocks.close(verbose=False)
