"""Deterministic drawings of cleaned and dirty plates seen from above."""

import numpy as np

from plates.rules import Difficulty
from plates.synthetic.dirt import soil_plate
from plates.synthetic.look import LOOKS, Look
from plates.synthetic.plate import Box, Plate
from plates.synthetic.scene import (
    cast_shadow,
    cut_out,
    draw_background,
    lay_plate,
    light_scene,
    print_decoration,
    reflect_lamps,
    scratch_glaze,
    speckle_glaze,
    sprinkle_water,
)

CLASSES = ("cleaned", "dirty")

SCENE_STREAM, DIRT_STREAM, CUT_STREAM = 0, 1, 2


def draw_plate(seed: int, index: int, is_dirty: bool, difficulty: Difficulty = "easy") -> np.ndarray:
    """Draw picture `index` of the series `seed`; returns RGB uint8 (256, 341, 3).

    The same (seed, index, difficulty) shows the same plate, table, light, scratches, drops and reflections whether
    dirty or not: dirt comes from its own random stream.
    """
    look = LOOKS[difficulty]
    rng, plate = lay_table(seed, index, look)
    for _ in range(look.num_prints):
        print_decoration(rng, plate, look.food_prints)
    if look.has_lures:
        speckle_glaze(rng, plate)
    scratch_glaze(rng, plate, look.num_scratches)
    if is_dirty:
        soil_plate(np.random.default_rng([seed, index, DIRT_STREAM]), plate, look)
    sprinkle_water(rng, plate)
    reflect_lamps(rng, plate, look.num_lamps)
    if look.has_lures:
        cast_shadow(rng, plate)
    picture = light_scene(rng, plate.image)
    cut_out(np.random.default_rng([seed, index, CUT_STREAM]), picture, plate.mask, look.cut_outs)
    return picture


def plate_box(seed: int, index: int, difficulty: Difficulty = "easy") -> Box:
    """Left, top, right and bottom in pixels of the plate in a picture, its shadow left out; right and bottom are
    the first column and row beyond it."""
    _, plate = lay_table(seed, index, LOOKS[difficulty])
    box = plate.mask.getbbox()
    assert box is not None
    return box


def lay_table(seed: int, index: int, look: Look) -> tuple[np.random.Generator, Plate]:
    """A bare plate on its background, and the random stream for the rest of the scene."""
    rng = np.random.default_rng([seed, index, SCENE_STREAM])
    return rng, lay_plate(rng, draw_background(rng), look)
