"""What is written is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vila_edge import fsio
from vila_edge.errors import InputError, UsageError, VilaEdgeError


def test_a_new_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with fsio.new_folder(target) as folder:
        fsio.write_bytes(folder / "a", b"1")
        assert not target.exists()
    assert (target / "a").read_bytes() == b"1"
    assert os.listdir(target.parent) == ["target"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), fsio.new_folder(tmp_path / "target") as folder:
        fsio.write_bytes(folder / "a", b"1")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_the_old_one(tmp_path: Path) -> None:
    with fsio.new_folder(tmp_path / "target") as folder:
        fsio.write_bytes(folder / "a", b"old")
    with pytest.raises(ValueError), fsio.new_folder(tmp_path / "target", replace=True):
        raise ValueError
    assert (tmp_path / "target" / "a").read_bytes() == b"old"
    with fsio.new_folder(tmp_path / "target", replace=True) as folder:
        fsio.write_bytes(folder / "b", b"new")
    assert os.listdir(tmp_path / "target") == ["b"]
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("failing", ["target", ".partial"])
def test_a_failure_in_the_last_step_leaves_the_old_one(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is the old folder that cannot be moved away, or the new one into its place."""
    with fsio.new_folder(tmp_path / "target") as folder:
        fsio.write_bytes(folder / "a", b"old")
    rename = Path.rename

    def broken(path: Path, target: Path) -> Path:
        if path.name.endswith(failing):
            raise OSError(5, "I/O error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(VilaEdgeError, match="I/O error"), fsio.new_folder(tmp_path / "target", replace=True) as folder:
        fsio.write_bytes(folder / "a", b"new")
    assert (tmp_path / "target" / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["target"]


def test_what_exists_is_not_replaced_unasked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already") as error, fsio.new_folder(tmp_path):
        raise AssertionError
    assert "--force" in error.value.hint


def test_a_full_disk_is_said_with_the_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(VilaEdgeError, match="cannot write .*: No space left on device") as error:
        fsio.write_bytes(tmp_path / "a", b"1")
    assert "MiB are free" in error.value.hint


def test_replaced_bytes_are_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    fsio.replace_bytes(path, b"one")
    fsio.replace_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
        with pytest.raises(VilaEdgeError, match="I/O error"):
            fsio.replace_bytes(path, b"three")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b" " * 200, "larger than 100 bytes"),
    ],
)
def test_json_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    limit = 100 if len(content) == 200 else 1 << 20
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        fsio.read_json(tmp_path / "config.json", limit)


def test_links_and_pipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "missing"):
        with pytest.raises(InputError, match=name):
            fsio.read_bytes(tmp_path / name, 100)


def test_json_has_one_form() -> None:
    assert fsio.json_bytes({"b": 1, "a": [1.5, "é"]}) == '{\n  "a": [\n    1.5,\n    "é"\n  ],\n  "b": 1\n}\n'.encode()
