"""Train and eval preprocessing: views drawn by path, made in batches on the worker's device."""

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from plates.device import move
from plates.foreground import crop_to_foreground

CROP_AREA = (0.08, 1.0)  # fraction of the image's area, as torchvision's RandomResizedCrop
CROP_ASPECT = (3 / 4, 4 / 3)
FLIP_PROBABILITY = 0.5
EVAL = -1  # the number of the one view that validation and prediction see by default


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What turns an image into the model's input; stored with the model."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"  # or bicubic
    crop_mode: str = "squash"  # in timm's words, of all but random crops; center and border keep the aspect ratio
    crop_pct: float = 1.0  # of the image's sides that is seen, of center its shorter side
    crop: str = "none"  # before all else; foreground cuts off the background

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "antialias": True}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        known: dict[str, Any] = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{**known, "mean": tuple(known["mean"]), "std": tuple(known["std"])})


@dataclass(frozen=True)
class View:
    """A crop box in pixels, which may reach over the image's edges; quarter turns of the crop, and whether it is then
    mirrored."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool
    num_turns: int = 0


def draw_view(seed: int, view_index: int, path: str, height: int, width: int, *, is_turned: bool = False) -> View:
    """The view of an image: a function of (seed, view_index, path) and the image's size in pixels, nothing else.

    The draw is that of torchvision's RandomResizedCrop (ten tries of area and log-uniform aspect, then the
    largest centred crop within the aspect limits), followed by a flip, and by quarter turns where they are wanted.
    """
    key = hashlib.blake2b(f"{seed}/{view_index}/{path}".encode(), digest_size=8).digest()
    draw = random.Random(int.from_bytes(key))
    is_flipped = draw.random() < FLIP_PROBABILITY
    num_turns = random.Random(int.from_bytes(key) + 1).randrange(4) if is_turned else 0
    for _ in range(10):
        area = height * width * draw.uniform(*CROP_AREA)
        aspect = math.exp(draw.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = draw.randint(0, height - crop_height)
            left = draw.randint(0, width - crop_width)
            return View(top, left, crop_height, crop_width, is_flipped, num_turns)
    crop_height = min(height, round(width / CROP_ASPECT[0])) or 1
    crop_width = min(width, round(height * CROP_ASPECT[1])) or 1
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return View(top, left, crop_height, crop_width, is_flipped, num_turns)


def find_view(
    preprocessing: Preprocessing, number: int, seed: int, path: str, height: int, width: int, *, is_turned: bool
) -> View:
    """The view of a number: from 0 one that is drawn; -1 the image as it is; from -2 down to -8 its mirrored one, and
    both turned by two, one and three quarters."""
    if number > EVAL:
        return draw_view(seed, number, path, height, width, is_turned=is_turned)
    turn, is_flipped = divmod(EVAL - number, 2)
    return replace(eval_view(preprocessing, height, width), is_flipped=bool(is_flipped), num_turns=(0, 2, 1, 3)[turn])


def eval_view(preprocessing: Preprocessing, height: int, width: int) -> View:
    """What validation and prediction see: by default the whole image, its aspect ratio not kept, as published; of a
    model of timm the middle of it that timm's evaluation cuts out after resizing; with a border the whole image in a
    square."""
    if preprocessing.crop_mode == "center":
        crop_height = crop_width = max(1, round(min(height, width) * preprocessing.crop_pct))
    elif preprocessing.crop_mode == "border":
        crop_height = crop_width = max(height, width)
    else:
        crop_height, crop_width = (max(1, round(side * preprocessing.crop_pct)) for side in (height, width))
    return View((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, is_flipped=False)


def make_views(image: Tensor, views: Sequence[View], preprocessing: Preprocessing) -> Tensor:
    """Crops of an image at the model's size, not yet mirrored.

    With antialiasing, as torchvision's transforms. On CPUs torch has a kernel for bytes, which rounds in between;
    elsewhere they are computed in float32 and rounded, the same to 1 of 255; more at hard edges where bicubic leaves
    the range of bytes, which the kernel clips in between, as PIL does.

    Args:
        image: (3, H, W) uint8; or float32, for the way of devices without that kernel.
        views: V of them.

    Returns: (V, 3, size, size) uint8 on the image's device.
    """
    pixels = image if image.device.type == "cpu" else image.float()
    size = preprocessing.image_size
    crops = []
    for view in views:
        crop = cut_out(pixels, view, preprocessing)[None]
        crop = interpolate(crop, (size, size), mode=preprocessing.interpolation, antialias=True)
        crops.append(crop.rot90(view.num_turns, (2, 3)) if view.num_turns else crop)
    made = torch.cat(crops)
    return made.round_().clamp_(0, 255).to(torch.uint8) if made.is_floating_point() else made


def cut_out(pixels: Tensor, view: View, preprocessing: Preprocessing) -> Tensor:
    """(3, h, w) of the view's box; what lies over the edges has the mean's colour, as timm's border."""
    height, width = pixels.shape[1:]
    bottom, right = view.top + view.height, view.left + view.width
    crop = pixels[:, max(0, view.top) : bottom, max(0, view.left) : right]
    edges = [max(0, -view.left), max(0, right - width), max(0, -view.top), max(0, bottom - height)]
    if not any(edges):
        return crop
    fills = (round(255 * value) for value in preprocessing.mean)
    return torch.cat([pad(channel[None], edges, value=fill) for channel, fill in zip(crop, fills, strict=True)])


def cut_background(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What of an image (3, H, W) uint8 all views are of."""
    return crop_to_foreground(image) if preprocessing.crop == "foreground" else image


def to_input(pictures: Tensor, is_flipped: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The model's input: mirrored, scaled to 0-1 and normalised by channel.

    Args:
        pictures: (B, 3, S, S) uint8.
        is_flipped: (B,) bool, on the same device.

    Returns: (B, 3, S, S) float32, channels_last.
    """
    batch = torch.where(is_flipped[:, None, None, None], pictures.flip(-1), pictures)
    batch = batch.to(torch.float32, memory_format=torch.channels_last).div_(255)
    mean, std = (move(torch.tensor(values), batch.device)[:, None, None] for values in
                 (preprocessing.mean, preprocessing.std))  # fmt: skip
    return batch.sub_(mean).div_(std)


def view_batch(images: Sequence[Tensor], views: Sequence[View], preprocessing: Preprocessing) -> Tensor:
    """One view of each of B images (3, H, W) uint8, of any sizes, as (B, 3, S, S) model input."""
    crops = [make_views(image, [view], preprocessing) for image, view in zip(images, views, strict=True)]
    is_flipped = torch.tensor([view.is_flipped for view in views])
    return to_input(torch.cat(crops), move(is_flipped, crops[0].device), preprocessing)


def draw_views(
    image: Tensor, numbers: Iterable[int], seed: int, path: str, preprocessing: Preprocessing, *, is_turned: bool
) -> list[np.ndarray]:
    """(S, S, 3) uint8 pictures of an image (3, H, W) uint8, as the model sees it in the views of these numbers."""
    seen = cut_background(image, preprocessing)
    size = seen.shape[1:]
    views = [find_view(preprocessing, number, seed, path, *size, is_turned=is_turned) for number in numbers]
    return [to_picture(one, preprocessing) for one in view_batch([seen] * len(views), views, preprocessing)]


def to_picture(model_input: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """(3, S, S) model input back to an (S, S, 3) uint8 picture, for people."""
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    pixels = (model_input.float().cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()
