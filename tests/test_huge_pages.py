"""Commands that run a model start themselves again with large pages of memory, once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vila_edge import huge_pages
from vila_edge.huge_pages import TUNABLE, VARIABLE, environment

GLIBC = ("glibc", "2.36")


@pytest.mark.parametrize(
    ("chosen", "env", "libc", "asks"),
    [
        ("always [madvise] never", {}, GLIBC, True),
        ("[always] madvise never", {}, GLIBC, False),
        ("always madvise [never]", {}, GLIBC, False),
        ("always [madvise] never", {VARIABLE: "glibc.malloc.arena_max=1"}, GLIBC, False),
        ("always [madvise] never", {}, ("glibc", "2.34"), False),
        ("always [madvise] never", {}, ("", ""), False),
    ],
)
def test_large_pages_are_asked_for_where_that_helps(
    chosen: str, env: dict[str, str], libc: tuple[str, str], asks: bool, tmp_path: Path
) -> None:
    setting = tmp_path / "enabled"
    setting.write_text(chosen)
    assert environment(env, setting, libc) == ({VARIABLE: TUNABLE} if asks else {})


def test_a_kernel_without_large_pages_is_left_alone(tmp_path: Path) -> None:
    assert environment({}, tmp_path / "none", GLIBC) == {}


@pytest.mark.parametrize(("command", "restarts"), [("chat", True), ("bench", True), ("verify", False)])
def test_a_command_that_runs_a_model_starts_again_as_it_was_called(command: str, restarts: bool) -> None:
    program = (
        "import os, sys; from vila_edge import __main__, huge_pages;"
        "huge_pages.environment = lambda env: {'GLIBC_TUNABLES': 'x'};"
        "os.execve = lambda path, argv, env: print(path, argv[1:], env['GLIBC_TUNABLES'], sep='|') or sys.exit(7);"
        "__main__.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, command, "nowhere", "-n", "3"], capture_output=True, text=True
    )
    if restarts:
        assert done.returncode == 7
        assert done.stdout == f"{sys.executable}|{['-c', program, command, 'nowhere', '-n', '3']}|x\n"
    else:
        assert done.returncode != 7
        assert done.stdout == ""


def test_it_starts_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TUNABLE)
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("started again"))
    huge_pages.restart()
