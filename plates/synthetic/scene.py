"""All that a picture shows but dirt: the table, the plate, prints, scratches, water and light."""

import math

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from plates.synthetic.look import Look
from plates.synthetic.plate import (
    FARTHEST_SPOT,
    HEIGHT_PX,
    SIZE_PX,
    WIDTH_PX,
    Plate,
    Range,
    cut_mask,
    draw_strokes,
    make_noise,
    sample_colour,
    sample_food,
    sample_spots,
    start_mask,
)

# Grey level 255 of the distance map stands for this multiple of the plate's radius.
FARTHEST = 1.2


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


def lay_plate(rng: np.random.Generator, image: Image.Image, look: Look) -> Plate:
    """Paint a bare plate and its shadow onto `image`."""
    kind = rng.choice(("round", "oval", "square"), p=(0.6, 0.2, 0.2))
    half_width_px = rng.uniform(*look.half_width_px)
    half_px = (half_width_px, half_width_px * (rng.uniform(0.7, 0.85) if kind == "oval" else 1))
    # Where it may lie anywhere, its dirt stays in the middle square, of which a centre crop shows most.
    most_px = look.shift_px or [HEIGHT_PX / 2 - FARTHEST_SPOT * half_width_px] * 2
    x_px, y_px = (side_px / 2 + rng.uniform(-most, most) for side_px, most in zip(SIZE_PX, most_px, strict=True))
    plate = Plate(image, Image.new("L", SIZE_PX), (x_px, y_px), half_px, tilt_rad=rng.uniform(-0.5, 0.5))
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
    image.paste((12, 10, 10), tuple(rng.integers(-7, 8, 2).tolist()), shadow)
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


def print_decoration(rng: np.random.Generator, plate: Plate, share_of_foods: float) -> None:
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
    # Prints share the food colours, so that colour alone does not give dirt away.
    plate.paint(sample_food(rng) if rng.random() < share_of_foods else sample_colour(rng), box, decoration)


def speckle_glaze(rng: np.random.Generator, plate: Plate) -> None:
    """Fine flat dots all over some plates, as stoneware has them; crumbs are raised, larger and in one place."""
    mask, draw = start_mask()
    count = rng.integers(60, 200) * (rng.random() < 0.3)
    plate.draw_discs(draw, plate.locate(*sample_spots(rng, count, 1)), rng.uniform(0.004, 0.01, count), 150)
    plate.paint(sample_food(rng), *cut_mask(mask))


def scratch_glaze(rng: np.random.Generator, plate: Plate, num_scratches: float) -> None:
    mask, draw = start_mask()
    turns_rad, at = sample_spots(rng, rng.poisson(num_scratches))
    ends = plate.locate(turns_rad + rng.normal(0, 0.4, len(at)), rng.uniform(0, 0.9, len(at)))
    draw_strokes(rng, draw, np.stack((plate.locate(turns_rad, at), ends)), (60, 170), (1, 2))
    plate.paint((90, 90, 95) if rng.random() < 0.6 else (245, 245, 245), *cut_mask(mask))


def sprinkle_water(rng: np.random.Generator, plate: Plate) -> None:
    mask, draw = start_mask()
    count = rng.integers(3, 20) * rng.integers(0, 2)
    plate.draw_discs(draw, plate.locate(*sample_spots(rng, count)), rng.uniform(0.01, 0.045, count), 255)
    plate.emboss(None, *cut_mask(mask), depth_px=2)


def reflect_lamps(rng: np.random.Generator, plate: Plate, num_lamps: Range) -> None:
    mask, draw = start_mask()
    count = rng.integers(*num_lamps)
    sizes = rng.uniform(0.04, 0.2, count)
    plate.draw_discs(draw, plate.locate(*sample_spots(rng, count)), sizes, int(rng.integers(60, 200)))
    box, lamps = cut_mask(mask)
    plate.paint((255, 255, 250), box, lamps.filter(ImageFilter.BoxBlur(float(rng.uniform(1, 4)))))


def cast_shadow(rng: np.random.Generator, plate: Plate) -> None:
    """The soft shadow of a hand or a phone over the rim and the table of some pictures."""
    mask, draw = start_mask()
    outline = plate.trace_patch(rng, plate.locate(rng.uniform(0, 2 * np.pi, 1), 1), rng.uniform(0.4, 1))
    draw.polygon(outline, fill=int(rng.integers(40, 110) * (rng.random() < 0.6)))
    soft = mask.reduce(16).resize(SIZE_PX, Image.Resampling.BICUBIC)
    plate.image.paste((12, 10, 10), mask=soft)


def light_scene(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """Tint and shade the picture; returns uint8 (256, 341, 3)."""
    fall = np.linspace(rng.uniform(0.8, 1), rng.uniform(0.8, 1), WIDTH_PX)[:, None]
    row = Image.fromarray((fall * rng.uniform(0.87, 1, 3) * 255).astype(np.uint8)[None])
    return np.array(ImageChops.multiply(image, row.resize(SIZE_PX, Image.Resampling.NEAREST)))


def cut_out(rng: np.random.Generator, picture: np.ndarray, mask: Image.Image, share: float) -> None:
    """In a share of pictures, make all but the plate white, black or another plain colour, as segmentation does."""
    kind = rng.choice(("white", "black", "plain"), p=(0.5, 0.25, 0.25))
    if rng.random() < share:
        colour = {"white": (255, 255, 255), "black": (0, 0, 0)}.get(kind) or sample_colour(rng)
        picture[np.asarray(mask) == 0] = colour
