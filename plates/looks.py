"""A look at an image that passes: its size, how it was stored, and what it shows at a glance."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

SIDE, NUM_FREQUENCIES, GREY_SIDE = 32, 16, 8
NUM_BITS = NUM_FREQUENCIES**2
ANGLES = np.pi / (2 * SIDE) * np.outer(np.arange(NUM_FREQUENCIES), 2 * np.arange(SIDE) + 1)
COSINES = np.cos(ANGLES).astype(np.float32)  # (16, 32): of 32 samples to their lowest frequencies
MIRROR = np.uint8(0b01010101)  # the hash's odd columns, whose frequencies change sign where a picture is mirrored
NO_FREQUENCY = 1.0  # a flat picture's sums have rounding errors of 0.1

# What is kept of an image, 105 bytes; of one that was not decoded the width is 0.
LOOK = np.dtype([("width", np.int32), ("height", np.int32), ("is_rotated", np.bool_),
                 ("hash", np.uint8, (NUM_BITS // 8,)), ("grey", np.uint8, (GREY_SIDE, GREY_SIDE))])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Look:
    """`digest`: 32 bytes; `kept`: a record of LOOK."""

    digest: bytes
    kept: np.ndarray = field(default_factory=partial(np.zeros, (), LOOK))


def look_at(digest: bytes, image: Tensor, is_rotated: bool = False) -> Look:
    """Args: the image, (3, H, W) uint8 RGB, upright; whether it is stored rotated, as EXIF tells.

    The hash is phash of 256 bits as the library imagehash has it, but for two things. A bit is a frequency's sign,
    not whether it is above their median, so that the hash of the mirrored picture follows from it. And the picture
    is reduced by torch, from about 256 pixels a side: imagehash took longer than decoding a small JPEG.
    """
    height, width = image.shape[1:]
    step = max(1, min(height, width) // 256)
    part = image[None, :, ::step, ::step].contiguous(memory_format=torch.channels_last)
    small = interpolate(part, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0].numpy()
    total = small.sum(0, dtype=np.float32)  # (32, 32), of the colours
    bits = np.packbits(COSINES @ total @ COSINES.T > NO_FREQUENCY)
    block = SIDE // GREY_SIDE
    grey = total.reshape(GREY_SIDE, block, GREY_SIDE, block).mean((1, 3)) / len(small)
    return Look(digest, np.array((width, height, is_rotated, bits, grey.round()), LOOK))
