"""Talking heads drawn in numpy: soft-edged ellipses, all frames at once.

Coordinates are in units of the picture's shorter side, origin at the middle of the
face, x to the right and y down, turned with the head. A shape is a signed distance d
(negative inside); its coverage of a pixel is a ramp one pixel wide across the edge, so
that small pictures stay smooth. For the (super)ellipses everything is made of,

    f = (|x/a|^p + |y/b|^p)^(1/p),   d = (f - 1) / |grad f|

to first order. Layers are painted from back to front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

Rgb = tuple[int, int, int]

SKIN: dict[str, Rgb] = {
    "fair": (240, 208, 184),
    "dark": (98, 64, 46),
    "olive": (202, 156, 112),
    "brown": (148, 100, 68),
    "light": (226, 182, 148),
}
HAIR: dict[str, Rgb] = {
    "black": (26, 22, 26),
    "blond": (218, 182, 104),
    "red": (178, 78, 36),
    "dark brown": (74, 46, 30),
    "grey": (156, 156, 160),
    "chestnut": (124, 74, 42),
}
EYES: dict[str, Rgb] = {
    "brown": (88, 52, 26),
    "green": (66, 122, 70),
    "blue": (58, 110, 186),
    "grey": (118, 130, 142),
}
SHIRT: dict[str, Rgb] = {
    "red": (176, 40, 44),
    "white": (228, 228, 224),
    "navy": (34, 46, 92),
    "green": (44, 118, 74),
    "yellow": (226, 186, 58),
    "purple": (108, 62, 140),
    "turquoise": (52, 160, 160),
}
WALL: dict[str, Rgb] = {
    "pale blue": (150, 186, 214),
    "beige": (206, 190, 162),
    "dark teal": (34, 82, 88),
    "pink": (222, 172, 180),
    "grey": (112, 116, 122),
    "mint": (166, 206, 180),
    "burgundy": (104, 38, 52),
}
STYLES = ("short", "long", "curly", "tied-up", "cropped")
EXTRAS = ("", "glasses", "a beard")
MOUTH: Rgb = (64, 12, 20)
LIPS: Rgb = (176, 74, 78)
TEETH: Rgb = (240, 236, 226)
OPEN = 0.062


@dataclass(frozen=True)
class Face:
    """How someone looks: names of the palettes above, and proportions.

    Lengths are half-sizes in units of the picture's shorter side.
    """

    skin: str
    hair: str
    eyes: str
    shirt: str
    wall: str
    style: str
    extra: str
    width: float
    height: float
    jaw: float
    eye_gap: float
    eye_size: float
    brow: float
    nose: float
    mouth_width: float
    lamp: float


class Pose(NamedTuple):
    """What a head does, one value a frame.

    x and y: its shift; roll: its turn in radians; blink and mouth: 0 open eyes, closed
    mouth, 1 closed eyes, open mouth.
    """

    x: np.ndarray
    y: np.ndarray
    roll: np.ndarray
    blink: np.ndarray
    mouth: np.ndarray


class _Canvas(NamedTuple):
    """RGB picture [F H W 3], head coordinates [F H W] and the size of a pixel."""

    rgb: np.ndarray
    x: np.ndarray
    y: np.ndarray
    pixel: float

    def cover(self, distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance / self.pixel, 0, 1)

    def paint(self, cover: np.ndarray, colour: np.ndarray | Rgb) -> None:
        self.rgb[...] += cover[..., None] * (np.asarray(colour, np.float32) - self.rgb)


def _ellipse(
    x: np.ndarray,
    y: np.ndarray,
    width: float | np.ndarray,
    height: float | np.ndarray,
    power: float = 2.0,
) -> np.ndarray:
    """Signed distance to a (super)ellipse of these half-sizes."""
    x, y = np.abs(x), np.abs(y)
    radius = ((x / width) ** power + (y / height) ** power) ** (1 / power)
    radius = np.maximum(radius, 1e-4)
    across = (x / radius) ** (power - 1) / width**power
    down = (y / radius) ** (power - 1) / height**power
    distance = (radius - 1) / np.maximum(np.hypot(across, down), 1e-3)
    return np.maximum(distance, np.maximum(x - width, y - height))


def _canvas(pose: Pose, height: int, width: int) -> _Canvas:
    unit = min(height, width)
    columns = ((np.arange(width) + 0.5 - width / 2) / unit).astype(np.float32)
    rows = ((np.arange(height) + 0.5 - height / 2) / unit).astype(np.float32)
    x, y, roll = (
        np.asarray(a, np.float32)[:, None, None] for a in (pose.x, pose.y, pose.roll)
    )
    x, y = columns[None, None, :] - x, rows[None, :, None] - y
    turned_x = np.cos(roll) * x + np.sin(roll) * y
    turned_y = np.cos(roll) * y - np.sin(roll) * x
    rgb = np.zeros((len(roll), height, width, 3), np.float32)
    return _Canvas(rgb, turned_x, turned_y, 1 / unit)


def _shade(colour: Rgb, light: np.ndarray) -> np.ndarray:
    """A colour [F H W 3] under a light of about 1."""
    return np.asarray(colour, np.float32) * light[..., None]


def _paint_wall(face: Face, c: _Canvas, height: int, width: int) -> None:
    """A wall lighter at the top and the glow of a lamp, not moving with the head."""
    unit = min(height, width)
    x = ((np.arange(width) + 0.5 - width / 2) / unit)[None, None, :]
    y = ((np.arange(height) + 0.5 - height / 2) / unit)[None, :, None]
    light = np.broadcast_to(0.94 - 0.28 * y, c.x.shape).astype(np.float32)
    c.rgb[...] = _shade(WALL[face.wall], light)
    glow = np.exp(-(((x - face.lamp) / 0.22) ** 2) - ((y + 0.36) / 0.22) ** 2)
    c.paint(0.55 * np.broadcast_to(glow, c.x.shape), (255, 244, 214))


def _hair_outline(face: Face, c: _Canvas) -> np.ndarray:
    """Signed distance to the mass of hair behind the face."""
    w, h = face.width, face.height
    if face.style == "long":
        top = _ellipse(c.x, c.y + 0.06, w * 1.28, h * 1.12)
        fall = _ellipse(c.x, c.y - 0.22, w * 1.34, h * 1.15, 3.0)
        return np.minimum(top, fall)
    if face.style == "curly":
        angle = np.arctan2(c.y + 0.1, c.x)
        wave = 1 + 0.05 * np.cos(13 * angle)
        return _ellipse(c.x / wave, (c.y + 0.1) / wave, w * 1.38, h * 1.02)
    cap = _ellipse(c.x, c.y + 0.05, w * 1.1, h * 1.06)
    if face.style == "tied-up":
        return np.minimum(cap, _ellipse(c.x, c.y + h + 0.08, 0.09, 0.08))
    return cap


def _paint_back(face: Face, c: _Canvas) -> None:
    """Hair behind, neck, shirt and ears."""
    hair, skin = HAIR[face.hair], SKIN[face.skin]
    above = c.cover(c.y - 0.02)
    if face.style == "long":
        above = np.ones_like(above)
    if face.style != "cropped":
        c.paint(c.cover(_hair_outline(face, c)) * above, _shade(hair, 0.8 - c.x * 0.3))
    c.paint(
        c.cover(_ellipse(c.x, c.y - 0.34, 0.1, 0.2, 4.0)), _shade(skin, 0.74 + 0 * c.x)
    )
    shirt = _ellipse(c.x, c.y - 0.72, 0.46, 0.34, 2.6)
    c.paint(c.cover(shirt), _shade(SHIRT[face.shirt], 0.95 - 0.5 * c.x))
    collar = c.cover(_ellipse(c.x, c.y - 0.36, 0.115, 0.075)) * c.cover(shirt)
    c.paint(collar, _shade(skin, 0.82 + 0 * c.x))
    ears = _ellipse(np.abs(c.x) - face.width, c.y - 0.01, 0.032, 0.055)
    c.paint(c.cover(ears), _shade(skin, 0.84 - 0.3 * c.x))


def _paint_head(face: Face, c: _Canvas) -> None:
    """The face itself, beard and the hair over the forehead."""
    w, h = face.width, face.height
    skin, hair = SKIN[face.skin], HAIR[face.hair]
    outline = c.cover(_ellipse(c.x, c.y, w, h, face.jaw))
    c.paint(outline, _shade(skin, 1.02 - 0.55 * c.x - 0.22 * c.y))
    blush = np.exp(
        -(((np.abs(c.x) - 0.6 * w) / 0.06) ** 2) - ((c.y - 0.09) / 0.05) ** 2
    )
    c.paint(0.22 * blush * outline, (206, 92, 84))
    if face.extra == "a beard":
        cheeks = _ellipse(c.x, c.y + 0.03, w * 0.82, 0.15, 2.6)
        beard = outline * (1 - c.cover(cheeks)) * c.cover(-0.01 - c.y)
        c.paint(0.86 * beard, _shade(hair, 0.95 - c.x))
    line = -0.56 * h + 0.9 * c.x**2 / w
    if face.style == "short":
        line = line - 0.25 * c.x
    cap = c.cover(_ellipse(c.x, c.y + 0.03, w * 1.08, h * 1.07)) * c.cover(c.y - line)
    strength = 0.45 if face.style == "cropped" else 1.0
    c.paint(strength * cap, _shade(hair, 0.98 - 0.6 * c.x - 0.3 * (c.y + h)))


def _paint_eyes(face: Face, c: _Canvas, blink: np.ndarray) -> None:
    """Eyes with closing lids, brows, glasses."""
    blink = np.asarray(blink, np.float32)[:, None, None]
    x, y = np.abs(c.x) - face.eye_gap, c.y + 0.045
    size = face.eye_size
    lid = 0.62 * size * (1 - 0.93 * blink)
    white = c.cover(_ellipse(x, y, size, lid)) * (1 - blink**2)
    c.paint(
        c.cover(_ellipse(x, y, size * 1.16, lid + 0.3 * size)),
        _shade(SKIN[face.skin], 0.8 + 0 * x),
    )
    c.paint(white, (246, 244, 240))
    c.paint(white * c.cover(_ellipse(x, y, 0.56 * size, 0.56 * size)), EYES[face.eyes])
    c.paint(white * c.cover(_ellipse(x, y, 0.25 * size, 0.25 * size)), (12, 10, 12))
    glint = _ellipse(
        c.x + 0.2 * size - np.sign(c.x) * face.eye_gap,
        y + 0.2 * size,
        0.13 * size,
        0.13 * size,
    )
    c.paint(0.9 * white * c.cover(glint), (255, 255, 255))
    closed = c.cover(_ellipse(x, y - 0.1 * size, size, 0.16 * size))
    c.paint(blink * closed, (52, 34, 30))
    arch = y + 1.65 * size - 3.0 * (x + 0.2 * size) ** 2
    brow = np.asarray(HAIR[face.hair], np.float32) * 0.75
    c.paint(0.92 * c.cover(_ellipse(x, arch, 1.25 * size, face.brow)), brow)
    if face.extra == "glasses":
        ring = np.abs(_ellipse(x, y - 0.004, 1.75 * size, 1.5 * size, 2.8)) - 0.009
        bridge = np.maximum(
            np.abs(y) - 0.008, np.abs(c.x) - (face.eye_gap - 1.7 * size)
        )
        c.paint(0.95 * c.cover(np.minimum(ring, bridge)), (28, 26, 34))


def _paint_nose_and_mouth(face: Face, c: _Canvas, mouth: np.ndarray) -> None:
    """A nose, lips, and what is seen between them."""
    skin = SKIN[face.skin]
    ridge = _ellipse(c.x - 0.012, c.y - 0.4 * face.nose, 0.016, face.nose)
    c.paint(0.4 * c.cover(ridge), _shade(skin, 0.66 + 0 * c.x))
    tip = _ellipse(c.x, c.y - 1.2 * face.nose, 0.036, 0.02)
    c.paint(0.75 * c.cover(tip), _shade(skin, 0.76 + 0 * c.x))
    opening = np.asarray(mouth, np.float32)[:, None, None]
    width = face.mouth_width * (1 - 0.18 * opening)
    height = 0.002 + OPEN * opening
    y = c.y - 0.175 - 0.25 * OPEN * opening
    lips = np.asarray(LIPS, np.float32) * (0.55 + 0.45 * np.mean(skin) / 190)
    c.paint(c.cover(_ellipse(c.x, y, width + 0.018, height + 0.019, 1.8)), lips)
    inside = c.cover(_ellipse(c.x, y, width, height))
    c.paint(inside, MOUTH)
    teeth = c.cover(y + 0.45 * height) * c.cover(np.abs(c.x) - 0.7 * width)
    c.paint(0.92 * inside * teeth * np.clip(4 * opening - 0.6, 0, 1), TEETH)


def draw(
    face: Face, pose: Pose, height: int, width: int
) -> UInt8[np.ndarray, "F {height} {width} 3"]:
    """Draw a head in a pose a frame."""
    c = _canvas(pose, height, width)
    _paint_wall(face, c, height, width)
    _paint_back(face, c)
    _paint_head(face, c)
    _paint_eyes(face, c, pose.blink)
    _paint_nose_and_mouth(face, c, pose.mouth)
    return np.clip(np.rint(c.rgb), 0, 255).astype(np.uint8)
