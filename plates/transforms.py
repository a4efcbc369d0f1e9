"""Train and eval preprocessing: views drawn by path, made in batches on the worker's device."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

CROP_AREA = (0.08, 1.0)  # fraction of the image's area, as torchvision's RandomResizedCrop
CROP_ASPECT = (3 / 4, 4 / 3)
FLIP_PROBABILITY = 0.5


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What turns an image into the model's input; stored with the model."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "interpolation": "bilinear", "antialias": True}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        return cls(image_size=values["image_size"], mean=tuple(values["mean"]), std=tuple(values["std"]))


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


def crop(image: Tensor, view: View, size: int) -> Tensor:
    """The view of (3, H, W) uint8 as (3, size, size) uint8, not yet mirrored."""
    return F.resized_crop(
        image, view.top, view.left, view.height, view.width, [size, size], InterpolationMode.BILINEAR, antialias=True
    )  # fmt: skip


def resize(image: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 to (3, size, size) uint8; the aspect ratio is not kept, as published."""
    return F.resize(image, [size, size], InterpolationMode.BILINEAR, antialias=True)


def train_batch(
    images: Sequence[Tensor], views: Sequence[View], preprocessing: Preprocessing, device: torch.device
) -> Tensor:
    """Views of images as the model's input.

    Args:
        images: B tensors (3, H, W) uint8, of any sizes.
        views: one view an image.

    Returns: (B, 3, S, S) float32 on `device`, channels_last.
    """
    size = preprocessing.image_size
    crops = [crop(image, view, size) for image, view in zip(images, views, strict=True)]
    is_flipped = torch.tensor([view.is_flipped for view in views], dtype=torch.bool)
    return normalize(flip(move(stack(crops, size), device), move(is_flipped, device)), preprocessing)


def eval_batch(images: Sequence[Tensor], preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """B tensors (3, H, W) uint8 of any sizes to (B, 3, S, S) float32 on `device`, channels_last."""
    size = preprocessing.image_size
    return normalize(move(stack([resize(image, size) for image in images], size), device), preprocessing)


def stack(pictures: list[Tensor], size: int) -> Tensor:
    """B tensors (3, S, S) uint8 to (B, 3, S, S); B may be 0."""
    return torch.stack(pictures) if pictures else torch.empty((0, 3, size, size), dtype=torch.uint8)


def move(values: Tensor, device: torch.device) -> Tensor:
    """To the device, through pinned memory and without waiting for CUDA."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def flip(batch: Tensor, is_flipped: Tensor) -> Tensor:
    """(B, 3, S, S) with the images mirrored where (B,) bool says so."""
    return torch.where(is_flipped[:, None, None, None], batch.flip(-1), batch)


def normalize(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(B, 3, S, S) uint8 to float32, scaled to 0-1 and normalised by channel, channels_last."""
    batch = F.to_dtype(batch.to(memory_format=torch.channels_last), torch.float32, scale=True)
    return F.normalize(batch, list(preprocessing.mean), list(preprocessing.std))


def to_picture(model_input: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """(3, S, S) model input back to an (S, S, 3) uint8 picture, for people."""
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    pixels = (model_input.float().cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()
