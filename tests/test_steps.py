"""Steps of a long work: done once, whatever happens between them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from vila_edge import fsio
from vila_edge.errors import UsageError
from vila_edge.export.steps import Relay, Result, StartOver, Steps, working_folder


class Work:
    """Three steps, of which the second hands a number to the third; remembers what it did."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.did = folder, list[str]()

    def run(self, key: str = "k") -> Result:
        steps = Steps(self.folder, key)
        first = steps.run("first", lambda: self._first(), [self.folder / "kept"])
        relay = Relay(steps, "number")
        relay.run("second", self._second)
        return first | relay.run("third", self._third, last=True)

    def _first(self) -> Result:
        self.did.append("first")
        (self.folder / "kept").write_text("kept")
        return {"a": 1}

    def _second(self, before: Path | None, after: Path | None) -> Result:
        self.did.append("second")
        assert before is None and after
        after.write_text("42")
        return {}

    def _third(self, before: Path | None, after: Path | None) -> Result:
        assert before and after is None
        self.did.append("third")
        return {"b": int(before.read_text())}


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_what_is_done_is_not_done_again(work: Work) -> None:
    assert work.run() == work.run() == {"a": 1, "b": 42}
    assert work.did == ["first", "second", "third"]


def test_a_file_that_was_handed_on_goes_when_its_taker_is_done(work: Work, tmp_path: Path) -> None:
    work.run()
    assert not list(tmp_path.glob("number*"))


def test_another_key_makes_everything_anew(work: Work) -> None:
    work.run()
    work.run("other")
    assert work.did == ["first", "second", "third"] * 2


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_file_is_made_again_and_all_that_follows(work: Work, tmp_path: Path, damage: str) -> None:
    work.run()
    (tmp_path / "kept").write_text("other") if damage == "changed" else (tmp_path / "kept").unlink()
    work.run()
    assert work.did == ["first", "second", "third"] * 2
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"inputs": 1}', "\x00"])
def test_a_damaged_record_is_as_good_as_none(work: Work, tmp_path: Path, text: str) -> None:
    work.run()
    (tmp_path / "steps" / "first.json").write_text(text)
    work.run()
    assert work.did[3] == "first"


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_without_what_was_handed_on_the_work_starts_over(work: Work, tmp_path: Path, damage: str) -> None:
    work.run()
    (tmp_path / "steps" / "third.json").unlink()
    if damage == "changed":
        (tmp_path / "number.second.safetensors").write_text("43")
    with pytest.raises(StartOver):
        work.run()
    assert work.did == ["first", "second", "third"]


def test_a_working_folder_outlives_the_block_and_knows_its_key(tmp_path: Path) -> None:
    target = tmp_path / "b"
    for key, expected in (("one", False), ("one", True), ("two", False), ("two", True)):
        with working_folder(target, key) as (folder, resumed):
            assert resumed == expected
            assert (folder / "x").exists() == expected
            (folder / "x").write_text("x")
            (folder / ".y.1.partial").write_text("half")
    with working_folder(target, "two") as (folder, _):
        assert not (folder / ".y.1.partial").exists()
    assert not target.exists()


def test_finished_work_of_another_key_does_not_go_unsaid(tmp_path: Path) -> None:
    said: list[str] = []
    for key in ("one", "one", "two", "three"):
        with working_folder(tmp_path / "b", key, said.append) as (folder, _):
            if key == "one":
                Steps(folder, key).run("first", dict)
    (line,) = said  # with "two" nothing was finished
    assert str(tmp_path / ".b.work") in line and line.endswith("it goes")


def test_a_step_that_is_apart_is_done_again_alone(tmp_path: Path) -> None:
    """Neither does another one make the steps behind it stale, nor do they it."""
    did: list[str] = []

    def run(*names: str) -> list[str]:
        def work(name: str) -> Result:
            did.append(name)
            return {}

        did.clear()
        steps = Steps(tmp_path, "k")
        for name in names:
            steps.run(name, partial(work, name), apart=name.startswith("apart"))
        return list(did)

    assert run("apart.one", "second", "third") == ["apart.one", "second", "third"]
    assert run("apart.two", "second", "third") == ["apart.two"]
    assert run("apart.one", "other", "apart.two", "third") == ["other", "third"]


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with (
        working_folder(tmp_path / "b", "k"),
        pytest.raises(UsageError, match="b is being made by another process"),
        working_folder(tmp_path / "b", "k"),
    ):
        pass


def test_what_a_killed_process_left_half_placed_is_put_right(tmp_path: Path) -> None:
    """The old one is back if the new one had not come, and gone if it had."""
    target, retired = tmp_path / "b", tmp_path / ".b.work" / fsio.RETIRED
    for expected in ("old", "new"):
        fsio.make_folder(retired / "old")
        (tmp_path / ".b.work" / ".b.1.partial" / "weights").mkdir(parents=True)
        with working_folder(target, "k") as (folder, _):
            assert [path.name for path in target.iterdir()] == [expected]
            assert [path.name for path in folder.iterdir()] == ["key"]
        (target / "old").replace(target / "new") if expected == "old" else None
