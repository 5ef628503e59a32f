"""The command line. One module per command; each imports its work when it runs."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from vila_edge.cli import (
    bench,
    bench_decoder,
    bench_kernels,
    bench_predict,
    build,
    chat,
    demo,
    export,
    parity,
    pull,
    show,
    verify,
)
from vila_edge.cli.console import print_error
from vila_edge.cli.interrupt import INTERRUPTED
from vila_edge.errors import VilaEdgeError
from vila_edge.version import __version__

OUT_OF_MEMORY = 4  # exit code


class Commands(TyperGroup):
    """Finds a command of two words before one of the first word alone."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two_words = " ".join(args[:2])
        return super().resolve_command(ctx, [two_words, *args[2:]] if two_words in self.commands else args)


app = typer.Typer(
    name="vila-edge",
    cls=Commands,
    help="VILA visual language models on small machines: export a checkpoint to 4 bits, chat with images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(export.export)
app.command()(chat.chat)
app.command()(parity.parity)
app.command()(pull.pull)
app.command()(show.show)
app.command()(verify.verify)
app.command()(build.build)
app.command()(bench.bench)
app.command("bench kernels")(bench_kernels.bench_kernels)
app.command("bench decoder")(bench_decoder.bench_decoder)
app.command("bench predict")(bench_predict.bench_predict)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    """Options that stand before a command."""
    if version:
        print(f"vila-edge {__version__}")
        raise typer.Exit


def main() -> None:
    """Run a command. Errors that a user can act on come as one line and a hint, without a traceback."""
    # A thread that waits for its turn must not keep a core busy; libgomp reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(prog_name="vila-edge")
    except VilaEdgeError as error:
        if os.environ.get("VILA_EDGE_DEBUG"):
            traceback.print_exc()
        print_error(error.message, error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except MemoryError:
        print_error("out of memory", "use a shorter context (--ctx-size) or a smaller model")
        sys.exit(OUT_OF_MEMORY)
