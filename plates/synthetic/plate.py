"""A plate to draw on, and what everything on it is drawn with."""

from __future__ import annotations

import cmath
import colorsys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SIZE_PX = WIDTH_PX, HEIGHT_PX = 341, 256
SUPERSAMPLING = 2
MARGIN_PX = 5
FARTHEST_SPOT = 0.8  # of the plate's radius

# Gravy, tomato, curry, herbs, chocolate, crust, beetroot.
FOOD_COLOURS = (
    *((106, 58, 26), (168, 38, 22), (204, 136, 30), (72, 92, 30)),
    *((62, 36, 22), (150, 92, 44), (116, 28, 50)),
)

Colour = tuple[int, int, int]
Span = tuple[float, float]
Range = tuple[int, int]
Box = tuple[int, int, int, int]


class Plate(NamedTuple):
    image: Image.Image
    mask: Image.Image
    centre_px: Span
    half_px: Span
    tilt_rad: float

    def measure_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of each pixel in half axes, two float32 (256, 341)."""
        turn = cmath.rect(1, -self.tilt_rad)
        x_px = (np.arange(WIDTH_PX) - self.centre_px[0]) * turn
        y_px = (np.arange(HEIGHT_PX)[:, None] - self.centre_px[1]) * turn * 1j
        across = np.add(x_px.real / self.half_px[0], y_px.real / self.half_px[0], dtype=np.float32)
        return across, np.add(x_px.imag / self.half_px[1], y_px.imag / self.half_px[1], dtype=np.float32)

    def locate(self, turns_rad: np.ndarray, at: np.ndarray | float) -> np.ndarray:
        """Points x + iy on a supersampled mask by angles and shares of the radius, complex128."""
        spots = np.cos(turns_rad) * at * self.half_px[0] + 1j * np.sin(turns_rad) * at * self.half_px[1]
        return (complex(*self.centre_px) + spots * cmath.rect(1, self.tilt_rad)) * SUPERSAMPLING

    def draw_discs(self, draw: ImageDraw.ImageDraw, spots: np.ndarray, sizes: np.ndarray, fill: int) -> None:
        """Discs at complex spots (n,) with radii (n,) in shares of the plate's half width."""
        for spot, reach in zip(spots, sizes * self.half_px[0] * SUPERSAMPLING, strict=True):
            draw.ellipse((spot.real - reach, spot.imag - reach, spot.real + reach, spot.imag + reach), fill)

    def trace_patch(self, rng: np.random.Generator, spot: np.ndarray, size: float) -> list[float]:
        """Outline [x, y, x, y, ...] of an uneven patch around `spot`, sized as a share of the half width."""
        turns_rad = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        waves = np.sin(np.outer(turns_rad, (2, 3, 4)) + rng.uniform(0, 2 * np.pi, 3))
        reach = np.maximum(1 + waves @ rng.normal(0, 0.18, 3), 0.2) * size * self.half_px[0]
        return (spot + reach * SUPERSAMPLING * np.exp(1j * turns_rad)).view(np.float64).tolist()

    def paint(self, colour: Colour, box: Box, mask: Image.Image) -> None:
        """Colour the part of `mask` that lies on the plate."""
        self.image.paste(colour, box, ImageChops.multiply(mask, self.mask.crop(box)))

    def emboss(self, colour: Colour | None, box: Box, mask: Image.Image, depth_px: int) -> None:
        """Paint `mask` as a raised body lit from the upper left, clear where `colour` is None."""
        lower = ImageChops.offset(mask, depth_px, depth_px)
        if colour is not None:
            self.paint(colour, box, mask)
        self.paint((15, 12, 12), box, ImageChops.subtract(lower, mask, 2.5))
        self.paint((255, 255, 255), box, ImageChops.subtract(mask, lower, 3 if colour else 1.3))


def start_mask() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    mask = Image.new("L", (WIDTH_PX * SUPERSAMPLING, HEIGHT_PX * SUPERSAMPLING))
    return mask, ImageDraw.Draw(mask)


def draw_strokes(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, paths: np.ndarray, levels: Range, widths_px: Range
) -> None:
    """Strokes through complex points (points, strokes) of random levels and supersampled widths."""
    for path in np.ascontiguousarray(paths.T).view(np.float64).tolist():
        draw.line(path, fill=int(rng.integers(*levels)), width=int(rng.integers(*widths_px)))


def cut_mask(mask: Image.Image) -> tuple[Box, Image.Image]:
    """The box of the picture that a supersampled mask covers, and the smooth mask of that box, mode L."""
    # Painting the covered box alone takes a fraction of the time of the whole picture.
    edges = np.array(mask.getbbox() or (0, 0, 0, 0)) // SUPERSAMPLING + np.multiply((-1, -1, 1, 1), MARGIN_PX)
    left, top, right, bottom = (edges * SUPERSAMPLING).tolist()
    return tuple(edges.tolist()), mask.crop((left, top, right, bottom)).reduce(SUPERSAMPLING)


def make_noise(rng: np.random.Generator, shape: Range, levels: Range, size_px: Range) -> Image.Image:
    """Smooth noise of (rows, columns) random levels stretched to (width, height), mode L."""
    coarse = Image.fromarray(rng.integers(*levels, shape, np.uint8))
    return coarse.resize(size_px, Image.Resampling.BILINEAR)


def sample_spots(
    rng: np.random.Generator, count: int | np.integer, farthest: float = FARTHEST_SPOT
) -> tuple[np.ndarray, np.ndarray]:
    """Places on the plate: angles in radians and shares of its radius, two float64 (count,)."""
    return rng.uniform(0, 2 * np.pi, count), farthest * np.sqrt(rng.random(count))


def sample_colour(rng: np.random.Generator, saturation: Span = (0, 0.8), value: Span = (0.3, 0.95)) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return int(red * 255), int(green * 255), int(blue * 255)


def sample_food(rng: np.random.Generator) -> Colour:
    red, green, blue = FOOD_COLOURS[rng.integers(len(FOOD_COLOURS))]
    share = rng.uniform(0.8, 1.15)
    return int(red * share), int(green * share), int(blue * share)
