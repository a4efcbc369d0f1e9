"""What makes drawn plates easy or hard to tell apart."""

from typing import NamedTuple

from plates.rules import Difficulty
from plates.synthetic.plate import Range, Span


class Look(NamedTuple):
    """By default easy: much dirt, plain to see."""

    half_width_px: Span = (98, 124)  # of the plate
    shift_px: Span | None = (25, 8)  # of its centre, at most; None: as far as the dirt stays in the middle square
    cut_outs: float = 0.25  # share of pictures with the plate on one plain colour
    num_prints: int = 1
    food_prints: float = 0.5  # share of prints in food colours
    num_scratches: float = 3  # on average
    num_lamps: Range = (0, 3)
    has_lures: bool = False  # printed speckles and shadows
    num_kinds: Range = (1, 5)  # of dirt
    num_repeats: Range = (1, 4)  # of each kind
    amount: float = 1  # of crumbs, drops and bristles
    size: float = 1
    strength: float = 1
    num_foods: int = 1  # looked at for the one that stands out most
    least_px: int = 0  # pixels of dirt that stand out


LOOKS: dict[Difficulty, Look] = {
    "easy": Look(),
    "hard": Look(
        half_width_px=(75, 124),
        shift_px=None,
        cut_outs=0.4,
        num_prints=2,
        food_prints=0.7,
        num_scratches=5,
        num_lamps=(1, 4),
        has_lures=True,
        num_kinds=(1, 4),
        num_repeats=(1, 2),
        amount=0.3,
        size=0.6,
        strength=0.7,
        num_foods=3,
        least_px=80,
    ),
}
