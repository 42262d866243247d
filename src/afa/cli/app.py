"""`afa app`: a page to draw, compare and steer in a browser."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from afa.cli.console import say
from afa.errors import AfaError
from afa.machine.quiet import quieten_loading


def app(
    ensemble: Annotated[
        str, typer.Argument(help="Ensemble folder; by default the shipped one.")
    ] = "zoo:ensemble",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="By default the first free from 7860 on.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine need a password.")
    ] = "127.0.0.1",
    password_file: Annotated[
        Path | None, typer.Option(help="Its first line is the password of the user 'afa'.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder that every picture is written to.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the experts: float32, bfloat16, float16.")] = (
        "float32"
    ),
    memory_budget: Annotated[
        str | None, typer.Option(help="Of the device, such as 8GB; see afa generate.")
    ] = None,
) -> None:
    """Open a page: compare experts, merge and ensemble, see who did what, lean on an expert.

    Nothing is sent anywhere; the page is this machine's alone unless --host says otherwise.

    [bold]Example[/bold]: afa app
    """
    from afa.app.server import check_reach, served
    from afa.cli.generate import DTYPES, say_plan

    password = None
    if password_file is not None:
        try:
            password = next(iter(password_file.read_text(encoding="utf-8").splitlines()), "")
        except (OSError, UnicodeDecodeError) as error:
            raise AfaError(
                "AFA-CLI-001", f"--password-file must be a text file; reading says: {error}."
            ) from None
    check_reach(host, password)
    if dtype not in DTYPES:
        raise AfaError(
            "AFA-CLI-002", f"--dtype must be one of {', '.join(DTYPES)}, came '{dtype}'."
        )
    if output is not None:
        if output.exists() and not output.is_dir():
            raise AfaError("AFA-CLI-003", f"--output must be a folder; '{output}' is a file.")
        output.mkdir(parents=True, exist_ok=True)

    import torch

    from afa.drawing.pictures import prepare
    from afa.training.engine import pick_device

    quieten_loading()
    budget: dict[str, Any] = {}
    if memory_budget is not None:
        budget = {"memory_budget": memory_budget, "on_plan": say_plan}
    pipeline = prepare(
        ensemble, torch_dtype=getattr(torch, dtype), device=pick_device(device), **budget
    )
    with served(
        pipeline, ensemble, host=host, port=port, password=password, keep=output
    ) as address:
        say(f"afa is at {address} (Ctrl-C ends it)")
        end = threading.Event()
        # a shell's background jobs are born deaf to the first
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, lambda *_: end.set())
        end.wait()
    say("The page is closed.")
