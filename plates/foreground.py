"""The box of what is not background, by tensor operations alone, so that it exports to a graph with the model.

The background is what the border shows. Three cases, decided by values and never by Python:

- cut out: at least three quarters of the border have one colour exactly. The object is all that differs from it.
- plain: one colour that varies little, lit unevenly. The object is what has another colour, and what has edges; a
  darker tone of the background without an edge is its shadow.
- anything else, as wood, cloth or a scene, and whatever leaves doubt: the box is the whole image.

Errors go outwards: a mark or a hard shadow beside the object widens the box. What no pixel shows is lost: a rim of
the background's very colour.
"""

from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.functional import pad

LONG_SIDE_CELLS, MIN_SIDE_CELLS = 384, 16  # of the reduced copy; narrower copies leave doubt
BAND_CELLS = 3  # width of the border
MIN_AREA = 0.05  # fraction of the image's area
BACKGROUND_PERCENT = 75  # of the border: how much of it must look alike
DARKEST_SHADOW, LIGHTEST_SHADOW, BRIGHTEST_LIGHT = 0.5, 0.8, 1.3  # relative to the background's colour
MAX_SHADOW_AREA = 1.15  # of the box with its shadow over the box without
# What differs from the background, in levels of 255: of a cut-out above JPEG's ringing around what is left, else by
# a floor, a fraction of the background's brightest channel, and a multiple of what the border has itself.
CUT_OUT_LEVELS = 8.0
COLOUR_LEVELS = (3.0, 0.03, 2.0)
EDGE_LEVELS = (1.0, 0.01, 3.0)
MAX_COLOUR_LEVELS, MAX_EDGE_LEVELS = 40.0, 10.0  # a border that asks for more is no plain background
EVEN_PERCENT = 90  # of a plain border that has no edges; the rest may be an object's
# Specks are no object: cells of it that 7 x 7 cells must hold, around it; a straight edge alone has 2 x 7 and more.
WINDOW_CELLS, CUT_OUT_SUPPORT, PLAIN_SUPPORT = 7, 24, 16


def crop_to_foreground(image: Tensor) -> Tensor:
    """A view of the image's box; the image itself where its foreground is in doubt.

    Args:
        image: (3, H, W) uint8, or float32 in 0-255.

    Returns: (3, height, width), with the image's memory.
    """
    top, left, height, width = foreground_box(image).tolist()
    return image[:, top : top + height, left : left + width]


def foreground_box(image: Tensor) -> Tensor:
    """The box of what is not background, with a margin of about one part in 384 of the longer side.

    Args:
        image: (3, H, W) uint8, or float32 in 0-255.

    Returns: (4,) int64 top, left, height and width in pixels, on the image's device.
    """
    whole = torch.tensor([0, 0, *image.shape[1:]], device=image.device)
    cells, cell_px = reduce_image(image)
    return whole if min(cells.shape[1:]) < MIN_SIDE_CELLS else box_of_cells(cells, cell_px, whole)


def box_of_cells(cells: Tensor, cell_px: int, whole: Tensor) -> Tensor:
    """The boxes of images of one size.

    Args:
        cells: (..., 3, h, w), as `reduce_image` gives them.
        whole: (4,) int64, the box of a whole image in pixels.

    Returns: (..., 4) int64.
    """
    height, width = whole[2], whole[3]
    mask, is_dark, is_cut_out, is_plain = find_object(cells)
    masks = torch.stack([mask, mask | is_dark]).to(torch.uint8)  # bool takes amax four times as long
    rows, columns = masks.amax(-1).bool(), masks.amax(-2).bool()
    top, bottom = span_px(rows, cell_px, height)
    left, right = span_px(columns, cell_px, width)
    boxes = torch.stack([top, left, bottom - top, right - left], -1)
    areas = (boxes[..., 2] * boxes[..., 3]).float()
    # A shadow lies close around the object; darkness that goes on may be a rim in the tone of the shadow.
    box = torch.where((areas[1] > MAX_SHADOW_AREA * areas[0])[..., None], boxes[1], boxes[0])
    holds_middle = (2 * top < height) & (2 * bottom > height) & (2 * left < width) & (2 * right > width)
    num_sides = torch.stack([rows[0, ..., 0], rows[0, ..., -1], columns[0, ..., 0], columns[0, ..., -1]]).sum(0)
    # An outline from side to side does not tell which of its sides is the object; a cut-out's colour does.
    is_inside = (num_sides == 0) | (num_sides == 1) & holds_middle[0]
    is_large = rows[0].any(-1) & (areas[0] >= MIN_AREA * height * width)
    return torch.where((is_large & (is_cut_out | is_plain & is_inside))[..., None], box, whole)


def reduce_image(image: Tensor) -> tuple[Tensor, int]:
    """At most 384 cells a side, float32 (3, h, w), each a pixel or the mean of 2 x 2 of its; and pixels a cell."""
    reduction = -(-max(image.shape[1:]) // LONG_SIDE_CELLS)
    if reduction == 1:
        return image.float(), 1
    stride = -(-reduction // 2)
    # Reading every stride-th pixel takes a fraction of the time of a mean over all of a large photo.
    pixels = image[:, ::stride, ::stride].float()
    rows = pixels[:, :-1:2] + pixels[:, 1::2]  # an odd last one is inside the margin of a cell
    return (rows[..., :-1:2] + rows[..., 1::2]) / 4, 2 * stride


def find_object(cells: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the object is, complete at its outline alone, and what is as dark as a shadow, two bool (..., h, w);
    whether the background is cut out, and whether it is plain, two bool (...)."""
    colour = border_level(cells, 50)  # (..., 3, 1, 1)
    distance = (cells - colour).abs_().amax(-3)
    is_cut_out = border_level(distance, BACKGROUND_PERCENT) < 1
    tone = (cells * colour).sum(-3) / (colour * colour).sum(-3).clamp(min=1)
    shade = tone.clamp(DARKEST_SHADOW, BRIGHTEST_LIGHT)[..., None, :, :]
    tinge = (cells - shade * colour).abs_().amax(-3)
    # Second differences: small in a soft shadow, which falls evenly, where first differences are not.
    edge = (cells - sum_windows(pad(cells, (1, 1, 1, 1), mode="replicate"), 3) / 9).abs_().amax(-3)
    max_tinge, max_edge = (
        torch.maximum(floor + fraction * colour.amax(-3), multiple * border_level(levels, BACKGROUND_PERCENT))
        for levels, (floor, fraction, multiple) in ((tinge, COLOUR_LEVELS), (edge, EDGE_LEVELS))
    )
    mask = (is_cut_out & (distance > CUT_OUT_LEVELS)) | (~is_cut_out & ((tinge > max_tinge) | (edge > max_edge)))
    has_support = count_around(mask) >= torch.where(is_cut_out, CUT_OUT_SUPPORT, PLAIN_SUPPORT)
    is_near = count_around(has_support) > 0  # keeps the corners of a cut-out
    mask = mask & ((is_cut_out & is_near) | (~is_cut_out & has_support))
    is_even = (border_level(edge, EVEN_PERCENT) < max_edge) & (max_edge < MAX_EDGE_LEVELS)
    is_plain = is_even & (max_tinge < MAX_COLOUR_LEVELS)
    return mask, (tone < LIGHTEST_SHADOW) & ~is_cut_out, is_cut_out[..., 0, 0], is_plain[..., 0, 0]


def count_around(mask: Tensor) -> Tensor:
    """True cells among the 7 x 7 around each, (..., h, w): bytes, which ONNX Runtime does not add."""
    dtype = torch.int32 if torch.compiler.is_exporting() else torch.uint8
    return sum_windows(pad(mask.to(dtype), (WINDOW_CELLS // 2,) * 4), WINDOW_CELLS)


def sum_windows(values: Tensor, size: int) -> Tensor:
    """Sums of size x size neighbours of values (..., h, w), as (..., h - size + 1, w - size + 1)."""
    # On CPUs a tenth of the time of torch's pooling.
    height, width = (side - size + 1 for side in values.shape[-2:])
    rows = reduce(add, [values[..., first : first + height, :] for first in range(size)])
    return reduce(add, [rows[..., first : first + width] for first in range(size)])


def border_level(values: Tensor, percent: int) -> Tensor:
    """The quantile over the border's cells of values (..., h, w), as (..., 1, 1)."""
    middle = values[..., BAND_CELLS:-BAND_CELLS, :]
    bands = (
        values[..., :BAND_CELLS, :],
        values[..., -BAND_CELLS:, :],
        middle[..., :BAND_CELLS],
        middle[..., -BAND_CELLS:],
    )
    border = torch.cat([band.flatten(-2) for band in bands], -1).sort(-1).values
    return border[..., percent * (border.shape[-1] - 1) // 100, None, None]


def span_px(has_object: Tensor, cell_px: int, size_px: Tensor) -> tuple[Tensor, Tensor]:
    """First pixel, and the one after the last, of the cells (..., n) that have some of it and of one more a side."""
    num_cells = has_object.shape[-1]
    at = torch.arange(num_cells, device=has_object.device)
    first = torch.where(has_object, at, num_cells).amin(-1) - 1
    last = torch.where(has_object, at, 0).amax(-1) + 1
    return (first * cell_px).clamp(min=0), ((last + 1) * cell_px).clamp(max=size_px)
