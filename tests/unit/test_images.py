import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from plates.images import UnreadableImageError, decode, pillow_formats, prefetch


def encode(image: Image.Image, suffix: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (6, 4), (200, 30, 40))


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (RED, "PNG", (200, 30, 40)),
        (RED, "BMP", (200, 30, 40)),
        (RED, "TIFF", (200, 30, 40)),
        (RED.convert("P"), "PNG", (204, 51, 51)),
        (RED.convert("P"), "GIF", (204, 51, 51)),
        (Image.new("L", (6, 4), 77), "PNG", (77, 77, 77)),
        (Image.new("LA", (6, 4), (77, 10)), "PNG", (77, 77, 77)),
        (Image.new("RGBA", (6, 4), (1, 2, 3, 0)), "PNG", (1, 2, 3)),
        (Image.fromarray(np.full((4, 6), 40_000, np.uint16)), "PNG", (156, 156, 156)),
        (Image.fromarray(np.full((4, 6), 40_000, np.uint16)), "TIFF", (156, 156, 156)),
        (Image.new("1", (6, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("F", (6, 4), 0.5), "TIFF", (128, 128, 128)),
        (Image.new("F", (6, 4), 200.4), "TIFF", (200, 200, 200)),
    ],
)
def test_every_kind_of_image_becomes_8_bit_rgb(image, suffix, expected):
    decoded = decode(encode(image, suffix))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (3, 4, 6)
    assert (decoded[:, 1, 2].int() - torch.tensor(expected)).abs().max() <= 1


def test_cmyk_jpeg_looks_as_pillow_shows_it():
    image = Image.new("CMYK", (16, 16), (20, 200, 180, 30))
    data = encode(image, "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.array(opened.convert("RGB")).astype(int)
    assert np.abs(decode(data).permute(1, 2, 0).numpy() - expected).max() <= 3


@pytest.mark.parametrize("suffix", ["JPEG", "MPO", "PNG", "TIFF", "WebP", "AVIF"])
def test_exif_orientation_is_applied(suffix):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # white left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left half comes to the top
    upright = decode(encode(image, suffix, exif=exif))
    assert upright.shape == (3, 40, 20)
    assert upright[:, :15].min() > 200
    assert upright[:, 25:].max() < 50


@pytest.mark.parametrize("data", [b"", b"a text named .jpg", encode(RED, "JPEG")[:200], encode(RED, "PNG")[:50]])
def test_damaged_files_are_unreadable(data):
    with pytest.raises(UnreadableImageError):
        decode(data)


BAD_EXIF = (
    b"Exif\0\0II*\0",  # ends in its header
    # turned by 90 degrees, and a width of 1.5: to be written again without the turn
    b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\x01\x0b\0\x01\0\0\0\0\0\xc0?\0\0\0\0",
)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize("exif", BAD_EXIF)
def test_a_corrupt_exif_block_costs_no_picture(suffix, exif):
    animation = {"save_all": True, "append_images": [RED.rotate(90)]} if suffix == "WebP" else {}
    image = decode(encode(RED, suffix, exif=exif, **animation))
    assert image.float().mean((1, 2)).tolist() == pytest.approx([200, 30, 40], abs=3)


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 256.0], [float("nan"), 1.0]])
def test_floating_point_values_of_an_unknown_scale_are_refused(values):
    with pytest.raises(UnreadableImageError, match="neither 0 to 1 nor 0 to 255"):
        decode(encode(Image.fromarray(np.array([values], np.float32)), "TIFF"))


def test_what_an_image_is_does_not_follow_from_its_name():
    """An EPS would be drawn by Ghostscript, with what its author wrote."""
    with pytest.raises(UnreadableImageError, match="not an image"):
        decode(encode(RED, "EPS"))


def test_heic_without_its_plugin_says_what_to_install():
    pillow_formats()
    program = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from plates.images import decode\n"
        "try: decode(sys.stdin.buffer.read())\n"
        "except OSError as error: print(type(error).__name__, error)"
    )
    said = run_python(["-c", program], encode(RED, "HEIF")).decode()
    assert said == "UnreadableImageError HEIC needs pillow-heif: pip install pillow-heif\n"


def run_python(arguments: list[str], sent: bytes = b"", timeout_s: float = 120) -> bytes:
    """What a process of its own prints. Raises: CalledProcessError where it dies."""
    return subprocess.run(
        [sys.executable, *arguments], input=sent, stdout=subprocess.PIPE, cwd=ROOT, timeout=timeout_s, check=True
    ).stdout


def test_damaged_files_of_every_format_are_decoded_or_refused():
    """No crash, no hang, no exception of another kind, and no more memory than healthy files take."""
    num_files = 2000
    lines = run_python(["-m", "tests.damaged_images", str(num_files), "0"]).splitlines()
    results = [json.loads(line) for line in lines if line.startswith(b"{")]
    assert [result["format"] for result in results] == ["JPEG", "PNG", "GIF", "WebP", "AVIF", "TIFF", "BMP", "HEIF"]
    for result in results:
        assert result["decoded"] + result["refused"] == num_files, result
        assert min(result["decoded"], result["refused"]) > 0, result
        assert result["grown_mib"] < 500, result


def png_of_zeros(width: int, height: int) -> bytes:
    """A black and white PNG whose pixels are packed a thousand to one."""
    packer = zlib.compressobj()
    rows = bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of_claims(width: int, height: int) -> bytes:
    """A small JPEG that says in its header that it is large."""
    whole = encode(RED, "JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


def test_memory_is_bounded_before_anything_is_decoded(tmp_path):
    """Animations cost one frame (all would be 430 MiB here), and what has too many pixels costs nothing."""
    frames = [Image.new("P", (1000, 1000), number) for number in range(150)]
    files = {
        "GIF": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "WebP": encode(frames[0], "WebP", save_all=True, append_images=frames[1:]),
        "PNG": png_of_zeros(20_000, 20_000),
        "JPEG": jpeg_of_claims(20_000, 20_000),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    program = (
        "import resource, sys, pathlib\n"
        "from plates.images import decode\n"
        "for path in sys.argv[1:]:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    try: said = tuple(decode(pathlib.Path(path).read_bytes()).shape)\n"
        "    except OSError as error: said = error\n"
        "    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, said)"
    )
    lines = run_python(["-c", program, *(str(tmp_path / name) for name in files)]).decode().splitlines()
    grown_mib, said = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert said == (*["(3, 1000, 1000)"] * 2, *["has more than 178,956,970 pixels"] * 2)
    assert max(map(int, grown_mib)) < 60, grown_mib


def test_heic_is_read_by_its_plugin():
    assert "HEIF" in pillow_formats()
    image = decode(encode(RED.resize((64, 48)), "HEIF"))
    assert image.shape == (3, 48, 64)
    assert (image[:, 20, 30].int() - torch.tensor([200, 30, 40])).abs().max() <= 6


@pytest.mark.parametrize(("num_threads", "most_ahead"), [(1, 1), (2, 6)])
def test_prefetch_keeps_order_and_stays_near(num_threads, most_ahead):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        started = []
        items = prefetch(lambda i: started.append(i) or i * i, range(100), 4, torch.device("cpu"))
        assert next(items) == 0
        assert len(started) <= most_ahead
        assert list(items) == [i * i for i in range(1, 100)]
    finally:
        torch.set_num_threads(before)
