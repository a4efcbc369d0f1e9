"""Deterministic drawings of cleaned and dirty plates seen from above."""

from __future__ import annotations

import colorsys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

CLASSES = ("cleaned", "dirty")

HEIGHT_PX = 256
WIDTH_PX = 341
SUPERSAMPLING = 2
SCENE_STREAM = 0
DIRT_STREAM = 1
# Grey level 255 of the distance map stands for this multiple of the plate's radius.
FARTHEST = 1.2

FOOD_COLOURS = (
    (106, 58, 26),  # gravy
    (168, 38, 22),  # tomato
    (204, 136, 30),  # curry
    (72, 92, 30),  # herbs
    (62, 36, 22),  # chocolate
    (150, 92, 44),  # crust
    (116, 28, 50),  # beetroot
)

Colour = tuple[int, int, int]
Span = tuple[float, float]
Points = list[tuple[float, float]]


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
    kind = rng.choice(("wood", "cloth", "stone", "plain"))
    if kind == "wood":
        base = sample_colour(rng, hue=(0.05, 0.1), saturation=(0.3, 0.6), value=(0.35, 0.8))
        texture = make_noise(rng, int(rng.integers(50, 90)), 4).point(make_ramp(0.5))
    elif kind == "stone":
        base = sample_colour(rng, saturation=(0, 0.15), value=(0.25, 0.85))
        texture = make_noise(rng, 60, 80).point(make_ramp(0.3))
    else:
        base = sample_colour(rng, saturation=(0, 0.5), value=(0.4, 0.95))
        texture = make_noise(rng, 3, 4).point(make_ramp(0.12))
    image = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), base)
    image.paste(scale_colour(base, 0.4), mask=texture)
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
    plate = Plate(
        image=image,
        mask=Image.new("L", image.size),
        centre_px=(WIDTH_PX / 2 + rng.uniform(-25, 25), HEIGHT_PX / 2 + rng.uniform(-8, 8)),
        half_px=(half_width_px, half_width_px * (rng.uniform(0.7, 0.85) if kind == "oval" else 1)),
        tilt_rad=rng.uniform(-0.5, 0.5),
    )
    across, down = plate.measure_axes()
    radius = np.square(across) + np.square(down)
    if kind == "square":
        radius = np.sqrt(np.square(np.square(across)) + np.square(np.square(down)))
    step = np.minimum(np.sqrt(radius) * np.float32(255 / FARTHEST), 255).astype(np.uint8)
    distance = Image.fromarray(step)
    colours, slope = profile_plate(rng)
    light_rad = rng.uniform(0, 2 * np.pi)
    tilt = across * np.float32(np.cos(light_rad)) + down * np.float32(np.sin(light_rad))
    relief = Image.fromarray((slope[step] * tilt + 128).astype(np.uint8))
    bands = [ImageChops.add(distance.point(levels), relief, 1, -128) for levels in colours]
    at = np.linspace(0, FARTHEST, 256)
    shadow = distance.point(list(np.clip((1.13 - at) * 700, 0, 110).astype(int)))
    image.paste((12, 10, 10), mask=ImageChops.offset(shadow, *rng.integers(-7, 8, 2).tolist()))
    plate.mask.paste(distance.point(list(np.clip((1 - at) * 120 * 255, 0, 255).astype(int))))
    image.paste(Image.merge("RGB", bands), mask=plate.mask)
    return plate


def profile_plate(rng: np.random.Generator) -> tuple[list[list[int]], np.ndarray]:
    """Levels of red, green and blue by distance, 3 lists of 256, and the slope, float32 (256,)."""
    at = np.linspace(0, FARTHEST, 256)
    well = rng.uniform(0.6, 0.78)
    is_white = rng.random() < 0.6
    ranges: tuple[Span, Span] = ((0, 0.07), (0.85, 0.97)) if is_white else ((0.1, 0.6), (0.4, 0.95))
    colours = np.tile(np.float32(sample_colour(rng, (0, 1), *ranges)), (256, 1))
    if rng.random() < 0.25:
        colours[at > well] = sample_colour(rng)
    for _ in range(rng.integers(0, 4)):
        ring, half_width = rng.uniform(well - 0.1, 0.99), rng.uniform(0.004, 0.03)
        strength = np.clip((half_width - np.abs(at - ring)) / 0.006 + 0.5, 0, 1)[:, None]
        colours += strength * (np.float32(sample_colour(rng)) - colours)
    bump = np.exp(-(((at - well) / 0.035) ** 2)) - 0.8 * np.exp(-(((at - 0.975) / 0.02) ** 2))
    slope = rng.uniform(25, 60) * bump + rng.uniform(4, 16)
    return colours.astype(int).T.tolist(), slope.astype(np.float32)


def print_decoration(rng: np.random.Generator, plate: Plate) -> None:
    kind = rng.choice(("none", "dots", "petals", "stripes", "flowers", "marble"))
    mask, draw = start_mask()
    count = int(rng.integers(7, 22))
    ring, size = rng.uniform(0.7, 0.92), rng.uniform(0.03, 0.08)
    turns_rad = np.arange(count) * 2 * np.pi / count
    if kind == "dots":
        for turn_rad in turns_rad:
            draw.polygon(plate.trace_blob(rng, (turn_rad, ring), size, roughness=0), fill=255)
    elif kind == "petals":
        for turn_rad in turns_rad:
            for lean_rad in (-0.5, 0, 0.5):
                draw.polygon(plate.trace_petal((turn_rad, ring), size * 2, turn_rad + lean_rad), fill=220)
    elif kind == "stripes":
        for turn_rad in turns_rad:
            draw.line([plate.locate(turn_rad, at) for at in (ring, 1)], fill=230, width=int(size * 100))
    elif kind == "flowers":
        for spot in [sample_spot(rng) for _ in range(count // 2)]:
            for lean_rad in np.arange(5) * 2 * np.pi / 5:
                draw.polygon(plate.trace_petal(spot, size * 1.5, lean_rad), fill=220)
    elif kind == "marble":
        veins = make_noise(rng, 12, 16).point([220 * (116 < level < 140) for level in range(256)])
        mask.paste(veins.resize(mask.size))
    # Prints share the food colours half the time, so that colour alone does not give dirt away.
    plate.paint(sample_food(rng) if rng.random() < 0.5 else sample_colour(rng), finish_mask(mask))


def scratch_glaze(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    for _ in range(rng.poisson(3)):
        turn_rad, at = sample_spot(rng)
        end = plate.locate(turn_rad + rng.normal(0, 0.4), rng.uniform(0, 0.9))
        draw.line([plate.locate(turn_rad, at), end], fill=int(rng.integers(60, 170)), width=1)
    plate.paint((90, 90, 95) if rng.random() < 0.6 else (245, 245, 245), finish_mask(mask))


def soil_plate(rng: np.random.Generator, plate: Plate) -> None:
    kinds = (smear_food, drop_crumbs, stain_glaze, spill_sauce)
    for kind in rng.permutation(len(kinds))[: rng.integers(2, 5)]:
        for _ in range(rng.integers(1, 4)):
            kinds[kind](rng, plate)


def smear_food(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    turn_rad, at = sample_spot(rng)
    sweep_rad, drift = rng.uniform(0.5, 1.8) * rng.choice((-1, 1)), rng.uniform(-0.3, 0.3)
    along = np.linspace(0, 1, 10)
    for bristle in rng.normal(0, rng.uniform(0.04, 0.1), rng.integers(10, 24)):
        turns_rad = turn_rad + sweep_rad * (along + rng.uniform(0, 0.3))
        path = [plate.locate(*spot) for spot in zip(turns_rad, at + bristle + drift * along, strict=True)]
        draw.line(path, fill=int(rng.integers(120, 250)), width=int(rng.integers(4, 14)), joint="curve")
    soft = finish_mask(mask).filter(ImageFilter.BoxBlur(1))
    plate.paint(sample_food(rng), ImageChops.multiply(soft, make_noise(rng, 40, 52, lowest=130)))


def drop_crumbs(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    turn_rad, at = sample_spot(rng)
    spread = rng.uniform(0.15, 0.5)
    for _ in range(rng.integers(15, 60)):
        spot = (turn_rad + rng.normal(0, spread), at + rng.normal(0, spread))
        draw.polygon(plate.trace_blob(rng, spot, rng.uniform(0.01, 0.035), 0.3, corners=7), fill=255)
    plate.emboss(sample_food(rng), finish_mask(mask), depth_px=1)


def stain_glaze(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    outline = plate.trace_blob(rng, sample_spot(rng), rng.uniform(0.12, 0.4), 0.15)
    draw.polygon(outline, fill=int(rng.integers(80, 170)))
    draw.line([*outline, outline[0]], fill=int(rng.integers(150, 240)), width=5)
    plate.paint(sample_food(rng), ImageChops.multiply(finish_mask(mask), make_noise(rng, 16, 22, lowest=120)))


def spill_sauce(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    turn_rad, at = sample_spot(rng)
    draw.polygon(plate.trace_blob(rng, (turn_rad, at), rng.uniform(0.1, 0.36), 0.2), fill=245)
    for _ in range(rng.integers(2, 14)):
        spot = (turn_rad + rng.normal(0, 0.5), at + rng.normal(0, 0.3))
        draw.polygon(plate.trace_blob(rng, spot, rng.uniform(0.015, 0.06), 0.1), fill=245)
    plate.emboss(sample_food(rng), finish_mask(mask), depth_px=2)


def sprinkle_water(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    for _ in range(rng.integers(3, 20) * rng.integers(0, 2)):
        draw.polygon(plate.trace_blob(rng, sample_spot(rng), rng.uniform(0.01, 0.045), 0.06), fill=255)
    plate.emboss(None, finish_mask(mask), depth_px=2)


def reflect_lamps(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    for _ in range(rng.integers(0, 3)):
        outline = plate.trace_blob(rng, sample_spot(rng), rng.uniform(0.04, 0.2), 0.02)
        draw.polygon(outline, fill=int(rng.integers(60, 200)))
    soft = finish_mask(mask).filter(ImageFilter.BoxBlur(float(rng.uniform(2, 6))))
    plate.paint((255, 255, 250), soft)


def light_scene(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """Tint, shade and grain the picture; returns uint8 (256, 341, 3)."""
    tint = rng.uniform(0.92, 1.05, 3) * rng.uniform(0.85, 1.05)
    fall = np.linspace(rng.uniform(0.85, 1), rng.uniform(0.85, 1), WIDTH_PX)
    grain = rng.integers(0, 10, (HEIGHT_PX, WIDTH_PX, 1), np.uint8)
    lit = np.asarray(image) * (fall[:, None] * tint).astype(np.float32) + grain
    return np.minimum(lit, 255).astype(np.uint8)


def start_mask() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    mask = Image.new("L", (WIDTH_PX * SUPERSAMPLING, HEIGHT_PX * SUPERSAMPLING))
    return mask, ImageDraw.Draw(mask)


def finish_mask(mask: Image.Image) -> Image.Image:
    return mask.reduce(SUPERSAMPLING)


def make_noise(rng: np.random.Generator, rows: int, columns: int, lowest: int = 0) -> Image.Image:
    """Smooth noise of picture size with values in [lowest, 255], mode L."""
    coarse = Image.fromarray(rng.integers(lowest, 256, (rows, columns), np.uint8))
    return coarse.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.BILINEAR)


def make_ramp(share: float) -> list[int]:
    return [int(level * share) for level in range(256)]


def sample_spot(rng: np.random.Generator) -> tuple[float, float]:
    """A place on the plate: angle in radians and distance as a share of the plate's radius."""
    return rng.uniform(0, 2 * np.pi), 0.8 * np.sqrt(rng.random())


def sample_colour(
    rng: np.random.Generator, hue: Span = (0, 1), saturation: Span = (0, 0.8), value: Span = (0.3, 0.95)
) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value))
    return int(red * 255), int(green * 255), int(blue * 255)


def sample_food(rng: np.random.Generator) -> Colour:
    return scale_colour(FOOD_COLOURS[rng.integers(len(FOOD_COLOURS))], rng.uniform(0.8, 1.15))


def scale_colour(colour: Colour, share: float) -> Colour:
    red, green, blue = (min(255, int(level * share)) for level in colour)
    return red, green, blue


class Plate(NamedTuple):
    image: Image.Image
    mask: Image.Image
    centre_px: tuple[float, float]
    half_px: tuple[float, float]
    tilt_rad: float

    def measure_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of each pixel in half axes, two float32 (256, 341) arrays."""
        x_px = np.arange(WIDTH_PX) - self.centre_px[0]
        y_px = np.arange(HEIGHT_PX)[:, None] - self.centre_px[1]
        x_px, y_px = x_px.astype(np.float32), y_px.astype(np.float32)
        cos, sin = float(np.cos(self.tilt_rad)), float(np.sin(self.tilt_rad))
        width, height = self.half_px
        return x_px * (cos / width) + y_px * (sin / width), y_px * (cos / height) - x_px * (sin / height)

    def locate(self, turn_rad: float, at: float) -> tuple[float, float]:
        """Place on a supersampled mask of the point at this angle and share of the radius."""
        across_px = float(np.cos(turn_rad)) * at * self.half_px[0]
        down_px = float(np.sin(turn_rad)) * at * self.half_px[1]
        cos, sin = float(np.cos(self.tilt_rad)), float(np.sin(self.tilt_rad))
        x_px = self.centre_px[0] + across_px * cos - down_px * sin
        y_px = self.centre_px[1] + across_px * sin + down_px * cos
        return x_px * SUPERSAMPLING, y_px * SUPERSAMPLING

    def trace_blob(
        self, rng: np.random.Generator, spot: Span, size: float, roughness: float, corners: int = 24
    ) -> Points:
        """Outline of an uneven patch at `spot` whose size is a share of the plate's half width."""
        turns_rad = np.arange(corners) * (2 * np.pi / corners)
        waves = np.sin(np.outer(turns_rad, (2, 3, 4)) + rng.uniform(0, 2 * np.pi, 3))
        reach = np.maximum(1 + waves @ rng.normal(0, roughness, 3), 0.2) * size
        return self._outline(spot, reach, turns_rad)

    def trace_petal(self, spot: Span, size: float, lean_rad: float) -> Points:
        """Outline of a leaf that starts at `spot` and points towards `lean_rad`."""
        fan_rad = np.linspace(-0.5, 0.5, 9)
        return self._outline(spot, size * np.cos(fan_rad * np.pi), fan_rad + lean_rad)

    def _outline(self, spot: Span, reach: np.ndarray, turns_rad: np.ndarray) -> Points:
        x_px, y_px = self.locate(*spot)
        reach_px = reach * self.half_px[0] * SUPERSAMPLING
        outline = np.stack((x_px + reach_px * np.cos(turns_rad), y_px + reach_px * np.sin(turns_rad)), 1)
        return list(map(tuple, outline.tolist()))

    def paint(self, colour: Colour, mask: Image.Image) -> None:
        """Colour the part of `mask` (mode L, picture size) that lies on the plate."""
        box = mask.getbbox()
        if box:
            # Pasting only the painted box takes a fraction of the time of the whole picture.
            self.image.paste(colour, box, ImageChops.multiply(mask.crop(box), self.mask.crop(box)))

    def emboss(self, colour: Colour | None, mask: Image.Image, depth_px: int) -> None:
        """Paint `mask` as a raised body lit from the upper left, clear where `colour` is None."""
        shifted = ImageChops.offset(mask, depth_px, depth_px)
        if colour is not None:
            self.paint((20, 14, 10), shifted.point(make_ramp(0.35)))
            self.paint(colour, mask)
        dark_edge = ImageChops.subtract(mask, ImageChops.offset(mask, -depth_px, -depth_px))
        self.paint((15, 12, 12), dark_edge.point(make_ramp(0.4)))
        lit_edge = ImageChops.subtract(mask, shifted)
        self.paint((255, 255, 255), lit_edge.point(make_ramp(0.35 if colour else 0.75)))
