"""Pictures of short texts, drawn with Pillow's own font: what the vision base was pretrained on and the demo reads.

The words come from ``pydoc_data.topics``, half a megabyte of English that every Python carries.
"""

from __future__ import annotations

import functools
import re
import string
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

MAX_CHARACTERS = 14
MARGIN = 4  # pixels between the text and the edge


@dataclass(frozen=True)
class Style:
    """How a text is drawn. Sizes are (height, width) in pixels; every limit is the upper end of a uniform range."""

    canvases: tuple[tuple[int, int], ...]
    font_sizes: tuple[int, int]
    noise: float = 0.0  # standard deviation, in grey levels of 255
    rotation: float = 0.0  # degrees, either way
    blur: float = 0.0  # Gaussian radius, pixels
    light_on_dark: float = 0.0  # share of the pictures whose ink is lighter than their paper
    contrast: tuple[int, int] = (110, 230)  # grey levels between ink and paper


PRINT = Style(
    canvases=((32, 96), (32, 128), (32, 160), (48, 128), (48, 160)),
    font_sizes=(13, 24),
    noise=8.0,
    light_on_dark=0.3,
)
"""Straight and clear, on light or dark paper: what the base learned to read."""

SIGN = Style(
    canvases=((48, 128),),
    font_sizes=(16, 22),
    noise=15.0,
    rotation=5.0,
    blur=0.5,
    light_on_dark=0.8,
    contrast=(90, 160),
)
"""A sign photographed at night: tilted, blurred, noisy. The base never saw one."""


@functools.cache
def words() -> tuple[str, ...]:
    """The distinct words of 2 to 10 letters in Python's own documentation, in order of first appearance."""
    from pydoc_data.topics import topics

    text = " ".join(topics[key] for key in sorted(topics))
    return tuple(dict.fromkeys(re.findall(r"\b[A-Za-z]{2,10}\b", text)))


def random_text(rng: np.random.Generator) -> str:
    """One or two words, a number, or letters without a meaning: 1 to ``MAX_CHARACTERS`` characters."""
    kind = rng.random()
    if kind < 0.15:
        return f"{rng.integers(0, 10 ** rng.integers(1, 5))}{rng.choice(['', '.50', '.99', '%', ':30'])}"
    if kind < 0.30:
        return "".join(rng.choice(list(string.ascii_letters + string.digits), size=rng.integers(2, 9)))
    picked = [words()[index] for index in rng.integers(0, len(words()), size=2)]
    text = " ".join(picked) if rng.random() < 0.5 else picked[0]
    text = text if len(text) <= MAX_CHARACTERS else picked[0]
    case = rng.random()
    return text.upper() if case < 0.15 else text.title() if case < 0.3 else text


def sign_text(rng: np.random.Generator) -> str:
    """What stands on a sign: a price, or one or two words in lower case."""
    if rng.random() < 0.2:
        return f"{rng.integers(1, 100)}.{rng.integers(0, 100):02}"
    known = [word for word in words() if word.islower() and 3 <= len(word) <= 8]
    first, second = (known[index] for index in rng.integers(0, len(known), size=2))
    together = f"{first} {second}"
    return together if len(together) <= MAX_CHARACTERS and rng.random() < 0.5 else first


def draw(text: str, style: Style, rng: np.random.Generator, canvas: tuple[int, int] | None = None) -> Image.Image:
    """``text`` as an RGB picture in ``style``; ``canvas`` (height, width) fixes the size, else one of the style's."""
    height, width = canvas or style.canvases[rng.integers(len(style.canvases))]
    coverage = _coverage(text, style, rng, height, width)
    paper, ink = _colours(style, rng)
    pixels = paper + (ink - paper) * coverage[..., None]
    pixels += rng.normal(0.0, rng.uniform(0.0, style.noise) + 1e-6, size=(height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _coverage(text: str, style: Style, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Share of each pixel that ink covers, float64 in [0, 1], (height, width)."""
    angle = rng.uniform(-style.rotation, style.rotation)
    tilt = abs(np.sin(np.radians(angle)))
    for size in range(int(rng.integers(style.font_sizes[0], style.font_sizes[1] + 1)), 7, -1):
        left, top, right, bottom = _font(size).getbbox(text)
        room_x = width - MARGIN - (right - left)
        room_y = height - MARGIN - (bottom - top) - width * tilt
        if min(room_x, room_y) >= 0:
            break
    picture = Image.new("L", (width, height), 0)
    shift_x = rng.uniform(-room_x, room_x) / 2
    shift_y = rng.uniform(-room_y, room_y) / 2
    corner = ((width - right - left) / 2 + shift_x, (height - bottom - top) / 2 + shift_y)
    ImageDraw.Draw(picture).text(corner, text, fill=255, font=_font(size))
    if style.rotation:
        picture = picture.rotate(angle, resample=Image.Resampling.BILINEAR)
    if style.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, style.blur)))
    return np.asarray(picture) / 255.0


def _colours(style: Style, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paper and ink, RGB, float64."""
    contrast = rng.uniform(*style.contrast)
    darker = rng.uniform(0.0, 255.0 - contrast, size=1) + rng.uniform(-15, 15, size=3)
    lighter = darker + contrast
    return (darker, lighter) if rng.random() < style.light_on_dark else (lighter, darker)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
