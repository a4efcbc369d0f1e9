"""Damaged images of every format, decoded one after another; run as a process of its own, which a decoder may kill.

`python tests/damaged_images.py NUM_FILES SEED`; a line of JSON a format: files decoded, refused, and growth in MiB.
"""

import io
import json
import random
import resource
import struct
import sys
import zlib
from collections import Counter

import numpy as np
from PIL import Image

from plates.images import UnreadableImageError, decode, pillow_formats

FORMATS = ("JPEG", "PNG", "GIF", "WebP", "AVIF", "TIFF", "BMP", "HEIF")


def healthy_files(suffix: str) -> list[bytes]:
    """Small pictures in the modes and encodings that the format knows."""
    assert "HEIF" in pillow_formats(), "pip install 'plates[test]'"
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    rgb = coarse.resize((96, 72), Image.Resampling.BICUBIC)
    grey16 = Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) << 8) + 77)
    turned = Image.Exif()
    turned[0x0112], turned[0x010F], turned[0x011A] = 6, "maker", 72.5
    frames = [rgb.rotate(angle) for angle in (90, 180)]
    palette = rgb.quantize(16)
    kinds: dict[str, list[tuple[Image.Image, dict]]] = {
        "JPEG": [
            (rgb, {}),
            (rgb, {"exif": turned}),
            (rgb, {"progressive": True, "optimize": True, "restart_marker_rows": 1}),
            (rgb, {"subsampling": 0, "quality": 95}),
            (rgb.convert("L"), {}),
            (rgb.convert("CMYK"), {}),
        ],
        "PNG": [
            (rgb, {"exif": turned}),
            (rgb.convert("L"), {}),
            (rgb.convert("LA"), {}),
            (rgb.convert("RGBA"), {}),
            (rgb.convert("1"), {}),
            (palette, {"bits": 4}),
            (palette, {"transparency": bytes(range(0, 160, 10))}),
            (grey16, {}),
            (rgb, {"save_all": True, "append_images": frames}),
        ],
        "GIF": [(palette, {}), (palette, {"interlace": 0}), (palette, {"save_all": True, "append_images": frames})],
        "WebP": [
            (rgb, {"exif": turned}),
            (rgb.convert("RGBA"), {"lossless": True}),
            (rgb, {"save_all": True, "append_images": frames}),
        ],
        "AVIF": [
            (rgb, {"exif": turned}),
            (rgb.convert("RGBA"), {}),
            (rgb, {"save_all": True, "append_images": frames}),
        ],
        "TIFF": [
            *((rgb, {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
            (rgb, {"exif": turned}),
            (rgb.convert("CMYK"), {}),
            (rgb.convert("CMYK"), {"compression": "tiff_lzw"}),
            (rgb.convert("1"), {"compression": "group4"}),
            (rgb.convert("F"), {}),
            (grey16, {}),
            (palette, {}),
            (rgb.convert("LAB"), {}),
            (rgb, {"save_all": True, "append_images": frames}),
        ],
        "HEIF": [
            (rgb, {"exif": turned}),
            (rgb.convert("RGBA"), {}),
            (rgb, {"save_all": True, "append_images": frames}),
        ],
        "BMP": [(rgb, {}), (rgb.convert("L"), {}), (rgb.convert("1"), {}), (rgb.convert("RGBA"), {}), (palette, {})],
    }
    files = []
    for image, options in kinds[suffix]:
        buffer = io.BytesIO()
        image.save(buffer, suffix, **options)
        files.append(buffer.getvalue())
    return files


def damage(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to three damages: flipped bits, set bytes, a zeroed run, a cut, the head of another file, a lost run."""
    spoiled = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        reach = len(spoiled) if rng.random() < 0.5 else min(len(spoiled), 200)  # headers are short and say the most
        at, kind = rng.randrange(reach), rng.randrange(6)
        if kind == 0:
            for _ in range(rng.choice((1, 1, 4, 20))):
                spoiled[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            size = rng.choice((1, 2, 4))
            spoiled[at : at + size] = rng.choice((b"\xff", b"\x7f", b"\x00", rng.randbytes(1))) * size
        elif kind == 2:
            size = min(rng.choice((4, 64, 512)), len(spoiled) - at)
            spoiled[at : at + size] = bytes(size)
        elif kind == 3:
            del spoiled[max(8, rng.randrange(len(spoiled))) :]
        elif kind == 4:
            spoiled[:at] = other[:at]
        else:
            del spoiled[at : at + rng.randint(1, 40)]
        if not spoiled:
            return b""
    return bytes(spoiled)


def mend_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have their right checksums, so that the damage inside them is read."""
    mended, at = bytearray(data), 8
    while at + 12 <= len(mended):
        end = at + 8 + struct.unpack(">I", mended[at : at + 4])[0]
        if end + 4 > len(mended):
            break
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(mended[at + 4 : end]))
        at = end + 4
    return bytes(mended)


def decode_damaged(suffix: str, num_files: int, seed: int) -> dict[str, int]:
    """Decodes so many damaged files. Raises: whatever `decode` raises that is not UnreadableImageError."""
    healthy = healthy_files(suffix)
    everything = healthy_files("JPEG") + healthy_files("PNG") + healthy_files("TIFF") + healthy
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    counts = Counter[str](decoded=0, refused=0)
    for number in range(num_files):
        rng = random.Random(f"{suffix}/{seed}/{number}")
        data = damage(rng, rng.choice(healthy), rng.choice(everything))
        if suffix == "PNG" and number % 2:
            data = mend_checksums(data)
        print(f"{suffix} {number}", flush=True)  # the last one read where the process dies
        try:
            image = decode(data)
            assert image.ndim == 3, image.shape
            assert image.shape[0] == 3, image.shape
            counts["decoded"] += 1
        except UnreadableImageError:
            counts["refused"] += 1
    return {**counts, "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - before_mib}


if __name__ == "__main__":
    for name in FORMATS:
        print(json.dumps({"format": name, **decode_damaged(name, int(sys.argv[1]), int(sys.argv[2]))}), flush=True)
