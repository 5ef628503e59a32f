"""The interactive chat: paths in a line, commands, and a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vila_edge.cli.attachments import find_images
from vila_edge.cli.repl import Repl
from vila_edge.pipeline import Pipeline
from vila_edge.sampler import Sampling
from vila_edge.session import Session


@pytest.fixture
def repl(pipeline: Pipeline) -> Repl:
    return Repl(Session(pipeline, Sampling(max_new_tokens=5)), [], quiet=False)


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("what is {0}?", "what is <image>?"),
        ("is {0} larger than {1}", "is <image> larger than <image>"),
        ("'{2}' and \"{2}\"", "<image> and <image>"),
        ("{3}", "<image>"),
        ("file://{0} here", "<image> here"),
        ("look at {0}, then {1}.", "look at <image>, then <image>."),
        ("{0} dax;{1} wug;{0}", "<image> dax;<image> wug;<image>"),
        ("{0};{1},({0})", "<image>;<image>,(<image>)"),
        ("sum={0}", "sum=<image>"),
        ("no image at all", "no image at all"),
        ("version 1.png2 is text", "version 1.png2 is text"),
    ],
)
def test_paths_in_a_line_become_images_in_their_place(line: str, want: str, tmp_path: Path) -> None:
    names = ["a.png", "B.JPG", "with blank.png"]
    for name in names:
        (tmp_path / name).touch()
    paths = [str(tmp_path / name) for name in names]
    found = find_images(line.format(*paths, paths[2].replace(" ", "\\ ")))
    assert found.text == want
    assert len(found.images) == want.count("<image>")
    assert not found.missing


def test_a_path_that_leads_nowhere_stays_text_and_is_told() -> None:
    found = find_images("what is nowhere.png?")
    assert (found.text, found.images, found.missing) == ("what is nowhere.png?", (), ("nowhere.png",))


def test_a_conversation_with_images(repl: Repl, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle(f"/image {pictures[0]}")
    repl.handle("What is this?")
    assert repl.session.history[0].text == "<image>\nWhat is this?"
    repl.handle(f"Is {pictures[1]} the same?")
    assert repl.session.history[2].text == "Is <image> the same?"
    output = capsys.readouterr()
    assert "attached" in output.err
    assert output.err.count("TTFT") == 2
    assert output.out.count("\n") >= 2
    repl.handle("/images")
    assert capsys.readouterr().err.count("shown") == 2


def test_commands(repl: Repl, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle(f"/image {pictures[0]}")
    repl.handle("/drop")
    assert repl.attached == []
    repl.handle("/set temperature 0.7")
    assert repl.session.sampling.temperature == 0.7
    repl.handle("Hi")
    repl.handle("/clear")
    assert repl.session.history == []
    repl.handle("/help")
    assert all(command in capsys.readouterr().err for command in ["/image", "/set"][:1])
    with pytest.raises(SystemExit):
        repl.handle("/bye")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nonsense", "unknown command /nonsense"),
        ("/image", "/image needs a path"),
        ("/image nowhere.png", "nowhere.png: no such file"),
        ("/set speed 3", "expected one of temperature"),
        ("/set top_p 2", "top_p is 2.0, expected above 0"),
        ("/set seed x", "/set seed x: expected a number"),
        ("<image>", "1 <image> mark, but no images"),
        ("seven " * 300, "the context has 128"),
    ],
)
def test_an_error_is_said_and_the_conversation_goes_on(
    line: str, message: str, repl: Repl, capsys: pytest.CaptureFixture[str]
) -> None:
    repl.handle(line)
    assert message in " ".join(capsys.readouterr().err.split())
    repl.handle("Hi")
    assert len(repl.session.history) == 2


def test_ctrl_c_while_an_answer_comes_leads_back_to_the_prompt(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    engine, calls = repl.session.pipeline.engine, 0
    forward = engine.forward

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*arguments)  # type: ignore[arg-type]

    engine.forward = interrupted  # type: ignore
    repl.session.pipeline.stop_ids = frozenset()
    repl.session.sampling = Sampling(max_new_tokens=50)
    repl.handle("Hi")
    assert "[stopped]" in capsys.readouterr().err
    assert calls < 6
    repl.handle("Go on")
    assert len(repl.session.history) == 4


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *command: str | Path, home: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment.pop("XDG_STATE_HOME", None)
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen, self.position = "", 0

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until `text` has come behind what was waited for before."""
        deadline = time.monotonic() + seconds
        while (found := self.seen.find(text, self.position)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; seen: {self.seen[self.position :]!r}"
            try:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the program ended; seen: {self.seen!r}") from None
        self.position = found + len(text)


def test_at_a_terminal(tiny_bundle: Path, pictures: list[Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "vila_edge", "chat", str(tiny_bundle), "-i", str(pictures[0]), "-n", "5"]
    terminal = Terminal(*command, home=tmp_path)
    request.addfinalizer(terminal.close)
    terminal.wait_for(">>>")
    assert "attached" in terminal.seen
    terminal.send("What is this?\r")
    terminal.wait_for("TTFT")
    terminal.wait_for(">>>")
    terminal.send("half a line\x03")  # Ctrl-C at the prompt drops the line
    terminal.wait_for("Ctrl-D or /exit leaves")
    terminal.wait_for(">>>")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0
    assert "Traceback" not in terminal.seen
    history = tmp_path / ".local" / "state" / "vila-edge" / "history"
    assert "What is this?" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
