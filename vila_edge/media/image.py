"""Image files, bytes and arrays to RGB, within limits that are checked before anything is decoded."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vila_edge.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_BYTES = 64 << 20
MAX_PIXELS = 40_000_000
MAX_SIDE = 16_384


@dataclass(frozen=True)
class RgbImage:
    """pixels [H, W, 3] uint8, and where they came from, for people."""

    pixels: NDArray[np.uint8]
    source: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @cached_property
    def sha256(self) -> str:
        """Digest of shape and pixels: equal exactly if the images are."""
        return hashlib.sha256(str(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()


ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8] | RgbImage


def load_image(source: ImageSource) -> RgbImage:
    """A path, encoded bytes, a PIL image or an array [H, W, 3] uint8 as RGB; an RgbImage as it is.

    EXIF orientation is applied, an alpha channel is dropped, of several frames the first is taken.
    Raises ImageError that names the source.
    """
    if isinstance(source, RgbImage):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "image")
    if isinstance(source, bytes):
        return _decode(source, f"image of {len(source):,} bytes")
    return _decode(_read(Path(source)), str(source))


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{path}: a directory, expected an image file")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: not a regular file")
        if status.st_size > MAX_BYTES:
            raise ImageError(f"{path}: {status.st_size >> 20:,} MiB, the limit is {MAX_BYTES >> 20}", "make it smaller")
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file", "check the path of the image") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _decode(data: bytes, source: str) -> RgbImage:
    if not data:
        raise ImageError(f"{source}: an empty file, expected an image", "copy or download the image again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(image.width, image.height, source)
                return _to_rgb(image, source)
    except Image.DecompressionBombError:
        raise _too_large("its header promises more than 178 megapixels", source) from None
    except UnidentifiedImageError:
        expected = ", ".join(FORMATS[:-1]) + " or " + FORMATS[-1]
        raise ImageError(f"{source}: not an image that can be read", f"expected {expected}") from None
    except ImageError:
        raise
    except Exception:  # decoders raise whatever they like on damaged files, and their texts leak addresses
        raise ImageError(f"{source}: damaged, it cannot be decoded", "open it in a viewer and save it again") from None


def _to_rgb(image: Image.Image, source: str) -> RgbImage:
    check_size(image.width, image.height, source)
    upright: Any = ImageOps.exif_transpose(image)
    return RgbImage(np.asarray(upright.convert("RGB")), source)


def _from_array(array: NDArray[Any]) -> RgbImage:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(f"array {list(array.shape)} of {array.dtype}: expected [height, width, 3] of uint8")
    check_size(array.shape[1], array.shape[0], "array")
    return RgbImage(array, "array")


def check_size(width: int, height: int, source: str) -> None:
    """Raises ImageError unless there are pixels, and not too many."""
    if width < 1 or height < 1:
        raise ImageError(f"{source}: {width} x {height} pixels, an image has at least one")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(f"{width} x {height} pixels ({width * height / 1e6:.0f} megapixels)", source)


def _too_large(found: str, source: str) -> ImageError:
    limit = f"the limit is {MAX_PIXELS // 10**6} megapixels and {MAX_SIDE} on a side"
    return ImageError(f"{source}: {found}, {limit}", "make the image smaller: the model looks at far fewer pixels")
