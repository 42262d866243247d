"""Serve the page: to this machine only, or with a password to others."""

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

    from afa.drawing.contenders import Student

LOOPBACK = ("127.0.0.1", "localhost", "::1")
USER = "afa"
_MIN_LENGTH = 8


def check_reach(host: str, password: str | None) -> None:
    """Require a password of sufficient length if other machines can reach the page.

    Raises:
        AfaError: if the address is not local and there is no password, or the password is short.
    """
    if host not in LOOPBACK and password is None:
        raise AfaError(
            "AFA-APP-004",
            f"--host {host} lets other machines reach the page, which requires a password. Pass "
            "--password-file FILE.",
        )
    if password is not None and len(password) < _MIN_LENGTH:
        raise AfaError(
            "AFA-APP-005",
            f"The password must have at least {_MIN_LENGTH} characters; got {len(password)}. Put a "
            "longer one in the first line of the password file.",
        )


class RefuseUploads:
    """Middleware that refuses uploads; a browser can only send values of controls."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer uploads with 403, and pass on all other requests."""
        path = scope.get("path", "")
        if scope["type"] == "http" and path.rstrip("/").endswith(("/upload", "/upload_progress")):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"Uploads are disabled."})
            return
        await self._app(scope, receive, send)


def _settings_of_gradio(folder: str) -> dict[str, str]:
    """Environment variables of gradio; `folder` is deleted when the page is closed."""
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
    student: Student | None = None,
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

    Yields:
        The address of the page.

    Raises:
        AfaError: see `check_reach`; or if the port is not free, or gradio is missing.
    """
    check_reach(host, password)
    # set before importing gradio, so that its copies are deleted with the folder
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
                "AFA-APP-006", "The page requires gradio. Run: pip install 'afa[app]'."
            ) from error

        from afa.app.drawing import Studio
        from afa.app.layout import CSS
        from afa.app.page import Page

        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        page = Page(Studio(pipeline, student), ensemble, pictures, keep)
        middleware = [Middleware(RefuseUploads)]
        if host in LOOPBACK:  # against DNS rebinding by other sites
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
                "AFA-APP-007", f"The page cannot be served at {host}: {error} Pass another --port."
            ) from None
        try:
            yield address
        finally:
            page.blocks.close(verbose=False)
