"""vila-edge demo"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vila_edge.cli.console import PROGRAM, PhaseDisplay, console, print_warning
from vila_edge.errors import UsageError

if TYPE_CHECKING:
    from vila_edge.micro.demo import DemoResult

ROWS = {
    "naming": "naming one digit",
    "sum": "sum of two images",
    "compare": "which of two is larger",
    "icl_4shot": "4-shot, held label words",
    "icl_4shot_seen": "4-shot, seen label words",
    "text": "arithmetic without images",
}


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where everything is written.")] = Path("vila-edge-demo"),
    no_chat: Annotated[bool, typer.Option("--no-chat", help="Leave when done, without a chat.")] = False,
    report: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training.")] = 0,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train even if this recipe's checkpoint is there.")
    ] = False,
) -> None:
    """Train a micro VILA on real handwritten digits, export it to 4 bits, measure it and chat with it."""
    console.print("The micro VILA: a whole VILA of about a million parameters, trained on real handwritten digits.")
    try:
        with console.status("loading torch"):
            from vila_edge import fsio
            from vila_edge.micro.demo import run_demo
            from vila_edge.micro.recipe import Recipe
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the demo needs the package {error.name!r}, which is not installed",
            "pip install 'vila-edge[export,train]'",
        ) from None
    if report and (report.is_dir() or not report.parent.is_dir()):
        raise UsageError(f"--report {report}: expected a file in a directory that exists")
    with PhaseDisplay() as display:
        result = run_demo(folder, dataclasses.replace(Recipe(), seed=seed), display, retrain)
    if report:
        fsio.replace_bytes(report, fsio.json_bytes(result.report))
    _print_result(result)
    if not no_chat and sys.stdin.isatty():
        from vila_edge.cli.chat import chat_with

        console.print()
        chat_with(result.bundle)


def _print_result(result: DemoResult) -> None:
    report = result.report
    table = Table(title=f"Held-out accuracy, {report['prompts_per_task']} prompts a row", title_justify="left")
    table.add_column("task")
    for column in ("fp32", "int4"):
        table.add_column(column, justify="right")
    for task, description in ROWS.items():
        table.add_row(description, *(f"{report['accuracy'][kind][task]:.1%}" for kind in ("fp32", "int4")))
    console.print(table)
    for task in result.below_floor:
        print_warning(f"{ROWS[task]}: below what this demo usually reaches; another --seed may do better")
    sizes = report["bytes"]
    console.print(
        f"{report['parameters'] / 1e6:.2f} M parameters; checkpoint {sizes['checkpoint_fp32'] / 1e6:.1f} MB in 32 bits, "
        f"bundle {sizes['bundle_int4'] / 1e6:.1f} MB; {report['seconds']:.0f} s, "
        f"at most {report['peak_memory_mib']:.0f} MiB of memory"
    )
    console.print(f"Pictures with questions and answers: {result.folder / 'contact_sheet.png'}", soft_wrap=True)
    console.print("This is a toy: it knows digits, small sums, and the label words of its few-shot games. Go on with")
    images, bundle = result.folder / "images", shlex.quote(str(result.bundle))
    first, second = (shlex.quote(str(images / name)) for name in ("3a.png", "8a.png"))
    for command in (
        f'{PROGRAM} chat {bundle} -i {first} -i {second} "Which image shows the larger digit?"',
        f'{PROGRAM} chat {bundle} -i {first} -i {second} "What is <image> plus <image>?"',
        f"{PROGRAM} chat {bundle}",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)
