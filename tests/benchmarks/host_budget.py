"""What a GPU would wait for: the host's own time an image and a view, the device's work replaced by nothing.

python tests/benchmarks/host_budget.py [--repeats 5]

One core decodes a JPEG of a drawn plate and makes 1 or 100 views of it for a frozen trunk: with the views cropped on
the host, as for a CPU worker, and in the device's way, where the host decodes, copies the image once and launches the
device's operations. Those run here on 2 x 2 pixels, so that each costs its launch alone. Medians of interleaved
repeats; the last line is JSON.

What a core keeps busy is told by ResNet18's images/s at 224 px in mixed precision: about 11,000 on an RTX 3090 and
18,000 on an RTX 4090 by timm's published results; of a T4 and an A10G it is the 3090's, scaled by memory bandwidth
(320 and 600 of 936 GB/s): estimates.
"""

import argparse
import io
import json
import statistics
import time
from dataclasses import replace
from itertools import repeat
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from plates.device import CUDA_BATCH_SIZE
from plates.features import Drawing, compute_features
from plates.images import decode
from plates.model import preprocessing_of
from plates.synthetic import draw_plate
from plates.timing import Pace
from plates.transforms import Preprocessing, View, make_views

PHOTOS = {"341 x 256": (341, 256), "3000 x 2000": (3000, 2000)}
GPU_IMAGES_PER_SEC = {"T4 (estimated)": 3_800, "A10G (estimated)": 7_100, "RTX 3090": 11_000, "RTX 4090": 18_000}
SECONDS_PER_MEASUREMENT = 2.0


class Photo:
    """One JPEG, decoded anew each time."""

    def __init__(self, width: int, height: int) -> None:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(draw_plate(0, 0, True))).resize((width, height)).save(buffer, "JPEG", quality=90)
        self.data = buffer.getvalue()

    def read(self, path: str) -> Tensor:
        return decode(self.data)


class NoTrunk:
    """A trunk that takes no time, in a GPU's batches."""

    preprocessing = preprocessing_of("resnet18", 224)
    device = torch.device("cpu")
    batch_size = CUDA_BATCH_SIZE
    pace = Pace()

    def __call__(self, pictures: Tensor, is_flipped: Tensor) -> Tensor:
        return torch.zeros((len(pictures), 512))


def launch_views(image: Tensor, views: list[View], preprocessing: Preprocessing) -> Tensor:
    """The operations of a device's way, on 2 x 2 pixels."""
    small = replace(preprocessing, image_size=2)
    return make_views(torch.zeros((3, 2, 2)), [View(0, 0, 2, 2, view.is_flipped) for view in views], small)


def measure(photo: Photo, num_views: int, is_device_way: bool) -> float:
    """Seconds an image."""
    with patch("plates.features.move", lambda values, device: values.clone() if is_device_way else values), patch(
        "plates.features.make_views", launch_views if is_device_way else make_views
    ):  # fmt: skip
        rows = compute_features(NoTrunk(), photo, repeat(("a.jpg", range(num_views))), Drawing(0))  # pyright: ignore
        next(rows)
        start_s, count = time.perf_counter(), 0
        while time.perf_counter() - start_s < SECONDS_PER_MEASUREMENT or count < CUDA_BATCH_SIZE // num_views:
            next(rows)
            count += 1
        return (time.perf_counter() - start_s) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        for name, shape in PHOTOS.items():
            for num_views in (1, 100):
                for way in ("host", "device"):
                    key = f"{name}, {num_views} views, on the {way}"
                    measured.setdefault(key, []).append(measure(Photo(*shape), num_views, way == "device"))
    figures = {}
    for key, seconds in measured.items():
        image_s = statistics.median(seconds)
        rate = int(key.split(", ")[1].split()[0]) / image_s
        cores = ", ".join(f"{name} {wanted / rate:.1f}" for name, wanted in GPU_IMAGES_PER_SEC.items())
        print(f"{key}: {image_s * 1e3:.2f} ms an image, {1 / image_s:.0f} images/s and {rate:.0f} views/s a core "
              f"({min(seconds) * 1e3:.2f}-{max(seconds) * 1e3:.2f} ms); cores that a GPU takes: {cores}")  # fmt: skip
        figures[key] = {"ms_per_image": image_s * 1e3, "views_per_sec_per_core": rate}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
