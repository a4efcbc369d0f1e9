"""Deterministic drawings of cleaned and dirty plates seen from above."""

from __future__ import annotations

import cmath
import colorsys
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

CLASSES = ("cleaned", "dirty")

SIZE_PX = WIDTH_PX, HEIGHT_PX = 341, 256
SUPERSAMPLING = 2
MARGIN_PX = 5
SCENE_STREAM, DIRT_STREAM = 0, 1
# Grey level 255 of the distance map stands for this multiple of the plate's radius.
FARTHEST = 1.2

# Gravy, tomato, curry, herbs, chocolate, crust, beetroot.
FOOD_COLOURS = (
    *((106, 58, 26), (168, 38, 22), (204, 136, 30), (72, 92, 30)),
    *((62, 36, 22), (150, 92, 44), (116, 28, 50)),
)

Colour = tuple[int, int, int]
Span = tuple[float, float]
Range = tuple[int, int]
Box = tuple[int, int, int, int]


def draw_plate(seed: int, index: int, is_dirty: bool) -> np.ndarray:
    """Draw picture `index` of the series `seed`; returns RGB uint8 (256, 341, 3).

    The same (seed, index) shows the same plate, table, light, scratches, drops and reflections
    whether dirty or not: dirt comes from its own random stream.
    """
    rng = np.random.default_rng([seed, index, SCENE_STREAM])
    plate = lay_plate(rng, draw_background(rng))
    print_decoration(rng, plate)
    scratch_glaze(rng, plate)
    if is_dirty:
        soil_plate(np.random.default_rng([seed, index, DIRT_STREAM]), plate)
    sprinkle_water(rng, plate)
    reflect_lamps(rng, plate)
    return light_scene(rng, plate.image)


def draw_background(rng: np.random.Generator) -> Image.Image:
    kind = rng.choice(("wood", "cloth", "plain"))
    if kind == "wood":
        tones = rng.uniform(0.6, 1, (80, 4, 1)) * rng.uniform(90, 205) * np.array((1, 0.7, 0.45))
    else:
        tones = rng.uniform(0.9, 1, (3, 4, 1)) * sample_colour(rng, saturation=(0, 0.5), value=(0.4, 1))
    image = Image.fromarray(tones.astype(np.uint8)).resize(SIZE_PX, Image.Resampling.BILINEAR)
    if kind == "cloth":
        spacing_px, share = rng.uniform(24, 60), rng.uniform(0.2, 0.6)
        bands = np.arange(WIDTH_PX) % spacing_px < spacing_px * share
        weave = (bands * 1 + bands[:HEIGHT_PX, None] * rng.integers(0, 2)) * 70
        image.paste(sample_colour(rng), mask=Image.fromarray(weave.astype(np.uint8)))
    return image


def lay_plate(rng: np.random.Generator, image: Image.Image) -> Plate:
    """Paint a bare plate and its shadow onto `image`."""
    kind = rng.choice(("round", "oval", "square"), p=(0.6, 0.2, 0.2))
    half_width_px = rng.uniform(98, 124)
    half_px = (half_width_px, half_width_px * (rng.uniform(0.7, 0.85) if kind == "oval" else 1))
    centre_px = (WIDTH_PX / 2 + rng.uniform(-25, 25), HEIGHT_PX / 2 + rng.uniform(-8, 8))
    plate = Plate(image, Image.new("L", SIZE_PX), centre_px, half_px, tilt_rad=rng.uniform(-0.5, 0.5))
    across, down = plate.measure_axes()
    radius = np.sqrt(np.square(across) + np.square(down))
    if kind == "square":
        radius = np.sqrt(np.sqrt(np.square(np.square(across)) + np.square(np.square(down))))
    step = np.minimum(radius * (255 / FARTHEST), 255).astype(np.uint8)
    distance, at = Image.fromarray(step), np.linspace(0, FARTHEST, 256)
    colours, slope = profile_plate(rng, at)
    light_rad = rng.uniform(0, 2 * np.pi)
    height = slope.take(step) * (across * math.cos(light_rad) + down * math.sin(light_rad))
    relief = Image.fromarray((height + 128).astype(np.uint8))
    # Looking levels up by distance is far cheaper than computing every ring at every pixel.
    bands = [ImageChops.add(distance.point(levels), relief, 1, -128) for levels in colours]
    shadow = distance.point(np.clip((1.13 - at) * 700, 0, 110).astype(int).tolist())
    image.paste((12, 10, 10), mask=ImageChops.offset(shadow, *rng.integers(-7, 8, 2).tolist()))
    plate.mask.paste(distance.point(np.clip((1 - at) * 120 * 255, 0, 255).astype(int).tolist()))
    image.paste(Image.merge("RGB", bands), mask=plate.mask)
    return plate


def profile_plate(rng: np.random.Generator, at: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """Levels of red, green and blue at 256 distances `at`, and the slope, float32 (256,)."""
    well = rng.uniform(0.6, 0.78)
    glaze = sample_colour(rng, saturation=(0, 0.6), value=(0.4, 0.95))
    if rng.random() < 0.6:
        glaze = sample_colour(rng, saturation=(0, 0.07), value=(0.85, 0.97))
    colours = np.tile(np.array(glaze, np.float32), (256, 1))
    if rng.random() < 0.25:
        colours[at > well] = sample_colour(rng)
    for _ in range(rng.integers(0, 4)):
        ring, half_width = rng.uniform(well - 0.1, 0.99), rng.uniform(0.004, 0.03)
        strength = np.clip((half_width - np.abs(at - ring)) / 0.006 + 0.5, 0, 1)[:, None]
        colours += strength * (np.array(sample_colour(rng)) - colours)
    bump = np.exp(-(((at - well) / 0.035) ** 2)) - 0.8 * np.exp(-(((at - 0.975) / 0.02) ** 2))
    slope = rng.uniform(25, 60) * bump + rng.uniform(4, 16)
    return colours.astype(int).T.tolist(), slope.astype(np.float32)


def print_decoration(rng: np.random.Generator, plate: Plate) -> None:
    kind = rng.choice(("none", "dots", "flowers", "stripes", "marble"))
    mask, draw = start_mask()
    count, ring, size = int(rng.integers(7, 22)), rng.uniform(0.7, 0.92), rng.uniform(0.03, 0.08)
    turns_rad = np.linspace(0, 2 * np.pi, count, endpoint=False)
    rim = plate.locate(turns_rad, ring)
    if kind == "dots":
        plate.draw_discs(draw, rim, np.full(count, size), 255)
    elif kind == "flowers":
        hearts = rim if rng.random() < 0.6 else plate.locate(*sample_spots(rng, count // 2))
        petals = hearts[:, None] + np.exp(0.4j * np.pi * np.arange(5)) * size * plate.half_px[0] * 1.5
        plate.draw_discs(draw, petals.ravel(), np.full(petals.size, size / 2), 220)
    elif kind == "stripes":
        draw_strokes(rng, draw, np.stack((rim, plate.locate(turns_rad, 1))), (200, 255), (4, 8))
    box, decoration = cut_mask(mask)
    if kind == "marble":
        box, noise = (0, 0, *SIZE_PX), make_noise(rng, (12, 16), (0, 256), SIZE_PX)
        decoration = noise.point([max(0, min(220, 450 - 36 * abs(level - 128))) for level in range(256)])
    # Prints share the food colours half the time, so that colour alone does not give dirt away.
    plate.paint(sample_food(rng) if rng.random() < 0.5 else sample_colour(rng), box, decoration)


def scratch_glaze(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    turns_rad, at = sample_spots(rng, rng.poisson(3))
    ends = plate.locate(turns_rad + rng.normal(0, 0.4, len(at)), rng.uniform(0, 0.9, len(at)))
    draw_strokes(rng, draw, np.stack((plate.locate(turns_rad, at), ends)), (60, 170), (1, 2))
    plate.paint((90, 90, 95) if rng.random() < 0.6 else (245, 245, 245), *cut_mask(mask))


def soil_plate(rng: np.random.Generator, plate: Plate) -> None:
    kinds = (smear_food, drop_crumbs, stain_glaze, spill_sauce)
    for kind in rng.permutation(len(kinds))[: rng.integers(1, 5)]:
        for _ in range(rng.integers(1, 4)):
            kinds[kind](rng, plate)


def smear_food(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    turn_rad, at = sample_spots(rng, 1)
    sweep_rad, drift = rng.uniform(0.5, 1.8) * rng.choice((-1, 1)), rng.uniform(-0.3, 0.3)
    along, count = np.linspace(0, 1, 8)[:, None], rng.integers(8, 18)
    bristles = at + rng.normal(0, rng.uniform(0.04, 0.1), count) + drift * along
    paths = plate.locate(turn_rad + sweep_rad * (along + rng.uniform(0, 0.3, count)), bristles)
    draw_strokes(rng, draw, paths, (140, 255), (6, 18))
    box, smear = cut_mask(mask)
    smear = ImageChops.multiply(smear, make_noise(rng, (20, 26), (130, 256), smear.size))
    plate.paint(sample_food(rng), box, smear.filter(ImageFilter.BoxBlur(1)))


def drop_crumbs(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    count, spread = rng.integers(25, 90), rng.uniform(0.15, 0.5)
    turns_rad, at = (place + rng.normal(0, spread, count) for place in sample_spots(rng, 1))
    starts = plate.locate(turns_rad, at)
    ends = starts + rng.normal(0, 4, count) + 1j * rng.normal(0, 4, count)
    # A short thick line is a slab at a random angle: the cheapest shape that reads as a crumb.
    draw_strokes(rng, draw, np.stack((starts, ends)), (255, 256), (3, 10))
    plate.emboss(sample_food(rng), *cut_mask(mask), depth_px=1)


def stain_glaze(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    outline = plate.trace_patch(rng, plate.locate(*sample_spots(rng, 1)), rng.uniform(0.12, 0.4))
    draw.polygon(outline, fill=int(rng.integers(110, 200)))
    draw.line(outline + outline[:2], fill=int(rng.integers(170, 250)), width=5)
    box, stain = cut_mask(mask)
    stain = ImageChops.multiply(stain, make_noise(rng, (6, 8), (120, 256), stain.size))
    plate.paint(sample_food(rng), box, stain)


def spill_sauce(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    turn_rad, at = sample_spots(rng, 1)
    draw.polygon(plate.trace_patch(rng, plate.locate(turn_rad, at), rng.uniform(0.12, 0.4)), fill=245)
    count = rng.integers(2, 14)
    drops = plate.locate(turn_rad + rng.normal(0, 0.5, count), at + rng.normal(0, 0.3, count))
    plate.draw_discs(draw, drops, rng.uniform(0.015, 0.06, count), 245)
    plate.emboss(sample_food(rng), *cut_mask(mask), depth_px=2)


def sprinkle_water(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    count = rng.integers(3, 20) * rng.integers(0, 2)
    plate.draw_discs(draw, plate.locate(*sample_spots(rng, count)), rng.uniform(0.01, 0.045, count), 255)
    plate.emboss(None, *cut_mask(mask), depth_px=2)


def reflect_lamps(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    count = rng.integers(0, 3)
    sizes = rng.uniform(0.04, 0.2, count)
    plate.draw_discs(draw, plate.locate(*sample_spots(rng, count)), sizes, int(rng.integers(60, 200)))
    box, lamps = cut_mask(mask)
    plate.paint((255, 255, 250), box, lamps.filter(ImageFilter.BoxBlur(float(rng.uniform(1, 4)))))


def light_scene(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """Tint and shade the picture; returns uint8 (256, 341, 3)."""
    fall = np.linspace(rng.uniform(0.8, 1), rng.uniform(0.8, 1), WIDTH_PX)[:, None]
    row = Image.fromarray((fall * rng.uniform(0.87, 1, 3) * 255).astype(np.uint8)[None])
    return np.array(ImageChops.multiply(image, row.resize(SIZE_PX, Image.Resampling.NEAREST)))


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


def sample_spots(rng: np.random.Generator, count: int | np.integer) -> tuple[np.ndarray, np.ndarray]:
    """Places on the plate: angles in radians and shares of its radius, two float64 (count,)."""
    return rng.uniform(0, 2 * np.pi, count), 0.8 * np.sqrt(rng.random(count))


def sample_colour(rng: np.random.Generator, saturation: Span = (0, 0.8), value: Span = (0.3, 0.95)) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return int(red * 255), int(green * 255), int(blue * 255)


def sample_food(rng: np.random.Generator) -> Colour:
    red, green, blue = FOOD_COLOURS[rng.integers(len(FOOD_COLOURS))]
    share = rng.uniform(0.8, 1.15)
    return int(red * share), int(green * share), int(blue * share)


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
