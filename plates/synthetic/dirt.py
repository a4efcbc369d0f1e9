"""Food that sticks to a plate."""

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageStat

from plates.synthetic.look import Look
from plates.synthetic.plate import (
    Box,
    Colour,
    Plate,
    cut_mask,
    draw_strokes,
    make_noise,
    sample_food,
    sample_spots,
    start_mask,
)

VISIBLE = 40  # levels of 255, before a shadow and the light take some


def soil_plate(rng: np.random.Generator, plate: Plate, look: Look) -> None:
    """Add dirt, and more of it while less than `look.least_px` pixels show it."""
    clean, kinds = plate.image.copy(), (smear_food, drop_crumbs, stain_glaze, spill_sauce)
    for kind in rng.permutation(len(kinds))[: rng.integers(*look.num_kinds)]:
        for _ in range(rng.integers(*look.num_repeats)):
            kinds[kind](rng, plate, look)
    while look.least_px and count_visible(clean, plate.image) < look.least_px:
        kinds[rng.integers(len(kinds))](rng, plate, look)


def count_visible(clean: Image.Image, dirty: Image.Image) -> int:
    """Pixels with a channel that differs by VISIBLE levels or more."""
    return int((np.asarray(ImageChops.difference(clean, dirty)).max(axis=2) >= VISIBLE).sum())


def smear_food(rng: np.random.Generator, plate: Plate, look: Look) -> None:
    mask, draw = start_mask()
    turn_rad, at = sample_spots(rng, 1)
    sweep_rad, drift = rng.uniform(0.5, 1.8) * rng.choice((-1, 1)), rng.uniform(-0.3, 0.3) * look.size
    along, count = np.linspace(0, 1, 8)[:, None], scale(rng.integers(8, 18), look.amount, 2)
    bristles = at + rng.normal(0, rng.uniform(0.04, 0.1) * look.size, count) + drift * along
    paths = plate.locate(turn_rad + sweep_rad * look.size * (along + rng.uniform(0, 0.3, count)), bristles)
    widths_px = scale(6, look.size, 1), scale(18, look.size, 2)
    draw_strokes(rng, draw, paths, (140, 255), widths_px)
    box, smear = cut_mask(mask)
    smear = ImageChops.multiply(smear, make_noise(rng, (20, 26), (130, 256), smear.size))
    plate.paint(choose_food(rng, plate, box, look), box, fade(smear.filter(ImageFilter.BoxBlur(1)), look))


def drop_crumbs(rng: np.random.Generator, plate: Plate, look: Look) -> None:
    mask, draw = start_mask()
    count, spread = scale(rng.integers(25, 90), look.amount, 3), rng.uniform(0.15, 0.5) * look.size
    turns_rad, at = (place + rng.normal(0, spread, count) for place in sample_spots(rng, 1))
    starts = plate.locate(turns_rad, at)
    ends = starts + rng.normal(0, 4, count) + 1j * rng.normal(0, 4, count)
    # A short thick line is a slab at a random angle: the cheapest shape that reads as a crumb.
    draw_strokes(rng, draw, np.stack((starts, ends)), (255, 256), (3, 10))
    box, crumbs = cut_mask(mask)
    plate.emboss(choose_food(rng, plate, box, look), box, crumbs, depth_px=1)


def stain_glaze(rng: np.random.Generator, plate: Plate, look: Look) -> None:
    mask, draw = start_mask()
    spot = plate.locate(*sample_spots(rng, 1))
    outline = plate.trace_patch(rng, spot, rng.uniform(0.12, 0.4) * look.size)
    draw.polygon(outline, fill=int(rng.integers(110, 200)))
    draw.line(outline + outline[:2], fill=int(rng.integers(170, 250)), width=scale(5, look.size, 2))
    box, stain = cut_mask(mask)
    stain = ImageChops.multiply(stain, make_noise(rng, (6, 8), (120, 256), stain.size))
    plate.paint(choose_food(rng, plate, box, look), box, fade(stain, look))


def spill_sauce(rng: np.random.Generator, plate: Plate, look: Look) -> None:
    mask, draw = start_mask()
    turn_rad, at = sample_spots(rng, 1)
    size = rng.uniform(0.12, 0.4) * look.size
    draw.polygon(plate.trace_patch(rng, plate.locate(turn_rad, at), size), fill=245)
    count = scale(rng.integers(2, 14), look.amount, 1)
    drops = plate.locate(turn_rad + rng.normal(0, 0.5 * look.size, count), at + rng.normal(0, 0.3 * look.size, count))
    plate.draw_discs(draw, drops, rng.uniform(0.015, 0.06, count) * look.size, 245)
    box, sauce = cut_mask(mask)
    plate.emboss(choose_food(rng, plate, box, look), box, fade(sauce, look), depth_px=2)


def scale(number: float | np.integer, factor: float, least: int) -> int:
    return max(least, round(number * factor))


def fade(mask: Image.Image, look: Look) -> Image.Image:
    return mask.point([int(level * look.strength) for level in range(256)])


def choose_food(rng: np.random.Generator, plate: Plate, box: Box, look: Look) -> Colour:
    """Of a few foods the one that stands out most from what lies in `box`."""
    ground = ImageStat.Stat(plate.image.crop(box)).mean
    foods = [sample_food(rng) for _ in range(look.num_foods)]
    return max(foods, key=lambda food: np.abs(np.subtract(food, ground)).sum())
