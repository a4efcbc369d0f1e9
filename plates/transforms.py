"""Train and eval preprocessing: views drawn by path, made in batches on the worker's device."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from plates.device import move

CROP_AREA = (0.08, 1.0)  # fraction of the image's area, as torchvision's RandomResizedCrop
CROP_ASPECT = (3 / 4, 4 / 3)
FLIP_PROBABILITY = 0.5


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What turns an image into the model's input; stored with the model."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"  # or bicubic
    crop_mode: str = "squash"  # of validation and prediction, in timm's words; center keeps the aspect ratio
    crop_pct: float = 1.0  # of the image's sides that they see, of center its shorter side

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "antialias": True}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        known: dict[str, Any] = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{**known, "mean": tuple(known["mean"]), "std": tuple(known["std"])})


@dataclass(frozen=True)
class View:
    """A crop box in pixels, and whether the crop is mirrored."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool


def draw_view(seed: int, view_index: int, path: str, height: int, width: int) -> View:
    """The view of an image: a function of (seed, view_index, path) and the image's size in pixels, nothing else.

    The draw is that of torchvision's RandomResizedCrop (ten tries of area and log-uniform aspect, then the
    largest centred crop within the aspect limits), followed by a flip.
    """
    key = hashlib.blake2b(f"{seed}/{view_index}/{path}".encode(), digest_size=8).digest()
    draw = random.Random(int.from_bytes(key))
    is_flipped = draw.random() < FLIP_PROBABILITY
    for _ in range(10):
        area = height * width * draw.uniform(*CROP_AREA)
        aspect = math.exp(draw.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = draw.randint(0, height - crop_height)
            left = draw.randint(0, width - crop_width)
            return View(top, left, crop_height, crop_width, is_flipped)
    crop_height = min(height, round(width / CROP_ASPECT[0])) or 1
    crop_width = min(width, round(height * CROP_ASPECT[1])) or 1
    return View((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, is_flipped)


def eval_view(preprocessing: Preprocessing, height: int, width: int) -> View:
    """What validation and prediction see: by default the whole image, its aspect ratio not kept, as published; of a
    model of timm the middle of it that timm's evaluation cuts out after resizing."""
    if preprocessing.crop_mode == "center":
        crop_height = crop_width = max(1, round(min(height, width) * preprocessing.crop_pct))
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
    crops = [
        interpolate(
            pixels[None, :, view.top : view.top + view.height, view.left : view.left + view.width],
            (preprocessing.image_size, preprocessing.image_size),
            mode=preprocessing.interpolation,
            antialias=True,
        )
        for view in views
    ]
    pictures = torch.cat(crops)
    return pictures.round_().clamp_(0, 255).to(torch.uint8) if pictures.is_floating_point() else pictures


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


def to_picture(model_input: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """(3, S, S) model input back to an (S, S, 3) uint8 picture, for people."""
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    pixels = (model_input.float().cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()
