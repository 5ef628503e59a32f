"""Video files, folders and lists of images to a few RGB frames, within limits that are checked on the way."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
from numpy.typing import NDArray

from vila_edge.config import FrameRule
from vila_edge.errors import ImageError, InputError, UsageError
from vila_edge.media.image import FORMATS, MAX_PIXELS, ImageSource, RgbImage, check_size, load_image

MAX_BYTES = 2 << 30
MAX_FRAMES = 200_000
SUFFIXES = {*(f".{name.lower()}" for name in FORMATS), ".jpg", ".tif"}
# FFmpeg's names. What opens other files or devices (hls, dash, concat, image2, ...) is left out on purpose.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,h264,hevc,flv,asf,ogg,mjpeg,gif,apng,png_pipe,jpeg_pipe,webp_pipe"


@dataclass(frozen=True)
class Video:
    """frames, each [H, W, 3] uint8, in order of time, and where they came from, for people."""

    frames: tuple[RgbImage, ...]
    source: str

    @cached_property
    def sha256(self) -> str:
        """Digest of the frames' digests: equal exactly if the frames are."""
        return hashlib.sha256("".join(frame.sha256 for frame in self.frames).encode()).hexdigest()


VideoSource = str | os.PathLike[str] | Sequence[ImageSource] | Video


def frame_indices(count: int, frames: int, rule: FrameRule) -> list[int]:
    """Which of count frames are looked at, ascending: as many as frames says, some twice if need be.

    `rounded` (NVILA) spreads them from the first to the last, `before_last` (VILA 1.5) from the first to the last but
    one; of a clip with less than frames `before_last` takes each once. Raises UsageError for numbers below 1.
    """
    if count < 1 or frames < 1 or rule not in get_args(FrameRule):
        raise UsageError(f"{frames} frames of {count} by {rule!r}: expected 1 of 1 or more by {get_args(FrameRule)}")
    if rule == "before_last" and count < frames:
        return list(range(count))
    spread = np.round(np.linspace(0, count - 1, frames)) if rule == "rounded" else np.linspace(0, count - 2, frames)
    return [int(index) for index in spread]


def load_video(source: VideoSource, frames: int, rule: FrameRule = "rounded", fps: float = 0.0) -> Video:
    """The chosen frames of a video file, a folder of images (sorted by name) or a list; a Video as it is.

    With fps at most that many a second, at least one. A list of `frames` images is taken as it is. `before_last` pads
    a short clip with black frames at its start.
    Raises ImageError that names the source, InputError for fps where there is no time, UsageError without PyAV.
    """
    if isinstance(source, Video):
        return source
    if not 0 <= fps < math.inf:
        raise UsageError(f"fps is {fps}, expected 0 or more")
    if isinstance(source, str | os.PathLike):
        if not os.path.isdir(source):
            return Video(_from_file(Path(source), frames, rule, fps), str(source))
        name, images, complete = str(source), _folder(Path(source)), False
    else:
        name, images, complete = f"list of {len(source)} images", source, len(source) == frames
    if fps:
        raise InputError(f"{name}: images have no time, so fps {fps:g} means nothing", "leave out fps")
    _check_count(len(images), name)
    chosen = list(range(frames)) if complete else frame_indices(len(images), frames, rule)
    return Video(_arrange({index: load_image(images[index]) for index in dict.fromkeys(chosen)}, chosen, frames), name)


def _arrange(loaded: dict[int, RgbImage], chosen: list[int], frames: int) -> tuple[RgbImage, ...]:
    black = RgbImage(np.zeros_like(loaded[chosen[0]].pixels), "padding")
    return (black,) * (frames - len(chosen)) + tuple(loaded[index] for index in chosen)


def _folder(path: Path) -> Sequence[ImageSource]:
    try:
        # macOS leaves a hidden `._name.jpg`, which is no image, beside every image it copies
        return sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file())
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None


def _from_file(path: Path, frames: int, rule: FrameRule, fps: float) -> tuple[RgbImage, ...]:
    with _open(path) as file:
        count, seconds = _survey(file, path)
        for _ in range(3):  # packets are counted faster than frames, and are nearly always as many
            _check_count(count, path)
            if fps and seconds is None:
                raise InputError(f"{path}: without time stamps, so fps {fps:g} means nothing", "leave out fps")
            wanted = int(max(1, min(frames, (seconds or 0) * fps))) if fps else frames
            chosen = frame_indices(count, wanted, rule)
            loaded, decoded = _decode(file, path, set(chosen))
            if decoded == count:
                return _arrange(loaded, chosen, wanted)
            count = decoded
    raise ImageError(f"{path}: another number of frames each time that it is decoded", "save it again")


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        # by descriptor: what is checked is what is read, a pipe does not block, and FFmpeg sees a file without a name
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{path}: not a regular file")
            if status.st_size > MAX_BYTES:
                raise ImageError(f"{path}: {status.st_size >> 20:,} MiB, the limit is {MAX_BYTES >> 20}", "cut it")
            yield file
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def _stream(file: BinaryIO, path: Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its first video stream, from the start; whatever fails inside becomes an ImageError."""
    try:
        import av
    except ImportError:
        raise UsageError("PyAV reads videos and is missing", "pip install 'vila-edge[video]'") from None
    limits = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
    found, hint = "not a video that can be read", "expected MP4, MOV, MKV, WEBM, AVI, MPEG, FLV, WMV, OGG or GIF"
    file.seek(0)
    try:
        with av.open(file, "r", options=limits, metadata_errors="replace") as container:
            found, hint = "damaged or cut off, it cannot be decoded", "play it and save it again"
            # the cover of a song is a video stream, too
            moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not moving or not moving[0].codec_context or not moving[0].width:
                raise ImageError(f"{path}: no video in it that can be decoded", "convert it to H.264 in an MP4")
            check_size(moving[0].width, moving[0].height, str(path))
            moving[0].codec_context.options = limits  # a later frame can be larger than the header says
            yield container, moving[0]
    except ImageError:
        raise
    except Exception:  # PyAV has an exception for every error of FFmpeg, and damaged files find most of them
        raise ImageError(f"{path}: {found}", hint) from None


def _survey(file: BinaryIO, path: Path) -> tuple[int, float | None]:
    """How many packets the video has, and how many seconds they last, None without time stamps."""
    count, start, end = 0, math.inf, -math.inf
    with _stream(file, path) as (container, stream):
        for packet in container.demux():  # all streams: a file that was cut off may end in another one
            if packet.is_corrupt:
                raise ValueError("cut off")
            if packet.stream_index == stream.index and packet.size:
                count += 1
                _check_count(count, path)
                if (time := packet.dts if packet.pts is None else packet.pts) is not None:
                    start, end = min(start, time), max(end, time + (packet.duration or 0))
        # both ends are rounded to ticks, which must not cost a whole second its last frame
        return count, float((end - start + 1) * stream.time_base) if end >= start else None


def _decode(file: BinaryIO, path: Path, wanted: Collection[int]) -> tuple[dict[int, RgbImage], int]:
    """The wanted frames by their index, and how many there are in all."""
    kept, count = dict[int, RgbImage](), 0
    with _stream(file, path) as (container, stream):
        stream.thread_type = "AUTO"
        for count, frame in enumerate(container.decode(stream), 1):
            _check_count(count, path)
            check_size(frame.width, frame.height, str(path))
            if frame.is_corrupt:
                raise ValueError("damaged")
            if (index := count - 1) in wanted:
                kept[index] = RgbImage(_upright(frame), f"{path} frame {index}")
    return kept, count


def _upright(frame: Any) -> NDArray[np.uint8]:
    """Pixels [H, W, 3], turned and mirrored as the display matrix says, to the nearest quarter turn."""
    pixels = frame.to_ndarray(format="rgb24")
    if matrix := frame.side_data.get("DISPLAYMATRIX"):
        to_x, to_y = np.frombuffer(matrix, np.int32, 9).reshape(3, 3)[:2, :2].astype(np.int64).T
        if abs(to_x[0]) < abs(to_x[1]):
            pixels, to_x, to_y = pixels.swapaxes(0, 1), to_x[::-1], to_y[::-1]
        pixels = pixels[:: -1 if to_y[1] < 0 else 1, :: -1 if to_x[0] < 0 else 1]
    return np.array(pixels, order="C")


def _check_count(count: int, source: str | Path) -> None:
    if not 0 < count <= MAX_FRAMES:
        raise ImageError(f"{source}: {count:,} frames, expected 1 to {MAX_FRAMES:,}")
