"""What of a picture decided: class activation maps, exact where a linear head reads what is pooled from maps."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from plates.features import Drawing
from plates.foreground import foreground_box
from plates.model import Classifier
from plates.readouts import find_map, pool, run_stages
from plates.transforms import Preprocessing, View, find_view, view_batch

TOLERANCE = 1e-3  # of the largest feature, between the mean of a map and what the trunk itself pools from it


@torch.inference_mode()
def explain_image(
    model: Classifier,
    image: Tensor,
    path: str,
    label: int,
    numbers: list[int],
    drawing: Drawing,
    preprocessing: Preprocessing,
) -> Tensor:
    """Where an image speaks for a class, and where against it: (H, W) float32, the mean over its views.

    Each view's map lies where its pixels come from; around what the views see the image says nothing, and is 0.

    Args:
        image: (3, H, W) uint8.
        label: the class's index.
        numbers: of the views that the prediction averages.
    """
    whole = [0, 0, *image.shape[1:]]
    top, left, height, width = foreground_box(image).tolist() if preprocessing.crop == "foreground" else whole
    seen = image[:, top : top + height, left : left + width]
    views = [
        find_view(preprocessing, number, drawing.seed, path, height, width, is_turned=drawing.is_turned)
        for number in numbers
    ]
    maps = activation_maps(model, view_batch([seen] * len(views), views, preprocessing), label)
    placed = [place_back(one, view, height, width) for one, view in zip(maps, views, strict=True)]
    explained = torch.zeros(image.shape[1:])
    explained[top : top + height, left : left + width] = torch.stack(placed).mean(0)
    return explained


@torch.inference_mode()
def activation_maps(model: Classifier, batch: Tensor, label: int) -> Tensor:
    """What each place of a picture adds to how far a class's logit is above the mean of the others', so that what is
    common to all classes cancels: (B, h, w) float32, the grid of the readout's finest map.

    With the biases the sum over places is that difference: a logit is linear in the features, and a feature is its
    channel's mean over all places, or its value at one (Zhou et al., Learning Deep Features for Discriminative
    Localization, 2016). Of several parts the maps are added, coarse ones made finer.

    Args:
        batch: (B, 3, S, S) model input.
        label: the class's index.
    """
    weight = model.head.weight
    direction = weight[label] - (weight.sum(0) - weight[label]) / (len(weight) - 1)  # (F,)
    parts = read_maps(model, batch)
    directions = direction.split([pooled.shape[1] for _, _, pooled in parts])
    grid = max((found.shape[-2:] for _, found, _ in parts), key=lambda shape: shape[0] * shape[1])
    total = torch.zeros(len(batch), *grid)
    for (name, found, pooled), along in zip(parts, directions, strict=True):
        flat = found.flatten(2)  # (B, F, h * w)
        if name.endswith("/max"):
            added = torch.zeros(flat.shape[0], flat.shape[2]).scatter_add_(1, flat.argmax(2), pooled * along)
        else:
            added = along @ flat / flat.shape[2]
        total += spread(added.unflatten(1, found.shape[-2:]), grid)
    return total


def read_maps(model: Classifier, batch: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Of each part of the readout its name, the map (B, F, h, w) and what is pooled from it (B, F), float32."""
    final, own, stages = run_stages(model.trunk, batch)
    parts = [(name, *name.split("/")) for name in model.readout.split("+")]
    return [
        (name, find_map(final, stages, part).float(), pool(final, own, stages, part, pooling))
        for name, part, pooling in parts
    ]


@torch.inference_mode()
def why_no_map(model: Classifier, image_size: int) -> str | None:
    """Why no maps add up to the readout: a class token, say, or layers after the pooling; None where they do."""
    noise = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        parts = read_maps(model, noise)
    except Exception as error:  # timm's models without maps, as PiT and CrossViT, fail in whatever comes first
        return f"this backbone does not tell the map that it pools ({type(error).__name__})"
    for name, found, pooled in parts:
        mean = found.mean((2, 3))
        is_mean = mean.shape == pooled.shape and (mean - pooled).abs().max() <= TOLERANCE * pooled.abs().max()
        if not name.endswith("/max") and not is_mean:
            return f"{name} of this backbone is not the mean or the maximum of a map, so that no map adds up to it"
    return None


def spread(cells: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Cells (B, h, w) on another grid, with the same sum where it is a multiple of theirs."""
    share = cells[0].numel() / (grid[0] * grid[1])
    return interpolate(cells[None], grid, mode="bilinear")[0] * share


def place_back(cells: Tensor, view: View, height: int, width: int) -> Tensor:
    """A view's map (h, w) on the image (height, width) that the view was cut from."""
    upright = (cells.flip(-1) if view.is_flipped else cells).rot90(-view.num_turns)
    crop = spread(upright[None], (view.height, view.width))[0]
    top, left = max(0, view.top), max(0, view.left)  # a border lies outside
    bottom, right = min(height, view.top + view.height), min(width, view.left + view.width)
    placed = torch.zeros(height, width)
    placed[top:bottom, left:right] = crop[top - view.top : bottom - view.top, left - view.left : right - view.left]
    return placed
