"""The commands as a user meets them: stdout for the answer, stderr for the rest, exit codes that tell."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from tests.test_image import png_header
from vila_edge.cli import main
from vila_edge.cli.chat import chat
from vila_edge.cli.interrupt import stops_reply
from vila_edge.pipeline import Pipeline, load
from vila_edge.prompt import Turn
from vila_edge.sampler import Sampling
from vila_edge.version import __version__


def vila_edge(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vila_edge", *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin if stdin is not None else "",
        timeout=120,
    )


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The same as `vila_edge`, without the second that a process takes."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["vila-edge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        assert isinstance(left.value.code, int)
        return Done(left.value.code, *capsys.readouterr())

    return run


def test_version_and_help(in_process: Callable[..., Done]) -> None:
    assert vila_edge("--version").stdout == f"vila-edge {__version__}\n"
    for arguments in (["--help"], ["chat", "--help"], ["export", "-h"], ["demo", "-h"]):
        done = in_process(*arguments)
        assert done.returncode == 0
        assert "Usage:" in done.stdout


def test_the_answer_alone_is_on_stdout(tiny_bundle: Path, pictures: list[Path], pipeline: Pipeline) -> None:
    options = ["--temp", "1.5", "--seed", "5", "-n", "8", "-t", "1"]
    done = vila_edge("chat", tiny_bundle, "-i", pictures[0], "-i", pictures[1], "Which?", *options)
    want = pipeline.generate("Which?", pictures[:2], Sampling(temperature=1.5, seed=5, max_new_tokens=8))
    assert done.stdout == f"{want.text}\n"
    assert "onnxruntime" in done.stderr
    assert "auto" in done.stderr
    assert "tokens/s | TTFT" in done.stderr
    assert "vision" in done.stderr or "below 1 each" in done.stderr
    quiet = vila_edge("chat", tiny_bundle, "-q", "-i", pictures[0], "-i", pictures[1], "Which?", *options)
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


def test_json_is_one_object_with_everything(tiny_bundle: Path, pictures: list[Path]) -> None:
    done = vila_edge("chat", tiny_bundle, "-i", pictures[0], "What is <image>?", "--json", "-n", "4")
    answer = json.loads(done.stdout)
    assert done.stderr == ""
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"]) <= 4
    assert answer["usage"]["image_tokens"] == 9
    assert answer["images"] == [
        {"path": str(pictures[0]), "width": 50, "height": 40, "tokens": 9, "sha256": answer["images"][0]["sha256"]}
    ]
    assert {"ttft_ms", "vision_ms", "prefill_ms", "decode_ms", "tokens_per_s"} <= set(answer["timings"])
    assert len(answer["bundle_sha256"]) == 64
    assert isinstance(answer["seed"], int)


def test_the_reported_seed_repeats_the_answer(tiny_bundle: Path) -> None:
    first = json.loads(vila_edge("chat", tiny_bundle, "Hi", "--json", "--temp", "2", "-n", "20").stdout)
    again = vila_edge("chat", tiny_bundle, "Hi", "--json", "--temp", "2", "-n", "20", "--seed", str(first["seed"]))
    assert json.loads(again.stdout)["token_ids"] == first["token_ids"]


def test_a_prompt_may_come_from_a_pipe(tiny_bundle: Path) -> None:
    piped = vila_edge("chat", tiny_bundle, "-q", "-n", "5", stdin="Hello there\n")
    assert piped.stdout == vila_edge("chat", tiny_bundle, "-q", "-n", "5", "Hello there").stdout
    empty = vila_edge("chat", tiny_bundle, stdin="")
    assert empty.returncode == 2
    assert "error: no prompt" in empty.stderr


def damaged(bundle: Path) -> None:
    path = bundle / "weights" / "llm.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


BAD_CALLS = {
    "missing bundle": (["nowhere", "Hi"], 3, "nowhere: no such directory, expected a bundle"),
    "half a bundle": (["{half}", "Hi"], 3, "missing from the bundle"),
    "one flipped bit": (["{damaged}", "Hi"], 3, "llm.safetensors: changed since the export"),
    "a checkpoint": (["{checkpoint}", "Hi"], 3, "is a checkpoint, expected a bundle"),
    "not an image": (["{bundle}", "-i", "{text}", "Hi"], 3, "not an image that can be read"),
    "missing image": (["{bundle}", "-i", "nowhere.png", "Hi"], 3, "nowhere.png: no such file"),
    "empty image": (["{bundle}", "-i", "{empty}", "Hi"], 3, "an empty file"),
    "200 megapixels": (["{bundle}", "-i", "{huge}", "Hi"], 3, "megapixels"),
    "too long": (["{bundle}", "seven " * 300], 3, "the context has 128 with the answer"),
    "too many marks": (["{bundle}", "-i", "{image}", "<image> <image>"], 3, "2 <image> marks, but 1 image"),
    "temperature": (["{bundle}", "Hi", "--temp", "-1"], 2, "temperature is -1.0, expected from 0 to 100"),
    "context": (["{bundle}", "Hi", "-c", "999"], 2, "a context of 999 positions: this model has 1 to 128"),
    "backend": (["{bundle}", "Hi", "--backend", "cudnn"], 2, "unknown backend 'cudnn'"),
    "threads": (["{bundle}", "Hi", "-t", "0"], 2, "--threads 0: expected at least 1"),
    "too many threads": (["{bundle}", "Hi", "-t", "100000"], 2, "100,000 threads: expected 1 to"),
    "option": (["{bundle}", "Hi", "--nonsense"], 2, "No such option"),
}


@pytest.fixture(scope="module")
def places(
    tiny_bundle: Path, tiny_checkpoint: Path, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("bad")
    for name in ("half", "damaged"):
        shutil.copytree(tiny_bundle, folder / name)
    (folder / "half" / "weights" / "vision_tower.safetensors").unlink()
    damaged(folder / "damaged")
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "huge.png").write_bytes(png_header(20_000, 10_000))
    names = {"half": "half", "damaged": "damaged", "text": "text.png", "empty": "empty.png", "huge": "huge.png"}
    yield {name: str(folder / file) for name, file in names.items()} | {
        "bundle": str(tiny_bundle),
        "checkpoint": str(tiny_checkpoint),
        "image": str(pictures[0]),
    }


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_one_error_with_a_remedy_and_an_exit_code(
    case: str, places: dict[str, str], in_process: Callable[..., Done]
) -> None:
    arguments, code, message = BAD_CALLS[case]
    done = in_process("chat", *(argument.format(**places) if "{" in argument else argument for argument in arguments))
    assert done.returncode == code
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "0x" not in done.stderr
    if code != 2:
        assert done.stderr.count("error: ") == 1
        assert "hint: " in done.stderr


def test_no_traceback_leaves_a_process() -> None:
    done = vila_edge("chat", "nowhere", "Hi")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[0] == "error: nowhere: no such directory, expected a bundle"


def test_export_reports_and_refuses(tiny_checkpoint: Path, tmp_path: Path, in_process: Callable[..., Done]) -> None:
    done = in_process("export", tiny_checkpoint, "-o", tmp_path / "b", "-g", "32", "--name", "tiny")
    assert done.returncode == 0
    assert "same most likely token" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["b"]
    for arguments, code, message in (
        ([tiny_checkpoint, "-o", tmp_path / "b"], 2, "exists already"),
        ([tiny_checkpoint, "-o", tmp_path / "c", "-g", "48"], 2, "group_size 48: expected a power of two"),
        ([tiny_checkpoint, "-o", tmp_path / "c"], 2, "group_size 128: expected a power of two"),
        (
            [tiny_checkpoint, "-o", tmp_path / "c", "--quant", "int3"],
            2,
            "--quant int3: expected one of int4, fp16, fp32",
        ),
        ([tmp_path / "none", "-o", tmp_path / "c"], 3, "no such directory, expected a VILA checkpoint"),
        ([tmp_path / "b", "-o", tmp_path / "c"], 3, "is a bundle already"),
        ([tiny_checkpoint, "-o", tmp_path / "c", "-g", "32", "--calibration", tmp_path], 3, "samples.jsonl"),
        ([tiny_checkpoint, "-o", "/proc/nothing/c", "-g", "32"], 1, "cannot write"),
    ):
        done = in_process("export", *arguments)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(os.listdir(tmp_path)) == ["b"]
    assert in_process("export", tiny_checkpoint, "-o", tmp_path / "b", "-g", "32", "--force").returncode == 0


def test_ctrl_c_stops_a_reply_and_a_second_one_the_program(pipeline: Pipeline) -> None:
    endless = Sampling(temperature=2, seed=0, max_new_tokens=100)
    pipeline.stop_ids = frozenset()
    before = signal.getsignal(signal.SIGINT)
    reply = pipeline.stream([Turn("user", "Hi")], sampling=endless)
    with stops_reply(reply):
        for _ in reply:
            os.kill(os.getpid(), signal.SIGINT)
    assert reply.finish_reason == "cancelled"
    assert len(reply.token_ids) < 10
    with pytest.raises(KeyboardInterrupt), stops_reply(reply):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_one_shot_answer_exits_with_130(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> Pipeline:
        made = load(*arguments)  # type: ignore[arg-type]
        made.stop_ids = frozenset()
        embed_tokens = made.engine.embed_tokens

        def embed_and_interrupt(ids: list[int]) -> object:
            if len(ids) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return embed_tokens(ids)

        made.engine.embed_tokens = embed_and_interrupt  # type: ignore
        return made

    monkeypatch.setattr("vila_edge.cli.chat.load", interrupted)
    with pytest.raises(typer.Exit) as left:
        chat(tiny_bundle, "Hi there", temperature=2.0, seed=1)
    assert left.value.exit_code == 130
    assert "[stopped]" in capsys.readouterr().err
