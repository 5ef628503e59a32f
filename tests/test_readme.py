"""The README says what is so: its commands parse, its table is the committed report, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from benchmarks.demo_table import with_table
from vila_edge.cli import app
from vila_edge.micro.demo import FLOORS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Calls of ./run in code blocks, without the placeholders of options."""
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("./run ")]


def test_the_set_up_is_two_commands_at_the_top() -> None:
    assert commands()[:2] == ["./run demo", "./run test"]
    assert README[: README.index("./run test")].count("\n") < 16


@pytest.mark.parametrize("command", [c for c in commands() if c != "./run test"])
def test_every_command_parses(command: str) -> None:
    """With the real parser; nothing is run."""
    command = re.sub(r"\[.*\]", "", command)
    root = typer.main.get_command(app)
    name, *arguments = shlex.split(command)[1:]
    found = root.commands[name]  # type: ignore[attr-defined]
    assert found.make_context(name, list(arguments)).params


def test_the_table_is_the_committed_report() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert with_table(README, report) == README
    for task, floor in FLOORS.items():
        assert report["accuracy"]["int4"][task] >= floor


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:docs|jetson|export|benchmarks|vila_edge|kernels)/[\w./-]*)`", README)) | {
        "CONTRIBUTING.md"
    }
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), name
