"""Where an export may appear: on nothing that it reads, and on nothing but an older export."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import Done, in_process
from vila_edge import fsio
from vila_edge.bundle import Bundle
from vila_edge.errors import CheckpointError, UsageError, VilaEdgeError
from vila_edge.export import autoawq_folder, awq, job, run
from vila_edge.export.eras import Choices
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_autoawq, export_bundle
from vila_edge.export.target import check_target

__all__ = ["in_process"]

RECIPE = Recipe(group_size=32, calibration_tokens=300, name="tiny")


def quiet(phase: str, done: int, total: int) -> None:
    pass


def listed(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("place", [".", "ck", "ck/llm", "samples", "ck/../tower", "link"])
def test_what_an_export_reads_is_never_replaced(place: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(tiny_checkpoint, here / "ck")
    for name in ("samples", "tower"):
        (here / name).mkdir()
    (here / "link").symlink_to("ck")
    fsio.write_bytes(here / "ck" / "llm" / "manifest.json", b'{"format": "vila-edge bundle"}')
    recipe = Recipe(calibration=here / "samples", choices=Choices(vision_tower=here / "tower"))
    before = listed(here)
    with pytest.raises(UsageError, match="lies there, which the export reads"):
        export_bundle(here / "ck", here / place, recipe, quiet, replace=True)
    assert listed(here) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", b"mine"),
        ("manifest.json", b'{"format": "another"}'),
        ("manifest.json", b"{"),
        ("model.safetensors.index.json", b'{"metadata": {"total_size": 1}, "weight_map": {}}'),
    ],
)
def test_force_is_for_exports(name: str, content: bytes, tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.mkdir()
    fsio.write_bytes(target / name, content)
    for place in (target, target / name):
        with pytest.raises(UsageError, match="is neither empty nor an export, and --force replaces nothing else"):
            export_bundle(tiny_checkpoint, place, RECIPE, quiet, replace=True)
    assert (target / name).read_bytes() == content


def test_a_bundle_an_autoawq_folder_and_an_empty_one_are_replaced(
    tiny_checkpoint: Path, bundle_copy: Path, tmp_path: Path
) -> None:
    target = tmp_path / "b"
    target.mkdir()
    export_autoawq(tiny_checkpoint, target, RECIPE, quiet, replace=True)
    export_bundle(tiny_checkpoint, target, RECIPE, quiet, replace=True)
    for place in (target, bundle_copy):
        check_target(place, True, tiny_checkpoint, RECIPE)
        with pytest.raises(UsageError, match="exists already"):
            check_target(place, False, tiny_checkpoint, RECIPE)
    assert sorted(os.listdir(tmp_path)) == ["b", "bundle"]


def test_what_cannot_be_moved_is_refused_before_the_work(
    tiny_checkpoint: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rmdir", busy)
    with pytest.raises(UsageError, match="bundle cannot be replaced: something is mounted there"):
        export_bundle(tiny_checkpoint, bundle_copy, RECIPE, quiet, replace=True)


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("target", [".", "/", ".."])
def test_a_target_without_a_name_is_a_usage_error(
    target: str,
    force: tuple[str, ...],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: Callable[..., Done],
) -> None:
    monkeypatch.chdir(tmp_path)
    done = in_process("export", tiny_checkpoint, "-o", target, *force)
    assert done.returncode == 2
    assert f"error: -o {target}: no name of a folder to make" in done.stderr


def test_what_appears_at_the_target_meanwhile_stays(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def intrude(phase: str, done: int, total: int) -> None:
        if phase == "verify" and done == total:
            fsio.make_folder(tmp_path / "b" / "mine")

    with pytest.raises(UsageError, match="exists already"):
        export_bundle(tiny_checkpoint, tmp_path / "b", RECIPE, intrude)
    assert os.listdir(tmp_path / "b") == ["mine"]


def test_a_failed_rename_at_the_end_is_an_error_and_loses_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
        with pytest.raises(VilaEdgeError, match="cannot write .*b: busy"):
            export_bundle(tiny_checkpoint, tmp_path / "b", RECIPE, quiet)
    monkeypatch.setattr(job, "quantise_block", None)  # nothing is searched again
    assert Bundle.open(export_bundle(tiny_checkpoint, tmp_path / "b", RECIPE, quiet).path)


def test_an_autoawq_folder_is_made_in_the_working_folder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    copy = autoawq_folder._copy_tokenizer

    def look(*folders: Path) -> None:
        seen.append(os.listdir(tmp_path))
        copy(*folders)

    monkeypatch.setattr(autoawq_folder, "_copy_tokenizer", look)
    export_autoawq(tiny_checkpoint, tmp_path / "llm", RECIPE, quiet)
    assert seen == [[".llm.work"]]
    assert os.listdir(tmp_path) == ["llm"]


def test_room_for_the_second_copy_is_asked_for(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "weight_bytes", lambda cfg, group_size: 10**18)
    with pytest.raises(VilaEdgeError, match=r"the export needs 1,000,000,000,\d+ MB more"):
        export_autoawq(tiny_checkpoint, tmp_path / "llm", RECIPE, quiet)
    export_bundle(tiny_checkpoint, tmp_path / "b", RECIPE, quiet)


def test_blocks_outlive_what_could_not_be_read(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []

    def unreadable(*arguments: Any) -> Any:
        searched.append(arguments[2])
        if searched == [0, 1]:
            raise CheckpointError("a disk that was away for a moment")
        return awq.quantise_block(*arguments)

    monkeypatch.setattr(job, "quantise_block", unreadable)
    with pytest.raises(CheckpointError):
        export_bundle(tiny_checkpoint, tmp_path / "b", RECIPE, quiet)
    export_bundle(tiny_checkpoint, tmp_path / "b", RECIPE, quiet)
    assert searched == [0, 1, 1]
