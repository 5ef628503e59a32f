"""Weights that nothing touched since they were compared last are believed; all others are read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from vila_edge import fsio, remembered
from vila_edge.bundle import Bundle
from vila_edge.errors import BundleError
from vila_edge.fsio import user_cache
from vila_edge.remembered import Remembered

WEIGHTS = "weights/llm.safetensors"


@pytest.fixture(autouse=True)
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the weights that were read for their digest; a cache of the test's own; and no waiting."""
    found, sha256 = list[str](), fsio.sha256

    def counted(path: Path) -> str:
        if path.parent.name == "weights":
            found.append(f"weights/{path.name}")
        return sha256(path)

    monkeypatch.setattr(fsio, "sha256", counted)
    monkeypatch.setattr(remembered, "SETTLED_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def start(bundle: Path) -> None:
    with Bundle.checked_meanwhile(bundle):
        pass


def test_the_second_start_reads_no_weights_for_their_digests(bundle_copy: Path, read: list[str]) -> None:
    start(bundle_copy)
    assert sorted(read) == sorted(n for n in Bundle.open(bundle_copy).manifest.files if n.startswith("weights/"))
    read.clear()
    start(bundle_copy)
    assert read == []
    Bundle.open(bundle_copy)  # what verify, build and export do
    assert WEIGHTS in read


def test_a_change_is_found_though_size_and_time_are_the_old_ones(bundle_copy: Path, read: list[str]) -> None:
    start(bundle_copy)
    path = bundle_copy / WEIGHTS
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    read.clear()
    for _ in range(2):
        with pytest.raises(BundleError, match=f"{WEIGHTS}: changed since the export"):
            start(bundle_copy)
    assert read == [WEIGHTS, WEIGHTS]


def test_another_file_in_its_place_is_read(bundle_copy: Path, read: list[str]) -> None:
    start(bundle_copy)
    shutil.copy2(bundle_copy / WEIGHTS, bundle_copy / "copy")
    (bundle_copy / "copy").replace(bundle_copy / WEIGHTS)
    read.clear()
    start(bundle_copy)
    assert read == [WEIGHTS]


def test_another_bundle_in_the_same_place_is_read(bundle_copy: Path, read: list[str]) -> None:
    start(bundle_copy)
    again = shutil.copytree(bundle_copy, bundle_copy.with_name("again"))
    shutil.rmtree(bundle_copy)
    again.rename(bundle_copy)
    read.clear()
    start(bundle_copy)
    assert len(read) == len(list((bundle_copy / "weights").iterdir()))


def test_what_was_written_just_now_is_read_again(
    bundle_copy: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "SETTLED_NS", 10**12)
    start(bundle_copy)
    read.clear()
    start(bundle_copy)
    assert WEIGHTS in read


def test_a_file_that_changes_while_it_is_read_is_not_remembered(bundle_copy: Path) -> None:
    found = Remembered(bundle_copy)
    before = found.states([WEIGHTS, "weights/none"])
    assert before.keys() == {WEIGHTS}
    (bundle_copy / WEIGHTS).touch()
    found.keep({WEIGHTS: "0" * 64}, before)
    assert Remembered(bundle_copy).digest(WEIGHTS) is None
    found.keep({WEIGHTS: "0" * 64}, found.states([WEIGHTS]))
    assert Remembered(bundle_copy).digest(WEIGHTS) == "0" * 64


@pytest.mark.parametrize("spoil", ["not JSON", "[]", '{"weights/llm.safetensors": 1}', "for all to write", "a link"])
def test_what_is_not_ours_or_makes_no_sense_is_not_believed(spoil: str, bundle_copy: Path, read: list[str]) -> None:
    start(bundle_copy)
    (path,) = (user_cache() / "digests").iterdir()
    if spoil == "for all to write":
        path.chmod(0o666)
    elif spoil == "a link":
        path.rename(path.with_suffix(".moved"))
        path.symlink_to(path.with_suffix(".moved"))
    else:
        path.write_text(spoil)
    read.clear()
    start(bundle_copy)
    assert WEIGHTS in read


def test_a_digest_that_the_manifest_does_not_know_is_computed(bundle_copy: Path, read: list[str]) -> None:
    start(bundle_copy)
    (path,) = (user_cache() / "digests").iterdir()
    entries = json.loads(path.read_text())
    entries[WEIGHTS][1] = "0" * 64
    path.write_text(json.dumps(entries))
    read.clear()
    start(bundle_copy)
    assert read == [WEIGHTS]


def test_a_cache_that_cannot_be_written_costs_no_more_than_time(
    bundle_copy: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    start(bundle_copy)
    read.clear()
    start(bundle_copy)
    assert WEIGHTS in read
