"""Talking heads drawn in numpy: soft-edged ellipses, all frames at once.

Coordinates are in units of the picture's shorter side, origin at the middle of the
face, x to the right and y down, turned with the head. A shape is a signed distance d
(negative inside); its coverage of a pixel is a ramp one pixel wide across the edge, so
that small pictures stay smooth. For the (super)ellipses everything is made of,

    f = (|x/a|^p + |y/b|^p)^(1/p),   d = (f - 1) / |grad f|

to first order. Layers are painted from back to front.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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


class _Grid(NamedTuple):
    """Head coordinates x, y [F H W], those of the room [1 H W], size of a pixel."""

    x: np.ndarray
    y: np.ndarray
    room_x: np.ndarray
    room_y: np.ndarray
    pixel: float

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Share of each pixel inside a shape, from its signed distance."""
        return np.clip(0.5 - distance / self.pixel, 0, 1)


Layer = tuple[np.ndarray, np.ndarray | Rgb]
"""(cover [F H W], colour [3] or [F H W 3])"""


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


def _grid(pose: Pose, height: int, width: int) -> _Grid:
    unit = min(height, width)
    columns = ((np.arange(width) + 0.5 - width / 2) / unit).astype(np.float32)
    rows = ((np.arange(height) + 0.5 - height / 2) / unit).astype(np.float32)
    room_x, room_y = columns[None, None, :], rows[None, :, None]
    right, down, roll = (
        np.asarray(a, np.float32)[:, None, None] for a in (pose.x, pose.y, pose.roll)
    )
    x, y = room_x - right, room_y - down
    turned_x = np.cos(roll) * x + np.sin(roll) * y
    turned_y = np.cos(roll) * y - np.sin(roll) * x
    return _Grid(turned_x, turned_y, room_x, room_y, 1 / unit)


def _shade(colour: Rgb, light: np.ndarray | float) -> np.ndarray:
    """A colour under a light of about 1, which may vary over the picture."""
    return np.asarray(colour, np.float32) * np.asarray(light, np.float32)[..., None]


def _wall(face: Face, c: _Grid) -> Iterator[Layer]:
    """A wall lighter at the top and the glow of a lamp, not moving with the head."""
    x, y = np.broadcast_arrays(c.room_x, c.room_y)
    yield np.ones_like(x), _shade(WALL[face.wall], 0.94 - 0.28 * y)
    glow = np.exp(-(((x - face.lamp) / 0.22) ** 2) - ((y + 0.36) / 0.22) ** 2)
    yield 0.55 * glow, (255, 244, 214)


def _hair_outline(face: Face, c: _Grid) -> np.ndarray:
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


def _back(face: Face, c: _Grid) -> Iterator[Layer]:
    """Hair behind, neck, shirt and ears."""
    hair, skin = HAIR[face.hair], SKIN[face.skin]
    if face.style != "cropped":
        outline = c.cover(_hair_outline(face, c))
        shown = outline if face.style == "long" else outline * c.cover(c.y - 0.02)
        yield shown, _shade(hair, 0.8 - 0.3 * c.x)
    yield c.cover(_ellipse(c.x, c.y - 0.34, 0.1, 0.2, 4.0)), _shade(skin, 0.74)
    shirt = c.cover(_ellipse(c.x, c.y - 0.72, 0.46, 0.34, 2.6))
    yield shirt, _shade(SHIRT[face.shirt], 0.95 - 0.5 * c.x)
    collar = c.cover(_ellipse(c.x, c.y - 0.36, 0.115, 0.075))
    yield collar * shirt, _shade(skin, 0.82)
    ears = _ellipse(np.abs(c.x) - face.width, c.y - 0.01, 0.032, 0.055)
    yield c.cover(ears), _shade(skin, 0.84 - 0.3 * c.x)


def _head(face: Face, c: _Grid) -> Iterator[Layer]:
    """The face itself, beard and the hair over the forehead."""
    w, h = face.width, face.height
    hair = HAIR[face.hair]
    outline = c.cover(_ellipse(c.x, c.y, w, h, face.jaw))
    yield outline, _shade(SKIN[face.skin], 1.02 - 0.55 * c.x - 0.22 * c.y)
    side = (np.abs(c.x) - 0.6 * w) / 0.06
    blush = np.exp(-(side**2) - ((c.y - 0.09) / 0.05) ** 2)
    yield 0.22 * blush * outline, (206, 92, 84)
    if face.extra == "a beard":
        cheeks = _ellipse(c.x, c.y + 0.03, w * 0.82, 0.15, 2.6)
        beard = outline * (1 - c.cover(cheeks)) * c.cover(-0.01 - c.y)
        yield 0.86 * beard, _shade(hair, 0.95 - c.x)
    parting = 0.25 if face.style == "short" else 0.0
    line = -0.56 * h + 0.9 * c.x**2 / w - parting * c.x
    cap = c.cover(_ellipse(c.x, c.y + 0.03, w * 1.08, h * 1.07)) * c.cover(c.y - line)
    strength = 0.45 if face.style == "cropped" else 1.0
    yield strength * cap, _shade(hair, 0.98 - 0.6 * c.x - 0.3 * (c.y + h))


def _eyes(face: Face, c: _Grid, blink: np.ndarray) -> Iterator[Layer]:
    """Eyes with closing lids, brows, glasses."""
    blink = np.asarray(blink, np.float32)[:, None, None]
    x, y = np.abs(c.x) - face.eye_gap, c.y + 0.045
    size = face.eye_size
    lid = 0.62 * size * (1 - 0.93 * blink)
    socket = c.cover(_ellipse(x, y, 1.16 * size, lid + 0.3 * size))
    yield socket, _shade(SKIN[face.skin], 0.8)
    white = c.cover(_ellipse(x, y, size, lid)) * (1 - blink**2)
    yield white, (246, 244, 240)
    yield white * c.cover(_ellipse(x, y, 0.56 * size, 0.56 * size)), EYES[face.eyes]
    yield white * c.cover(_ellipse(x, y, 0.25 * size, 0.25 * size)), (12, 10, 12)
    glint_x = c.x + 0.2 * size - np.sign(c.x) * face.eye_gap
    glint = _ellipse(glint_x, y + 0.2 * size, 0.13 * size, 0.13 * size)
    yield 0.9 * white * c.cover(glint), (255, 255, 255)
    closed = c.cover(_ellipse(x, y - 0.1 * size, size, 0.16 * size))
    yield blink * closed, (52, 34, 30)
    arch = y + 1.65 * size - 3.0 * (x + 0.2 * size) ** 2
    brow = c.cover(_ellipse(x, arch, 1.25 * size, face.brow))
    yield 0.92 * brow, _shade(HAIR[face.hair], 0.75)
    if face.extra == "glasses":
        ring = np.abs(_ellipse(x, y - 0.004, 1.75 * size, 1.5 * size, 2.8)) - 0.009
        reach = np.abs(c.x) - (face.eye_gap - 1.7 * size)
        bridge = np.maximum(np.abs(y) - 0.008, reach)
        yield 0.95 * c.cover(np.minimum(ring, bridge)), (28, 26, 34)


def _nose_and_mouth(face: Face, c: _Grid, mouth: np.ndarray) -> Iterator[Layer]:
    """A nose, lips, and what is seen between them."""
    skin = SKIN[face.skin]
    ridge = _ellipse(c.x - 0.012, c.y - 0.4 * face.nose, 0.016, face.nose)
    yield 0.4 * c.cover(ridge), _shade(skin, 0.66)
    tip = _ellipse(c.x, c.y - 1.2 * face.nose, 0.036, 0.02)
    yield 0.75 * c.cover(tip), _shade(skin, 0.76)
    opening = np.asarray(mouth, np.float32)[:, None, None]
    width = face.mouth_width * (1 - 0.18 * opening)
    height = 0.002 + OPEN * opening
    y = c.y - 0.175 - 0.25 * OPEN * opening
    lips = c.cover(_ellipse(c.x, y, width + 0.018, height + 0.019, 1.8))
    yield lips, _shade(LIPS, 0.55 + 0.45 * float(np.mean(skin)) / 190)
    inside = c.cover(_ellipse(c.x, y, width, height))
    yield inside, MOUTH
    teeth = c.cover(y + 0.45 * height) * c.cover(np.abs(c.x) - 0.7 * width)
    yield 0.92 * inside * teeth * np.clip(4 * opening - 0.6, 0, 1), TEETH


def draw(
    face: Face, pose: Pose, height: int, width: int
) -> UInt8[np.ndarray, "F {height} {width} 3"]:
    """Draw a head in a pose a frame."""
    c = _grid(pose, height, width)
    layers = itertools.chain(
        _wall(face, c),
        _back(face, c),
        _head(face, c),
        _eyes(face, c, pose.blink),
        _nose_and_mouth(face, c, pose.mouth),
    )
    rgb = np.zeros((*c.x.shape, 3), np.float32)
    for cover, colour in layers:
        rgb += cover[..., None] * (np.asarray(colour, np.float32) - rgb)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
