"""Images of a training row: from whatever a data set holds to RGB pictures of the size that is wanted."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes, urlparse

import numpy as np
from PIL import Image, ImageOps

Resize = Literal["min", "max"] | int | tuple[int, int] | None
"""``"min"``: shrunk to fit the model's default picture, where it has one; ``"max"`` or None: as they are; ``int``: shrunk
to so many pixels on the longer side; ``(w, h)``: exactly so. The model's processor still has the last word: it rounds to
whole patches and has limits of its own."""

# What comes of a file that is cut off or no picture, of one in a mode without a white, of broken EXIF, and of more than
# 179 million pixels.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def load_image(source: object, root: Path | None = None) -> Image.Image:
    """An RGB picture from a PIL image, a path, bytes, a base64 string or data URI, an array (H, W[, C]), or the
    ``{"bytes": ..., "path": ...}`` of a data set. Relative paths start from ``root``, or the working directory.

    Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for something that is no picture and for an http
    address (nothing is downloaded during training), ``TypeError`` for another kind of value.
    """
    if isinstance(source, Image.Image):
        return _rgb(source)
    if isinstance(source, bytes | bytearray):
        return _decode(bytes(source), "the image's bytes")
    if isinstance(source, np.ndarray):
        return _rgb(_from_array(source))
    if isinstance(source, Path):
        return _open(source, root)
    if isinstance(source, str):
        return _from_text(source, root)
    if isinstance(source, Mapping) and (source.get("bytes") or source.get("path")):
        return load_image(source.get("bytes") or source.get("path"), root)
    raise TypeError(
        f"An image is {type(source).__name__} {str(source)[:80]!r}: give a PIL image, a path, bytes, base64 or an array"
    )


def image_root(data: str) -> Path | None:
    """Where the relative image paths of a data set start: beside its file, or in its directory; None for a hub set."""
    path = Path(data).expanduser()
    return (path if path.is_dir() else path.parent) if path.exists() else None


def resize_image(image: Image.Image, resize: Resize, default_side: int | None) -> Image.Image:
    """``image`` at the size that ``resize`` asks for; only ``(w, h)`` enlarges or changes the aspect ratio.

    ``default_side``: pixels along the model's default picture, None for a model that takes any size.
    """
    side = default_side if resize == "min" else resize if isinstance(resize, int) else None
    if isinstance(resize, tuple):
        size = resize
    elif side is not None and side < max(image.size):
        size = tuple(max(1, round(length * side / max(image.size))) for length in image.size)
    else:
        size = image.size
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def check_resize(resize: object) -> None:
    """Raise if ``resize`` is none of the forms of ``Resize``."""
    if resize is None or resize in ("min", "max"):
        return
    numbers = resize if isinstance(resize, tuple) else (resize,)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        kind = ValueError if isinstance(resize, str) else TypeError
        raise kind(f"resize is {resize!r}: give 'min', 'max', pixels on the longer side, (width, height), or None")
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"resize is {resize!r}: sizes are pixels above 0, as a number or as (width, height)")


def _rgb(image: Image.Image) -> Image.Image:
    """RGB, upright; what is transparent becomes white, as on a page."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert would make everything above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"An image has mode {image.mode!r}, which does not say what is white: give 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_array(pixels: np.ndarray) -> Image.Image:
    """(H, W) of 8 or 16 bits, or (H, W, C) of 8."""
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    is_grey = pixels.ndim == 2 and pixels.dtype.name in ("bool", "uint8", "uint16")
    is_colour = pixels.ndim == 3 and pixels.shape[2] <= 4 and pixels.dtype.name == "uint8"
    if not (is_grey or is_colour):
        raise ValueError(f"An image is an array {pixels.shape} of {pixels.dtype}: give (H, W[, C]) of uint8, from 0 to 255")
    return Image.fromarray(pixels)


def _decode(data: bytes, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(image)
    except UNREADABLE as error:
        raise ValueError(f"{name} ({len(data)} bytes) is not a picture that can be read: {error}") from error


def _open(path: Path, root: Path | None) -> Image.Image:
    path = (root or Path()) / path
    if not path.is_file():
        raise FileNotFoundError(f"There is no image {str(path)!r}: relative paths start from {(root or Path()).resolve()}")
    return _decode(path.read_bytes(), f"The image {str(path)!r}")


def _from_text(text: str, root: Path | None) -> Image.Image:
    scheme = urlparse(text[:200]).scheme
    if scheme in ("http", "https"):
        raise ValueError(
            f"The image {text[:120]!r} is on the web, and nothing is downloaded while training: save it first and give its path"
        )
    if scheme == "data":
        header, _, payload = text.partition(",")
        return _decode(_base64(payload) if header.endswith(";base64") else unquote_to_bytes(payload), "A data URI")
    if scheme == "file":
        return _open(Path(text.removeprefix("file://")), root)
    if "." not in text and len(text) > 40 and not ((root or Path()) / text[:255]).exists():  # no picture is shorter
        return _decode(_base64(text), "A base64 string")
    return _open(Path(text), root)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"An image given as base64 ({text[:40]!r}...) cannot be decoded: {error}") from error
