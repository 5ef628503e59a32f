"""An export that is interrupted, wherever that is, ends with the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vila_edge.bundle import Bundle
from vila_edge.errors import ParityError, VilaEdgeError
from vila_edge.export import awq, job
from vila_edge.export.eras import Choices
from vila_edge.export.gate import Gate
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_bundle

RECIPE = Recipe(group_size=32, calibration_tokens=500, name="tiny")


class Crash(BaseException):
    """The process ends here."""


class Disk:
    """Lets a number of writes reach the disk, then fails."""

    def __init__(self, error: BaseException, patch: pytest.MonkeyPatch) -> None:
        self.left, self.error, self._fsync = 0, error, os.fsync
        patch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if not self.left:
            raise self.error
        self.left -= 1
        self._fsync(descriptor)


def export(checkpoint: Path, target: Path, **more: Any) -> str:
    return export_bundle(checkpoint, target, RECIPE, lambda phase, done, total: None, **more).manifest.digest


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the bundle that nothing interrupted."""
    return export(tiny_checkpoint, tmp_path_factory.mktemp("whole") / "b")


def test_crashes_between_any_two_writes_change_nothing(
    tiny_checkpoint: Path, tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, disk, crashes, searched = random.Random(0), Disk(Crash(), monkeypatch), 0, list[int]()
    quantise = awq.quantise_block

    def counted(*arguments: Any) -> Any:
        searched.append(arguments[2])
        return quantise(*arguments)

    monkeypatch.setattr(job, "quantise_block", counted)
    while not (tmp_path / "b").exists():  # under its name it is whole
        disk.left = rng.randint(1, 18)  # the writes behind the last step alone are nearly as many
        before = len(searched)
        try:
            export(tiny_checkpoint, tmp_path / "b")
        except Crash:
            crashes += 1
            # A block that was begun and not finished is all that is searched twice.
            assert len(searched[before:]) == len(set(searched[before:]))
            assert len(searched) <= crashes + 2
    assert crashes >= 10
    assert Bundle.open(tmp_path / "b").manifest.digest == whole


def test_a_full_disk_is_said_and_the_export_goes_on_when_there_is_room(
    tiny_checkpoint: Path, tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    for writes in (0, 9, 14, 19, 8):
        disk.left = writes
        with pytest.raises(VilaEdgeError, match="cannot write .*: No space left on device"):
            export(tiny_checkpoint, tmp_path / "b")
        assert not (tmp_path / "b").exists()
    disk.left = 10_000
    assert export(tiny_checkpoint, tmp_path / "b") == whole


def test_too_small_a_disk_is_refused_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(VilaEdgeError, match=r"the export needs \d+ MB more, and 0 MB are free"):
        export(tiny_checkpoint, tmp_path / "b")


def test_what_was_left_and_is_damaged_is_made_again(tiny_checkpoint: Path, tmp_path: Path, whole: str) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("quantise", 1):
            raise Crash

    with pytest.raises(Crash):
        export_bundle(tiny_checkpoint, tmp_path / "b", RECIPE, stop)
    (states,) = (tmp_path / ".b.work").glob("states.*")
    states.write_bytes(states.read_bytes()[:-4] + b"oops")
    said: list[str] = []
    assert export(tiny_checkpoint, tmp_path / "b", warn=said.append) == whole
    assert "is damaged: starting anew" in said[-1]


# Another value for every field of a recipe: of those that decide the decoder blocks, and of the others.
DECIDE_BLOCKS: dict[str, Any] = {
    "quantization": "fp16",
    "method": "rtn",
    "group_size": 16,
    "symmetric": True,
    "calibration": Path("samples"),
    "calibration_tokens": 300,
    "search_dtype": "bfloat16",
    "choices": Choices(token_order="row_major"),
}
DECIDE_NO_BLOCK: dict[str, Any] = {
    "lm_head": "fp16",
    "vision": "int8",
    "name": "another",
    "license_note": "as is",
    "gate": Gate(mean_kl=2),
}


def stopped_before_the_gate(checkpoint: Path, target: Path, recipe: Recipe) -> None:
    """An export whose blocks are finished."""

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "verify":
            raise Crash

    with pytest.raises(Crash):
        export_bundle(checkpoint, target, recipe, stop)


def write_texts(folder: Path) -> None:
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(8)))


def test_every_field_of_a_recipe_is_known_here() -> None:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert DECIDE_BLOCKS.keys() | DECIDE_NO_BLOCK.keys() == fields


@pytest.mark.parametrize("field", list(DECIDE_BLOCKS))
def test_another_recipe_does_not_go_on_with_what_was_left(
    field: str, tiny_checkpoint: Path, tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so before it goes."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "samples")
    other, said = dataclasses.replace(RECIPE, **{field: DECIDE_BLOCKS[field]}), list[str]()
    stopped_before_the_gate(tiny_checkpoint, tmp_path / "b", other)
    assert export(tiny_checkpoint, tmp_path / "b", warn=said.append) == whole
    assert any(str(tmp_path / ".b.work") in line and "it goes" in line for line in said)


@pytest.mark.parametrize("field", list(DECIDE_NO_BLOCK))
def test_what_decides_no_block_has_none_searched_again(
    field: str, tiny_checkpoint: Path, tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_before_the_gate(
        tiny_checkpoint, tmp_path / "b", dataclasses.replace(RECIPE, **{field: DECIDE_NO_BLOCK[field]})
    )
    monkeypatch.setattr(job, "quantise_block", None)
    assert export(tiny_checkpoint, tmp_path / "b") == whole


def test_the_way_to_the_samples_decides_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "samples")
    stopped_before_the_gate(tiny_checkpoint, tmp_path / "b", dataclasses.replace(RECIPE, calibration=Path("samples")))
    monkeypatch.setattr(job, "quantise_block", None)
    recipe = dataclasses.replace(RECIPE, calibration=tmp_path / "samples")
    export_bundle(tiny_checkpoint, tmp_path / "b", recipe, lambda phase, done, total: None)


def test_a_looser_gate_goes_on_and_a_tighter_one_is_applied(tiny_checkpoint: Path, tmp_path: Path, whole: str) -> None:
    """Limits decide what is let through, and nothing of what is made."""
    strict = dataclasses.replace(RECIPE, gate=Gate(top1_agreement=0.9999))
    for _ in range(2):
        with pytest.raises(ParityError, match="llm: the same most likely token"):
            export_bundle(tiny_checkpoint, tmp_path / "b", strict, lambda phase, done, total: None)
    said: list[str] = []
    export(tiny_checkpoint, tmp_path / "b", warn=said.append)
    assert any("going on" in line for line in said)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_and_working_directory_change_no_byte(
    threads: int, tiny_checkpoint: Path, tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(tiny_checkpoint, Path("b"), threads=threads) == whole


@pytest.mark.slow
def test_kill_9_at_twenty_moments(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vila_edge", "export", str(tiny_checkpoint), "-g", "32", "-o"]

    def digest(target: Path) -> str:
        return Bundle.open(target).manifest.digest

    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    takes = time.monotonic() - start
    rng, kills, rounds = random.Random(1), 0, 0
    while kills < 20:
        rounds += 1
        target = tmp_path / f"b{rounds}"
        while not target.exists():
            process = subprocess.Popen([*command, str(target)])
            time.sleep(rng.uniform(0.3, 1.0) * takes)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
            if kills % 3 == 0:  # and then to its end
                subprocess.run([*command, str(target)], check=not target.exists())
        assert digest(target) == digest(tmp_path / "whole")
