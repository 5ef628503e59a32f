"""What is asked: the same from the command line, from a file and from Python."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests import test_cli
from vila_edge.cli.request import Request, parse_shot
from vila_edge.errors import InputError, UsageError
from vila_edge.pipeline import MediaSource, Pipeline, Shot
from vila_edge.sampler import Sampling
from vila_edge.visual import splice

Ask = Callable[..., dict[str, Any]]
in_process = test_cli.in_process
WARM = Sampling(temperature=1.5, seed=5, max_new_tokens=8)
OPTIONS = ("--json", "--temp", "1.5", "--seed", "5", "-n", "8")
NOTHING = Request(None, (), (), ())


@pytest.fixture
def sequences(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.float32]]:
    """What stood at each position [S, D], prompt by prompt: the tiny model's answers hardly depend on it."""
    found: list[NDArray[np.float32]] = []

    def splice_and_keep(*arguments: Any) -> NDArray[np.float32]:
        found.append(splice(*arguments))
        return found[-1]

    monkeypatch.setattr("vila_edge.pipeline.splice", splice_and_keep)
    return found


@pytest.fixture
def ask(tiny_bundle: Path, in_process: Any, sequences: list[NDArray[np.float32]]) -> Ask:
    """`vila-edge chat` with the settings of WARM, as JSON; and the sequence that it made."""

    def run(*arguments: str | Path) -> dict[str, Any]:
        done = in_process("chat", tiny_bundle, *arguments, *OPTIONS)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout)) | {"sequence": sequences[-1]}

    return run


@pytest.fixture
def generate(pipeline: Pipeline, sequences: list[NDArray[np.float32]]) -> Ask:
    """The same from Python."""

    def run(prompt: str, media: Sequence[MediaSource], shots: Sequence[Shot] = ()) -> dict[str, Any]:
        reply = pipeline.generate(prompt, media, WARM, shots)
        usage = {
            "prompt_tokens": reply.timings.prompt_tokens,
            "completion_tokens": reply.timings.new_tokens,
            "image_tokens": reply.timings.image_tokens,
        }
        return {"token_ids": reply.token_ids, "text": reply.text, "usage": usage, "sequence": sequences[-1]}

    return run


@pytest.fixture
def frames(tmp_path: Path) -> list[Path]:
    """Six frames in a folder of their own."""
    (tmp_path / "clip").mkdir()
    paths = [tmp_path / "clip" / f"{number}.png" for number in range(6)]
    rng = np.random.default_rng(1)
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    return paths


def same_sequence(one: dict[str, Any], other: dict[str, Any]) -> bool:
    a, b = one["sequence"], other["sequence"]
    return a.shape == b.shape and np.allclose(a, b, atol=1e-5)


def check_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same sequence was read and the same answer came."""
    assert same_sequence(one, other)
    for key in ("token_ids", "text", "usage"):
        assert one[key] == other[key]


@pytest.mark.parametrize(
    ("text", "image", "answer"),
    [
        ("a.png=dax", "a.png", "dax"),
        ("a.png=2 = 1 + 1", "a.png", "2 = 1 + 1"),
        ("a.png=", "a.png", ""),
        ("a.png==", "a.png", "="),
        ("dir/a b.png= dax\n", "dir/a b.png", " dax\n"),
    ],
)
def test_the_first_equals_sign_divides_a_shot(text: str, image: str, answer: str) -> None:
    assert parse_shot(text) == Shot(image, answer)


def test_an_equals_sign_may_be_in_the_name_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x=1" / "a=b.png"
    path.parent.mkdir()
    path.write_bytes(b"")
    assert parse_shot(f"{path}=c=d") == Shot(str(path), "c=d")
    assert parse_shot(f"{path}1=c=d") == Shot(str(tmp_path / "x"), "1/a=b.png1=c=d")  # no such file


@pytest.mark.parametrize("text", ["", "a.png", "=dax", "dax: a.png"])
def test_a_shot_without_image_or_answer_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"--shot {text}: expected IMAGE=ANSWER"):
        parse_shot(text)


def test_paths_in_a_file_are_meant_from_its_folder_and_go_first(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ask.json"
    path.parent.mkdir()
    shots = [{"image": "../s.png", "answer": "x = 1"}]
    asked = {"prompt": "Why?", "images": ["a.png", "/elsewhere/b.png"], "videos": ["v"], "shots": shots}
    path.write_text(json.dumps(asked))
    here = path.parent
    want = Request(
        "Why?", [str(here / "a.png"), "/elsewhere/b.png"], [str(here / "v")], [Shot(str(here / "../s.png"), "x = 1")]
    )
    assert NOTHING.with_file(path) == want
    said = Request("How?", ["c.png"], ["w"], [Shot("t.png", "y")]).with_file(path)
    assert said.prompt == "How?"
    assert said.images == [*want.images, "c.png"]
    assert said.videos == [*want.videos, "w"]
    assert said.shots == [*want.shots, Shot("t.png", "y")]


def test_a_file_may_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "ask.json").write_text("{}")
    assert NOTHING.with_file(tmp_path / "ask.json") == Request(None, [], [], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"promt": "x"}', "ask.json: unknown field 'promt'"),
        ('{"prompt": 5}', "ask.json: 'prompt' is 5, expected text"),
        ('{"images": "a.png"}', "ask.json: 'images' is 'a.png', expected a list of paths"),
        ('{"images": [5]}', r"ask.json: 'images' is \[5\], expected a list of paths"),
        ('{"images": null}', "ask.json: 'images' is None, expected a list of paths"),
        ('{"videos": {}}', "ask.json: 'videos' is {}, expected a list of paths"),
        ('{"shots": {"a.png": "dax"}}', "ask.json: 'shots' is {.*}, expected a list of objects"),
        ('{"shots": ["a.png=dax"]}', "ask.json: a shot is 'a.png=dax', expected {.*}"),
        ('{"shots": [{"image": "a.png"}]}', "ask.json: a shot is {'image': 'a.png'}, expected"),
        ('{"shots": [{"image": "a.png", "answer": 5}]}', "ask.json: a shot is .*5}, expected"),
        ('{"shots": [{"image": "a.png", "answer": "b", "c": "d"}]}', "ask.json: a shot is .*'c'.*, expected"),
        ("[]", "ask.json: expected a JSON object, found list"),
        ("nothing", "ask.json: not JSON"),
    ],
)
def test_a_file_that_says_something_else_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "ask.json").write_text(content)
    with pytest.raises(InputError, match=message):
        NOTHING.with_file(tmp_path / "ask.json")


def test_command_line_file_and_python_ask_the_same(
    ask: Ask, pictures: list[Path], tmp_path: Path, generate: Ask
) -> None:
    a, b, c = pictures
    told = ask("Which?", "-i", c, "--shot", f"{a}=dax", "--shot", f"{b}=a=b")
    check_same(told, generate("Which?", [c], [Shot(a, "dax"), Shot(b, "a=b")]))
    check_same(told, ask("<image>\ndax\n<image>\na=b\n<image>\nWhich?", "-i", a, "-i", b, "-i", c))
    assert told["usage"]["image_tokens"] == 27
    for path in pictures:
        shutil.copy(path, tmp_path)
    shots = [{"image": a.name, "answer": "dax"}, {"image": b.name, "answer": "a=b"}]
    file = tmp_path / "ask.json"
    file.write_text(json.dumps({"prompt": "Which?", "images": [c.name], "shots": shots}))
    written = ask("-f", file)
    check_same(written, told)
    assert [image["sha256"] for image in written["images"]] == [image["sha256"] for image in told["images"]]
    file.write_text(json.dumps({"shots": shots[:1]}))
    check_same(ask("Which?", "-i", c, "--shot", f"{b}=a=b", "-f", file), told)
    assert not same_sequence(ask("Which?", "-i", c, "--shot", f"{b}=a=b", "--shot", f"{a}=dax"), told)


def test_think_adds_the_cue(ask: Ask, pictures: list[Path]) -> None:
    thinking = ask("Which?", "-i", pictures[0], "--think")
    check_same(thinking, ask("Which? Think step-by-step.", "-i", pictures[0]))
    assert thinking["usage"]["prompt_tokens"] > ask("Which?", "-i", pictures[0])["usage"]["prompt_tokens"]


def test_a_video_is_its_frames(ask: Ask, frames: list[Path]) -> None:
    """VILA1.5 looks at N of n frames from the first to the last but one, each as an image."""
    seen = ask("What?", "--video", frames[0].parent, "--frames", "4")
    (video,) = seen["videos"]
    assert (video["frames"], video["tokens"], video["path"]) == (4, 36, str(frames[0].parent))
    assert (video["width"], video["height"], seen["images"]) == (40, 30, [])
    images = [option for number in (0, 1, 2, 4) for option in ("-i", frames[number])]
    check_same(seen, ask("What?", *images))


def test_a_video_has_as_many_frames_as_the_model_looks_at(
    ask: Ask, frames: list[Path], pipeline: Pipeline, generate: Ask
) -> None:
    seen = ask("What?", "--video", frames[0].parent)
    assert seen["videos"][0]["frames"] == pipeline.config.video.num_video_frames == 8
    check_same(seen, generate("What?", [pipeline.load_video(frames[0].parent)]))


def test_videos_go_behind_the_images(ask: Ask, frames: list[Path], pictures: list[Path]) -> None:
    seen = ask("What?", "--video", frames[0].parent, "--frames", "2", "-i", pictures[0])
    check_same(seen, ask("What?", "-i", pictures[0], "-i", frames[0], "-i", frames[4]))
    marked = ask("<image>\n<video>What?", "-i", pictures[0], "--video", frames[0].parent, "--frames", "2")
    check_same(marked, seen)


@pytest.mark.parametrize("count", ["0", "-3"])
def test_less_than_one_frame_makes_no_sense(count: str, frames: list[Path], tiny_bundle: Path, in_process: Any) -> None:
    done = in_process("chat", tiny_bundle, "What?", "--video", frames[0].parent, "--frames", count)
    assert done.returncode == 2
    assert f"error: --frames {count}: expected at least 1" in done.stderr


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("<video> What?", ["-i", "{image}"], "mark 1 of the prompt is <video>, but what comes with it is .*image"),
        ("<image> What?", ["--video", "{video}"], "mark 1 of the prompt is <image>, but what comes with it is .*video"),
        ("<video><image>", ["-i", "{image}", "--video", "{video}"], "mark 1 of the prompt is <video>"),
        ("What?", ["--shot", "{image}"], "--shot .*: expected IMAGE=ANSWER"),
        ("What?", ["--shot", "nowhere.png=dax"], "nowhere.png: no such file"),
        ("What?", ["-f", "nowhere.json"], "nowhere.json: No such file"),
        ("What?", ["--video", "nowhere"], "nowhere: "),
    ],
)
def test_what_cannot_be_asked_is_one_error(
    prompt: str, options: list[str], message: str, frames: list[Path], tiny_bundle: Path, in_process: Any
) -> None:
    places = {"image": str(frames[0]), "video": str(frames[0].parent)}
    done = in_process("chat", tiny_bundle, prompt, *(option.format(**places) for option in options))
    assert done.returncode in (2, 3)
    assert done.stdout == ""
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
