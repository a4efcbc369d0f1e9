"""Encoded images to pixels, ahead of the device: torchcodec decodes JPEG and PNG, Pillow all else."""

import functools
import io
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import AvifImagePlugin, Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor
from torchcodec.decoders import decode_image

ItemT = TypeVar("ItemT")
LoadedT = TypeVar("LoadedT")
ORIENTATION = 0x0112  # in EXIF: how to turn what is stored, 1 not at all
EMPTY_FILE, CUT_OFF = "the file is empty", "the file is cut off"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".heic", ".heif"}
# Where Pillow refuses: 179 million, 0.5 GB as RGB, up to 4 GB while an animated WebP is decoded; phones make 108.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


class UnreadableImageError(OSError):
    """The reason why an image cannot be read."""


def decode(data: bytes) -> Tensor:
    """Encoded image to (3, H, W) uint8 RGB, upright, of an animation the first frame. Raises: UnreadableImageError.

    Pillow reads the header and refuses too many pixels. torchcodec decodes JPEG and PNG, 1.4 and 1.2 times as fast as
    Pillow, to the same pixels; it has all frames of an animation in memory at once, so the rest is Pillow's.
    """
    if not data:
        raise UnreadableImageError(EMPTY_FILE)
    try:
        with Image.open(io.BytesIO(data), formats=pillow_formats()) as opened:
            if opened.format not in ("JPEG", "MPO", "PNG"):  # MPO: a JPEG with more pictures behind it
                return to_rgb(turn_upright(opened))
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), output_dtype="auto")
        return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"has more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(why_unknown(data)) from error
    except Exception as error:  # parsers of damaged files raise what they like: struct.error, ZeroDivisionError, ...
        what = CUT_OFF if is_cut_off(data, error) else "not a readable image"
        raise UnreadableImageError(f"{what} ({type(error).__name__})") from error


def is_cut_off(data: bytes, error: Exception) -> bool:
    """Whether an image that cannot be decoded lacks its end, by its bytes or by what Pillow says of it."""
    end = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(data[:2], b"")
    return end not in data[-32:] or "truncated" in str(error).lower()


def is_stored_rotated(data: bytes) -> bool:
    """Whether an image that can be decoded is turned or mirrored by its EXIF orientation."""
    try:
        with Image.open(io.BytesIO(data), formats=pillow_formats()) as opened:
            # Pillow decodes a PNG to look for EXIF behind its pixels, where no decoder looks.
            exif = {} if opened.format == "PNG" and "exif" not in opened.info else opened.getexif()
            return exif.get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # a corrupt EXIF block, which `decode` takes for none
        return False


def turn_upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a corrupt EXIF block; the pixels are well, and torchcodec takes them so, too
        return image


def to_rgb(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as (3, H, W) uint8. Raises: UnreadableImageError where its values have no scale."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 255):  # nor NaN
            raise UnreadableImageError("its floating-point values are neither 0 to 1 nor 0 to 255")
        image = Image.fromarray((values * (255 if values.max() <= 1 else 1)).round().astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@functools.cache
def pillow_formats() -> tuple[str, ...]:
    """The formats that a file may have, whatever its name says: not Pillow's EPS, for one, which runs Ghostscript."""
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata in files that can be read
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # not as many as cores for each of the images that threads decode here
    known = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP")
    try:
        import pillow_heif
    except ImportError:
        return known
    pillow_heif.register_heif_opener(decode_threads=1)
    return (*known, "HEIF")


def why_unknown(data: bytes) -> str:
    """Why an image could not be identified: what to install for HEIC or AVIF."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS and "HEIF" not in pillow_formats():
        return "HEIC needs pillow-heif: pip install pillow-heif"
    if brand in (b"avif", b"avis") and not features.check("avif"):
        return "AVIF needs a Pillow built with it: pip install --upgrade pillow"
    return "not an image"


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
