"""A video becomes exactly the frames that were asked for, or one clear error."""

from __future__ import annotations

import builtins
import os
import random
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vila_edge.config import FrameRule
from vila_edge.errors import ImageError, InputError, UsageError, VilaEdgeError
from vila_edge.media import image as image_module
from vila_edge.media import video as video_module
from vila_edge.media.image import load_image
from vila_edge.media.video import Video, frame_indices, load_video

RULES: tuple[FrameRule, ...] = ("before_last", "rounded")
NEEDED = "needs PyAV, the extra `video`"
BLACK = np.zeros((16, 24, 3), np.uint8)


def numbered(index: int, size: tuple[int, int] = (24, 16)) -> NDArray[np.uint8]:
    """A picture that says which one it is, and which way is up."""
    pixels = np.full((size[1], size[0], 3), 8 + index, np.uint8)
    pixels[0, :, 0] = 255
    pixels[:, 0, 1] = 255
    return pixels


def write_clip(path: Path, count: int = 30, rate: int = 10, codec: str = "png", **options: Any) -> Path:
    """A clip of numbered pictures, without loss by default; kind and length of the stream come from the arguments."""
    av = pytest.importorskip("av", reason=NEEDED)
    pix_fmt = options.pop("pix_fmt", "rgb24")
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate)
        stream.width, stream.height, stream.pix_fmt = 24, 16, pix_fmt
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(index), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(video: Video) -> list[int]:
    """Which of the numbered pictures the frames are, -1 for black; all of their pixels are checked."""
    for frame in video.frames:
        index = int(frame.pixels[-1, -1, 2]) - 8
        np.testing.assert_array_equal(frame.pixels, BLACK if index == -8 else numbered(index))
    return [max(-1, int(frame.pixels[-1, -1, 2]) - 8) for frame in video.frames]


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 8, 13, 64])
def test_frames_are_chosen_as_by_the_models(frames: int) -> None:
    for count in (*range(1, 200), 1799, 65_537, 200_000):
        rounded = np.round(np.linspace(0, count - 1, frames)).astype(int)
        assert frame_indices(count, frames, "rounded") == rounded.tolist()
        before_last = np.linspace(0, count - 2, frames, dtype=int) if count >= frames else np.arange(count)
        assert frame_indices(count, frames, "before_last") == before_last.tolist()


def test_choices_that_cannot_be_made() -> None:
    for count, frames, rule in [(0, 4, "rounded"), (4, 0, "rounded"), (4, 4, "best")]:
        with pytest.raises(UsageError):
            frame_indices(count, frames, cast(FrameRule, rule))
    for fps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="fps"):
            load_video([BLACK], 1, fps=fps)


def test_lists_are_taken_as_they_are_or_chosen_from() -> None:
    images = [numbered(i) for i in range(10)]
    assert numbers(load_video(images, 10, "before_last")) == list(range(10))
    assert numbers(load_video(images, 4)) == [0, 3, 6, 9]
    assert numbers(load_video(images, 4, "before_last")) == [0, 2, 5, 8]
    assert numbers(load_video(tuple(images[:2]), 4)) == [0, 0, 1, 1]
    assert numbers(load_video(images[:2], 4, "before_last")) == [-1, -1, 0, 1]
    assert numbers(load_video([Image.fromarray(images[3]), load_image(images[5])], 2)) == [3, 5]
    video = load_video(images, 4)
    assert load_video(video, 8) is video


def test_folders_are_sorted_by_name(tmp_path: Path) -> None:
    for index in range(12):
        Image.fromarray(numbered(index)).save(tmp_path / f"{index:02}.{'PNG' if index % 2 else 'bmp'}")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._00.png").write_bytes(b"no image")
    (tmp_path / "05x.png").mkdir()
    assert numbers(load_video(tmp_path, 4)) == [0, 4, 7, 11]
    assert numbers(load_video(str(tmp_path), 4, "before_last")) == [0, 3, 6, 10]
    assert numbers(load_video(tmp_path, 14, "before_last")) == [-1, -1, *range(12)]
    assert load_video(tmp_path, 4).source == str(tmp_path)


def test_sources_without_frames_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="0 frames"):
        load_video(tmp_path, 4)
    with pytest.raises(ImageError, match="0 frames"):
        load_video([], 4)
    with pytest.raises(InputError, match="no time") as error:
        load_video([BLACK], 4, fps=1.0)
    assert "leave out fps" in error.value.hint
    monkeypatch.setattr(video_module, "MAX_FRAMES", 5)
    with pytest.raises(ImageError, match="6 frames, expected 1 to 5"):
        load_video([BLACK] * 6, 4)


def test_the_digest_is_that_of_the_frames() -> None:
    images = [numbered(i) for i in range(4)]
    assert load_video(images, 4).sha256 == load_video(tuple(images), 4).sha256
    assert len({load_video(x, len(x)).sha256 for x in (images, images[::-1], images[:3], [*images, BLACK])}) == 4


def test_without_pyav_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_pyav(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "av":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    (tmp_path / "clip.mp4").write_bytes(b"anything")
    monkeypatch.setattr(builtins, "__import__", without_pyav)
    with pytest.raises(UsageError, match="vila-edge\\[video\\]"):
        load_video(tmp_path / "clip.mp4", 4)
    assert numbers(load_video([BLACK, numbered(1)], 2)) == [-1, 1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("suffix", "codec", "pix_fmt"), [("mov", "png", "rgb24"), ("mkv", "ffv1", "bgr0")])
def test_a_clip_gives_exactly_the_frames_asked_for(
    suffix: str, codec: str, pix_fmt: str, rule: FrameRule, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / f"clip.{suffix}", 30, codec=codec, pix_fmt=pix_fmt)
    for frames in (1, 2, 7, 30, 33):
        padding = max(0, frames - 30) if rule == "before_last" else 0
        video = load_video(path, frames, rule)
        assert numbers(video) == [-1] * padding + frame_indices(30, frames, rule)
        assert len(video.frames) == frames
    assert load_video(path, 7, rule).sha256 == load_video(str(path), 7, rule).sha256


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.ts", "mpeg2video")]
)
def test_clips_with_loss_give_what_a_plain_decoder_gives(name: str, codec: str, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason=NEEDED)
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    path = write_clip(tmp_path / name, 60, rate=25, codec=codec, pix_fmt="yuv420p")
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 60
    for frame, index in zip(load_video(path, 6).frames, frame_indices(60, 6, "rounded"), strict=True):
        np.testing.assert_array_equal(frame.pixels, decoded[index])
        assert frame.source == f"{path} frame {index}"


def test_fps_bounds_the_frames_by_the_length_of_the_clip(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mov", 30, rate=10)  # 3 seconds
    for fps, frames in {0.1: 1, 0.5: 1, 1.0: 3, 2.0: 6, 2.5: 7, 4.0: 8, 1e308: 8}.items():
        for rule in RULES:
            assert numbers(load_video(path, 8, rule, fps)) == frame_indices(30, frames, rule)
    rounded_times = write_clip(tmp_path / "clip.mkv", 48, rate=24, codec="ffv1", pix_fmt="bgr0")
    assert len(load_video(rounded_times, 9, fps=2.0).frames) == 4


def test_a_bare_stream_has_no_time(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason=NEEDED)
    if "libx264" not in av.codecs_available:
        pytest.skip("this PyAV cannot write libx264")
    path = write_clip(tmp_path / "clip.h264", 12, codec="libx264", pix_fmt="yuv420p")
    assert len(load_video(path, 9).frames) == 9
    with pytest.raises(InputError, match="without time stamps"):
        load_video(path, 9, fps=2.0)


@pytest.mark.parametrize("name", ["many.gif", "one.gif", "one.png", "one.jpg", "one.webp"])
def test_animations_and_stills_are_videos(name: str, tmp_path: Path) -> None:
    pytest.importorskip("av", reason=NEEDED)
    images = [Image.fromarray(numbered(i)) for i in range(10)]
    more = images[1:] if name.startswith("many") else []
    options: dict[str, Any] = {"save_all": True, "append_images": more, "duration": 100} if more else {}
    images[0].save(tmp_path / name, **options)
    video = load_video(tmp_path / name, 3)
    expected = [numbered(i) for i in ((0, 4, 9) if more else (0, 0, 0))]
    assert np.abs(np.stack([f.pixels for f in video.frames]).astype(int) - expected)[:, 8:, 12:].max() <= 12


def turned(path: Path, matrix: Sequence[int]) -> Path:
    """The clip, an MP4 or MOV, with another display matrix a, b, c, d in its track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", *[m << 16 for m in (*matrix[:2], 0, *matrix[2:], 0, 0, 0)][:8], 1 << 30)
    target = path.with_name("turned.mov")
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),  # a phone held upright: to be turned clockwise
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
        ((0, 0, 0, 0), lambda p: p),
    ],
)
def test_phone_videos_are_turned_upright(matrix: Sequence[int], turn: Any, tmp_path: Path) -> None:
    path = turned(write_clip(tmp_path / "clip.mov", 3), matrix)
    video = load_video(path, 4, "before_last")
    np.testing.assert_array_equal(video.frames[2].pixels, turn(numbered(1)))
    assert video.frames[0].pixels.shape == video.frames[2].pixels.shape
    assert not video.frames[0].pixels.any()


def test_limits_are_checked_before_frames_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "clip.mov", 30)
    for module, limit, value, message in [
        (video_module, "MAX_BYTES", path.stat().st_size - 1, "the limit is 0"),
        (video_module, "MAX_FRAMES", 29, "30 frames, expected 1 to 29"),
        (image_module, "MAX_SIDE", 23, "24 x 16 pixels"),
        (image_module, "MAX_PIXELS", 383, "24 x 16 pixels"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, value)
            with pytest.raises(ImageError, match=message) as error:
                load_video(path, 4)
            assert str(path) in error.value.message
    assert len(load_video(path, 4).frames) == 4


def test_a_frame_larger_than_the_header_says_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason=NEEDED)
    path = tmp_path / "grows.mjpeg"
    with path.open("wb") as file:
        for size in [(24, 16)] * 20 + [(240, 160)]:
            Image.new("RGB", size).save(file, "JPEG")
    assert load_video(path, 21).frames[-1].size == (240, 160)
    monkeypatch.setattr(video_module, "MAX_PIXELS", 24 * 16 * 4)
    with pytest.raises(ImageError, match="damaged"):
        load_video(path, 21)
    monkeypatch.undo()
    monkeypatch.setattr(image_module, "MAX_SIDE", 200)
    with pytest.raises(ImageError, match="240 x 160 pixels"):
        load_video(path, 21)


def test_paths_that_lead_to_no_video(tmp_path: Path) -> None:
    pytest.importorskip("av", reason=NEEDED)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "empty.mp4").touch()
    for name, message in {
        "none.mp4": "No such file",
        "pipe.mp4": "not a regular file",
        "empty.mp4": "not a video that can be read",
    }.items():
        with pytest.raises(ImageError, match=message) as error:
            load_video(tmp_path / name, 4)
        assert name in error.value.message
    for url in ("http://127.0.0.1:9/a.mp4", "pipe:0", "concat:a.mp4|b.mp4", "rtsp://127.0.0.1:9/a", "a\0b.mp4", "-"):
        with pytest.raises(ImageError):
            load_video(url, 4)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason=NEEDED)
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", 8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(ImageError, match="no video in it"):
        load_video(path, 4)


PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{clip}\n#EXT-X-ENDLIST\n",
    "list.concat": "ffconcat version 1.0\nfile '{clip}'\n",
    "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 33\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet>'
    '<Representation id="1" bandwidth="1"><BaseURL>{clip}</BaseURL></Representation></AdaptationSet></Period></MPD>',
}


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("layers", [2, 1])
def test_playlists_open_no_other_file(
    name: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The container is refused; and if it were not, every protocol is."""
    clip = write_clip(tmp_path / "clip.ts", 30, codec="mpeg2video", pix_fmt="yuv420p", rate=25)
    assert load_video(clip, 2).frames
    path = tmp_path / name
    path.write_text(PLAYLISTS[name].format(clip="clip.ts" if "concat" in name else clip))
    if layers == 1:
        monkeypatch.setattr(video_module, "CONTAINERS", video_module.CONTAINERS + ",hls,concat,sdp,dash")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match="not a video that can be read|damaged|no video in it"):
        load_video(path.name, 4)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "png", "rgb24"),
        ("a.mkv", "ffv1", "bgr0"),
        ("a.mp4", "mpeg4", "yuv420p"),
        ("a.mp4", "libx264", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.ts", "mpeg2video", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
    ],
)
def test_damaged_clips_never_crash_or_print(
    name: str, codec: str, pix_fmt: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av", reason=NEEDED)
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    path = write_clip(tmp_path / name, 12, rate=25, codec=codec, pix_fmt=pix_fmt)
    whole, rng = path.read_bytes(), random.Random(0)
    capfd.readouterr()
    errors = 0
    for attempt in range(60):
        data = bytearray(whole[: rng.randint(1, len(whole))] if attempt % 2 else whole)
        for _ in range(rng.randint(0, 12) if attempt % 3 else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert len(load_video(path, 4, "before_last", 2.0 * (attempt % 5 == 0)).frames) <= 4
        except VilaEdgeError as error:
            errors += 1
            assert path.name in error.message
            assert "0x" not in str(error)
    assert errors > 5
    assert capfd.readouterr() == ("", "")


def test_random_bytes_are_no_video(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av", reason=NEEDED)
    rng = random.Random(1)
    path = tmp_path / "random.mp4"
    for start in (b"", b"\0\0\0\x18ftypmp42", b"\x1aE\xdf\xa3", b"RIFF\xff\0\0\0AVI ", b"GIF89a", b"\0\0\1\xba", b"G"):
        for size in (1, 50, 5000):
            path.write_bytes(start + rng.randbytes(size))
            with pytest.raises(ImageError, match="random.mp4"):
                load_video(path, 4)
    assert capfd.readouterr() == ("", "")


def test_an_mp4_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 30, codec="mpeg4", pix_fmt="yuv420p", options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ImageError, match="cut off"):
        load_video(path, 4)
