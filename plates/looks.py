"""A look at an image that passes: its size, how it was stored, and what it shows at a glance."""

from dataclasses import dataclass, field
from functools import partial

import imagehash
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

SIDE, HASH_SIDE, GREY_SIDE = 64, 16, 8
NUM_BITS = HASH_SIDE**2
MIRROR = np.uint8(0b01010101)  # the hash's odd columns, whose frequencies change sign where a picture is mirrored

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

    The hash is imagehash's phash of 256 bits, of a picture that torch has reduced from about 256 pixels a side.
    """
    height, width = image.shape[1:]
    step = max(1, min(height, width) // 256)
    part = image[None, :, ::step, ::step].contiguous(memory_format=torch.channels_last)
    small = interpolate(part, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]
    picture = Image.fromarray(small.permute(1, 2, 0).contiguous().numpy()).convert("L")
    bits = np.packbits(imagehash.phash(picture, HASH_SIDE).hash)
    block = SIDE // GREY_SIDE
    grey = np.asarray(picture, np.float32).reshape(GREY_SIDE, block, GREY_SIDE, block).mean((1, 3))
    return Look(digest, np.array((width, height, is_rotated, bits, grey.round()), LOOK))
