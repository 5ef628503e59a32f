"""What commands that measure share: files for the result, and its tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vila_edge import fsio
from vila_edge.cli.console import console
from vila_edge.errors import UsageError

if TYPE_CHECKING:
    from vila_edge.bench.report import Sheet


def check_results(json_file: Path | None, markdown_file: Path | None) -> None:
    """Before anything is measured. Raises UsageError for files that cannot be written."""
    for option, file in (("--json", json_file), ("--markdown", markdown_file)):
        if file and (file.is_dir() or not file.parent.is_dir()):
            raise UsageError(f"{option} {file}: expected a file in a directory that exists")


def give_results(
    found: dict[str, Any],
    sheets: Sequence[Sheet],
    markdown: str,
    width: int,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Write what was found where it is wanted, and print its tables. Raises VilaEdgeError if it cannot be written."""
    if json_file:
        fsio.replace_bytes(json_file, fsio.json_bytes(found))
    if markdown_file:
        fsio.replace_bytes(markdown_file, markdown.encode())
    _print_sheets(sheets, width)


def _print_sheets(sheets: Sequence[Sheet], width: int) -> None:
    """To stdout, at least `width` characters wide."""
    out = Console(width=max(console.width, width), highlight=False)
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left")
        for number, column in enumerate(sheet.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in sheet.rows:
            table.add_row(*row)
        out.print(table)
