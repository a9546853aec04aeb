"""Anti-aliased pictures of worlds, in the worlds' own units; and grids of channels as coloured tiles."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

PAPER: Colour = (250, 250, 247)
INK: Colour = (38, 45, 56)
STEEL: Colour = (91, 110, 135)
GREY: Colour = (206, 210, 214)
AMBER: Colour = (222, 142, 52)
TEAL: Colour = (32, 138, 148)
RED: Colour = (200, 72, 62)
_TILES = (PAPER, AMBER, STEEL, TEAL, RED, (150, 190, 90), (170, 120, 190), GREY, (240, 205, 110), (120, 80, 60))
_FINER = 4  # pixels are averaged over so many squared


class Canvas(NamedTuple):
    """Coordinates run right and up; lengths are in units of the world, `scale` pixels each."""

    image: Any
    pen: Any
    scale: float
    origin: Point

    def _at(self, point: Point) -> Point:
        return self.origin[0] + self.scale * point[0], self.origin[1] - self.scale * point[1]

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.pen.polygon([self._at(point) for point in points], fill=colour)

    def circle(self, centre: Point, radius: float, colour: Colour) -> None:
        (x, y), r = self._at(centre), self.scale * radius
        self.pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def rod(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """A line through `points` with round joints and ends."""
        pixels = max(round(self.scale * width), 1)
        self.pen.line([self._at(point) for point in points], fill=colour, width=pixels, joint="curve")
        for end in (points[0], points[-1]):
            self.circle(end, width / 2, colour)

    def box(self, centre: Point, size: Point, radius: float, colour: Colour) -> None:
        """A rectangle along the axes, with rounded corners."""
        left, bottom = self._at((centre[0] - size[0] / 2, centre[1] - size[1] / 2))
        right, top = self._at((centre[0] + size[0] / 2, centre[1] + size[1] / 2))
        self.pen.rounded_rectangle((left, top, right, bottom), self.scale * radius, fill=colour)

    def picture(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        small = self.image.resize((self.image.width // _FINER, self.image.height // _FINER), Image.Resampling.BOX)
        return np.asarray(small)


def canvas(height: int, width: int, left: float, right: float, bottom: float) -> Canvas:
    """An empty picture of `height` x `width` pixels that shows the world from `left` to `right`, and upwards."""
    image = Image.new("RGB", (width * _FINER, height * _FINER), PAPER)
    scale = width * _FINER / (right - left)
    return Canvas(image, ImageDraw.Draw(image), scale, (-left * scale, height * _FINER + bottom * scale))


def tiles(channels: np.ndarray, pixels: int = 24) -> np.ndarray:
    """Channels [H, W, C], 0 or not, as coloured squares of `pixels` pixels, uint8; the last channel lies on top."""
    top = ((channels != 0) * np.arange(1, channels.shape[-1] + 1)).max(-1)
    palette = np.array([INK, *(_TILES[i % len(_TILES)] for i in range(channels.shape[-1]))], np.uint8)
    return palette[top].repeat(pixels, 0).repeat(pixels, 1)
