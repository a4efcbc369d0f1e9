"""A model with its preprocessing as one graph: images of any one size in, probabilities out.

Boxes depend on the image, and a graph has no crops whose size does: resizing is two products with matrices whose
weights are zero outside of the box. They are those of torch's kernel for bytes, and sums are rounded as there.
"""

from typing import cast

import torch
from torch import Tensor, nn

from plates.foreground import LONG_SIDE_CELLS, MIN_SIDE_CELLS, box_of_cells
from plates.model import Classifier
from plates.readouts import read_out
from plates.transforms import Preprocessing, to_input

WEIGHT_BITS, MAX_SHIFT = 15, 22  # of torch's resize: weights are whole numbers below 2**15, shifted by up to 22 bits


class ImageClassifier(nn.Module):
    """(B, H, W, 3) uint8 -> (B, C) float32, from one view of each image: the image as it is."""

    def __init__(self, model: Classifier, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.trunk, self.readout, self.head = model.trunk, model.readout, model.head
        self.preprocessing = preprocessing
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        pictures = make_pictures(images, self.preprocessing)
        is_flipped = images.new_zeros(images.shape[0], dtype=torch.bool)
        batch = to_input(pictures, is_flipped, self.preprocessing)
        return self.head(read_out(self.trunk, batch, self.readout).float()).softmax(1)


def make_pictures(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What `transforms.make_views` gives of each image's one view.

    Args:
        images: (B, H, W, 3) uint8.

    Returns: (B, 3, S, S) float32, whole numbers 0 to 255.
    """
    boxes = find_boxes(images) if preprocessing.crop == "foreground" else whole_box(images)[None]
    views = find_views(boxes, preprocessing)
    fill = torch.tensor([round(255 * value) for value in preprocessing.mean])[:, None, None]
    pixels, longest = images.movedim(-1, 1).float(), cast(int, torch.sym_max(*images.shape[1:3]))
    for side in (1, 0):  # along rows first, as torch
        box, view = (ends.unflatten(1, (2, 2))[:, :, side] for ends in (boxes, views))
        weights, share_outside = resize_weights(box, view, images.shape[1 + side], longest, preprocessing)
        outside = fill * share_outside[:, None, :, None]  # (B, 3, S, 1)
        pixels = pixels @ weights.mT[:, None] + outside.mT if side else weights[:, None] @ pixels + outside
        pixels = (pixels + 0.5).floor().clamp(0, 255)
    return pixels


def find_views(boxes: Tensor, preprocessing: Preprocessing) -> Tensor:
    """`transforms.eval_view` of what lies in the boxes (B, 4), as boxes (B, 4) of the images."""
    starts, sides = boxes.split(2, 1)
    if preprocessing.crop_mode == "border":
        seen = sides.amax(1, keepdim=True)
    else:
        whole = sides.amin(1, keepdim=True) if preprocessing.crop_mode == "center" else sides
        seen = (whole.double() * preprocessing.crop_pct).round().clamp(min=1).long()
    return torch.cat([starts + (sides - seen) // 2, seen.expand_as(sides)], 1)


def resize_weights(
    box: Tensor, view: Tensor, num_pixels: int, longest: int, preprocessing: Preprocessing
) -> tuple[Tensor, Tensor]:
    """How much each pixel along a side of the image counts in each of the picture, as in torch's resize for bytes.

    Args:
        box: (B, 2) start and length of what is seen of the image.
        view: (B, 2) start and length of what the picture shows, at most `longest`; it may reach over the box.
        num_pixels: N, of the image's side.

    Returns: (B, S, N) float32, zero outside of the box; and (B, S), how much of the picture is outside of it.
    """
    start, length = view[:, :1], view[:, 1:]
    weights = antialias(length[..., None], longest, preprocessing)
    pixels = torch.arange(num_pixels)
    is_seen = (pixels >= box[:, :1]) & (pixels < box.sum(1, keepdim=True))
    at = pixels - start  # (B, N), in pixels of the view
    is_seen = is_seen & (at >= 0) & (at < length)
    at = torch.where(is_seen, at, 0)[:, None].expand(-1, preprocessing.image_size, -1)
    of_pixels = torch.where(is_seen[:, None], weights.gather(2, at), 0)
    return of_pixels, weights.sum(2) - of_pixels.sum(2)


def antialias(length: Tensor, longest: int, preprocessing: Preprocessing) -> Tensor:
    """Weights (B, S, longest) float32 of pixels from `length` (B, 1, 1) to S of the picture, by PIL's filters, whose
    reach grows with the scale; in float64, as torch, and multiples of a power of two, as its kernel has them."""
    scale = length.double() / preprocessing.image_size
    centre = (torch.arange(preprocessing.image_size, dtype=torch.float64)[:, None] + 0.5) * scale
    at = torch.arange(longest)
    distance = ((at + 0.5 - centre) / scale.clamp(min=1)).abs()
    if preprocessing.interpolation == "bilinear":
        values = (1 - distance).clamp(min=0)
    else:  # Keys' cubic, a = -0.5
        inner = (1.5 * distance - 2.5) * distance * distance + 1
        outer = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        values = torch.where(distance < 1, inner, torch.where(distance < 2, outer, 0))
    values = torch.where(at < length, values, 0)
    values = values / values.sum(2, keepdim=True)
    units = 2.0 ** torch.arange(1, MAX_SHIFT + 1, dtype=torch.float64)
    is_short = values.amax((1, 2), keepdim=True) * units + 0.5 < 2**WEIGHT_BITS
    unit = torch.where(is_short, units, 1).amax(2, keepdim=True)
    return ((values * unit).round() / unit).float()


def find_boxes(images: Tensor) -> Tensor:
    """`foreground.foreground_box` of each image, (B, 4), for any size that a graph is given."""
    cells, cell_px = reduce_images(images)
    whole = whole_box(images)
    is_large = whole[2:].amin(0) > (MIN_SIDE_CELLS - 1) * cell_px + cell_px // 2
    return torch.where(is_large, box_of_cells(cells, cell_px, whole), whole)


def whole_box(images: Tensor) -> Tensor:
    """(4,) int64, by operations that keep the size open."""
    sides = [torch.scalar_tensor(side, dtype=torch.int64) for side in images.shape[1:3]]
    return torch.stack([torch.zeros_like(sides[0]), torch.zeros_like(sides[0]), *sides])


def reduce_images(images: Tensor) -> tuple[Tensor, int]:
    """`foreground.reduce_image` of each image, (B, 3, h, w), by arithmetic alone, and at least 16 cells a side."""
    height, width = images.shape[1:3]
    reduction = (torch.sym_max(height, width) + LONG_SIDE_CELLS - 1) // LONG_SIDE_CELLS
    apart = torch.sym_min(reduction - 1, 1) * ((reduction + 1) // 2)  # 0: a cell is a pixel, and counted four times
    cell_px = cast(int, torch.sym_max(2 * apart, 1))
    cells = images.movedim(-1, 1)
    for dim, side in ((2, height), (3, width)):
        num_cells = torch.sym_max((side - 1 - apart) // cell_px + 1, MIN_SIDE_CELLS)
        # A size of its own in the graph: with formulas of H and W instead, torch.export took three times as long.
        num_cells = torch.scalar_tensor(num_cells, dtype=torch.int64).item()
        torch._check(num_cells >= MIN_SIDE_CELLS)
        at = torch.arange(num_cells) * cell_px
        first, second = (cells.index_select(dim, (at + step).clamp(max=side - 1)) for step in (0, apart))
        cells = first.float() + second
    return cells / 4, cell_px
