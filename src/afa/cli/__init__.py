"""The command line: one module per command, with heavy imports inside the commands."""

from __future__ import annotations

import signal
import sys

import typer

from afa.cli import app as page
from afa.cli import (
    check,
    demo,
    distill,
    evaluate,
    export,
    export_checkpoint,
    generate,
    inspect,
    merge,
    prune,
    runs,
    search,
    train,
    weights,
    zoo,
)
from afa.cli.console import replace_unprintable, say_error
from afa.cli.signals import Terminated, end_cleanly_on_signals, surviving_hangup
from afa.cli.trust import with_trust
from afa.errors import AfaError
from afa.machine.quiet import quieten

app = typer.Typer(
    name="afa",
    help="Turn several fine-tuned text-to-image diffusion models into one generator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _command in (
    train.train,
    generate.generate,
    page.app,
    weights.weights,
    prune.prune,
    inspect.inspect,
    check.check,
    merge.merge,
    distill.distill,
    export.export,
    search.search,
    evaluate.evaluate,
):
    app.command(_command.__name__)(with_trust(_command))
app.command("runs")(runs.runs)
app.command("export-checkpoint")(with_trust(export_checkpoint.export_checkpoint))
app.command("demo")(demo.demo)
app.add_typer(zoo.app, name="zoo")


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit.

    Exit codes: 0 for success, 2 for errors that the user can fix, 128 + n after signal n.
    """
    quieten()
    replace_unprintable()
    end_cleanly_on_signals()
    try:
        code = app(arguments, standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except Terminated as stop:
        name = signal.Signals(stop.number).name
        with surviving_hangup():
            say_error(f"stopped by {name}; unfinished files were removed")
        code = 128 + stop.number
    except (KeyboardInterrupt, typer.Abort):
        say_error("interrupted")
        code = 130
    except typer.TyperException as error:
        said = error.format_message()
        say_error(f"{said}{'' if said.endswith(('.', '?')) else '.'} Try --help.", "AFA-CLI-024")
        code = 2
    except AfaError as error:
        say_error(str(error), error.code)
        code = 2
    except OSError as error:  # such as a full disk or a read-only folder
        left = "No unfinished file was left under its final name."
        say_error(f"{error}. {left}", "AFA-CLI-025")
        code = 2
    sys.exit(code or 0)
