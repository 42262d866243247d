"""`afa app`: draw, compare and steer pictures in a browser."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from afa.cli.console import say
from afa.cli.drafts import Drafts, NoDrafts, drafts_for
from afa.errors import AfaError
from afa.machine.quiet import quieten_loading


def app(
    ensemble: Annotated[
        str, typer.Argument(help="Ensemble folder; default: the bundled ensemble.")
    ] = "zoo:ensemble",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free port from 7860.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; requires a password unless it is local.")
    ] = "127.0.0.1",
    password_file: Annotated[
        Path | None, typer.Option(help="File whose first line is the password of the user 'afa'.")
    ] = None,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Ask for none if a proxy asks for one.")
    ] = False,
    root_path: Annotated[
        str | None,
        typer.Option(
            envvar="GRADIO_ROOT_PATH",
            help="Path of the page behind a proxy, such as /afa, or its complete address.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name of the page behind a proxy, such as example.org; repeatable."),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="A model of afa distill to compare: folder or file.")
    ] = None,
    drafts: Drafts = None,
    no_drafts: NoDrafts = False,
    output: Annotated[Path | None, typer.Option(help="Folder for all pictures.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="dtype of the experts: float32, bfloat16, float16.")
    ] = ("float32"),
    memory_budget: Annotated[
        str | None, typer.Option(help="Device memory to use, such as 8GB; see afa generate.")
    ] = None,
) -> None:
    """Serve a page to compare experts, merge and ensemble, see fusion weights, and set biases.

    The page sends nothing to other servers. Only this machine can open it, unless --host is set.

    [bold]Example[/bold]: afa app
    """
    from afa.app.access import check_reach, read_access
    from afa.app.server import served
    from afa.cli.generate import DTYPES, say_plan

    password = None
    if password_file is not None:
        try:
            password = next(iter(password_file.read_text(encoding="utf-8").splitlines()), "")
        except (OSError, UnicodeDecodeError) as error:
            raise AfaError(
                "AFA-CLI-001", f"--password-file must be a readable text file; got: {error}."
            ) from None
    if no_password and password is not None:
        raise AfaError(
            "AFA-CLI-055",
            f"--no-password contradicts --password-file {password_file}. Pass one of them.",
        )
    access = read_access(host, root_path, allowed_host or ())
    check_reach(host, password, access.named, open_to_all=no_password)
    if dtype not in DTYPES:
        raise AfaError("AFA-CLI-002", f"--dtype must be one of {', '.join(DTYPES)}; got '{dtype}'.")
    if output is not None:
        if output.exists() and not output.is_dir():
            raise AfaError("AFA-CLI-003", f"--output must be a folder; got the file '{output}'.")
        output.mkdir(parents=True, exist_ok=True)

    import torch

    from afa.drawing.contenders import load_student
    from afa.drawing.pictures import prepare
    from afa.training.engine import pick_device

    quieten_loading()
    budget: dict[str, Any] = {}
    if memory_budget is not None:
        budget = {"memory_budget": memory_budget, "on_plan": say_plan}
    pipeline = prepare(
        ensemble,
        drafts=drafts_for(ensemble, drafts, without=no_drafts),
        torch_dtype=getattr(torch, dtype),
        device=pick_device(device),
        **budget,
    )
    shown = None if student is None else load_student(student, pipeline)
    with served(
        pipeline,
        ensemble,
        host=host,
        port=port,
        password=password,
        keep=output,
        student=shown,
        access=access,
        open_to_all=no_password,
    ) as address:
        say(f"afa is at {address} (Ctrl-C stops it)")
        end = threading.Event()
        # a background job of a shell ignores SIGINT at start
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, lambda *_: end.set())
        while not end.wait(0.5):  # Windows handles no signal while the main thread waits
            pass
    say("The page is closed.")
