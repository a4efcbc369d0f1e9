"""Encoded images to pixels, ahead of the device: torchvision's decoder, and Pillow for what that refuses."""

import functools
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

ItemT = TypeVar("ItemT")
LoadedT = TypeVar("LoadedT")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


class UnreadableImageError(OSError):
    """The reason why an image cannot be read."""


def decode(data: bytes) -> Tensor:
    """Encoded image to (3, H, W) uint8 RGB, upright by its EXIF orientation.

    torchvision's decoder reads JPEG, PNG, GIF and WebP; what it refuses (BMP, TIFF, 16-bit) goes to Pillow.
    Raises: UnreadableImageError.
    """
    if not data:
        raise UnreadableImageError("the file is empty")
    try:
        image = decode_image(
            torch.frombuffer(bytearray(data), dtype=torch.uint8),
            ImageReadMode.RGB,
            apply_exif_orientation=True,
        )
    except (RuntimeError, ValueError):
        return decode_with_pillow(data)
    if image.dim() == 4:  # an animated GIF: its first frame
        image = image[0]
    return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)


def decode_with_pillow(data: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
                image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
            array = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"not a readable image ({type(error).__name__})") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def prefetch(
    load: Callable[[ItemT], LoadedT], items: Iterable[ItemT], num_ahead: int, device: torch.device
) -> Iterator[LoadedT]:
    """`map(load, items)` by as many threads as torch uses, at most `num_ahead` items ahead of the device.

    A CPU worker of one thread loads in between: a second thread would take another worker's core.
    """
    num_threads = torch.get_num_threads()
    if device.type == "cpu" and num_threads == 1:
        yield from map(load, items)
        return
    pool = reading_threads(min(num_ahead, num_threads))
    pending: deque[Future[LoadedT]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(load, item))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@functools.cache
def reading_threads(count: int) -> ThreadPoolExecutor:
    """Kept for the process: new threads for each call of a long prediction left up to 18 kB an image behind."""
    return ThreadPoolExecutor(count)
