"""`afa inspect`: describe a file or folder."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Column, Table

from afa.cli.console import console, printable


def inspect(
    path: Annotated[str, typer.Argument(help="Ensemble, pipeline or U-Net folder, or a file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the family, sites, experts, hashes and parameters of a file or folder.

    [bold]Example[/bold]: afa inspect runs/first
    """
    from afa.loading.inspection import describe

    facts = describe(path)
    if as_json:
        console.print_json(json.dumps(facts), ensure_ascii=True)
        return
    table = Table("fact", Column("value", overflow="fold"), show_header=False, box=None)
    for key, value in facts.items():
        if isinstance(value, list):
            table.add_row(key.replace("_", " "), f"{len(value)}")
            for entry in value:
                lines = [entry] if isinstance(entry, str) else filter(None, entry.values())
                for line in lines:
                    table.add_row("", printable(line))
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
            table.add_row(key.replace("_", " "), printable(text))
    console.print(table)
