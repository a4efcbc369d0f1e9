"""How far an image is from the training images: the quantile by hand, and pictures that are no plates."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from plates.checkpoint import Bundle, load_bundle, save_bundle
from plates.dataset import load_dataset, merge_labelled
from plates.device import CPU
from plates.folding import fast_trunk
from plates.model import build_trunk, preprocessing_of
from plates.reference import MAX_IMAGES, Reference, spread_evenly
from plates.transforms import eval_view, view_batch
from plates.weights import resolve_weights


def at(*degrees: float) -> Tensor:
    """Directions in the plane, as features of differing lengths."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]) * 5


def chord(degrees: float) -> float:
    return 2 * math.sin(math.radians(degrees) / 2)


def test_the_quantile_is_that_of_the_distances_between_training_images():
    reference = Reference.of(at(0, 10, 30, 60))  # nearest: 10, 10, 20 and 30 degrees
    assert reference.distances.tolist() == pytest.approx([chord(d) for d in (10, 10, 20, 30)], abs=2e-3)
    found = reference.compare(at(0, 335, 80, 150) * torch.tensor([[1], [9], [0.1], [3]]))[:, 0]
    between = (chord(25) - chord(20)) / (chord(30) - chord(20))
    assert found.tolist() == pytest.approx([0, 0.75 + 0.25 * between, 0.75, 1], abs=0.02)
    assert reference.features.dtype == torch.float16


def test_a_near_duplicate_is_within_45_hundredths_of_the_median_distance_between_images():
    reference = Reference.of(at(0, 10, 30, 60, 90))  # nearest: 10, 10, 20, 30 and 30 degrees
    _, shares, indices = reference.compare(at(0, 4, 41, 98, 101)).T
    assert shares.tolist() == pytest.approx([chord(d) / chord(20) for d in (0, 4, 11, 8, 11)], abs=0.02)
    assert indices.tolist() == [0, 0, -1, 4, -1]


def test_many_images_are_drawn_evenly():
    assert spread_evenly(3) == [0, 1, 2]
    chosen = spread_evenly(10 * MAX_IMAGES)
    assert len(set(chosen)) == MAX_IMAGES
    assert (chosen[0], chosen[-1]) == (0, 10 * MAX_IMAGES - 1)
    assert np.ptp(np.diff(chosen)) <= 1


def test_a_bundle_keeps_it_and_one_without_it_loads(tmp_path):
    bundle = Bundle("resnet18", ("a", "b"), preprocessing_of("resnet18", 64), {"x": torch.ones(1)}, {})
    save_bundle(tmp_path / "old", bundle)
    assert load_bundle(tmp_path / "old").reference is None
    reference = Reference.of(torch.rand(9, 20, generator=torch.Generator().manual_seed(0)))
    save_bundle(tmp_path / "new", replace(bundle, reference=reference))
    loaded = load_bundle(tmp_path / "new").reference
    assert loaded is not None
    assert torch.equal(loaded.features, reference.features)
    assert torch.equal(loaded.distances, reference.distances)
    rows = torch.rand(4, 20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.compare(rows), reference.compare(rows))


def draw_noise(draw: np.random.Generator) -> np.ndarray:
    cells = draw.integers(4, 60)
    small = draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC))


def draw_text(draw: np.random.Generator) -> np.ndarray:
    image = Image.new("RGB", (320, 240), tuple(draw.integers(200, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for line in range(14):
        words = ["".join(chr(97 + letter) for letter in draw.integers(0, 26, draw.integers(2, 9))) for _ in range(9)]
        pen.text((10, 8 + 16 * line), " ".join(words), fill=(20, 20, 30))
    return np.asarray(image)


def draw_gradient(draw: np.random.Generator) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 1, 320), np.linspace(0, 1, 240))
    slope = draw.uniform(-1, 1, 2)
    t = slope[0] * x + slope[1] * y
    t = (t - t.min()) / (np.ptp(t) + 1e-9)
    one, other = draw.integers(0, 256, (2, 3))
    return (one + t[..., None] * (other - one)).astype(np.uint8)


def draw_landscape(draw: np.random.Generator) -> np.ndarray:
    """Hills under a sky, with a few trees: shapes of nature, none a plate."""
    image = Image.new("RGB", (320, 240), (140, 180, int(draw.integers(200, 250))))
    pen = ImageDraw.Draw(image)
    for layer in range(4):
        height = 90 + 35 * layer + 15 * np.cumsum(draw.normal(0, 0.25, 33))
        points = [(10 * i, float(h)) for i, h in enumerate(height)]
        green = int(110 - 18 * layer + draw.integers(-10, 10))
        pen.polygon([(0, 240), *points, (320, 240)], fill=(green // 2, green, 40))
    for _ in range(6):
        x, y = float(draw.integers(10, 310)), float(draw.integers(150, 220))
        pen.rectangle((x - 2, y, x + 2, y + 16), fill=(80, 50, 30))
        pen.polygon([(x - 12, y + 4), (x, y - 34), (x + 12, y + 4)], fill=(15, int(draw.integers(50, 90)), 25))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1)))


def draw_bars(draw: np.random.Generator) -> np.ndarray:
    """Upright boxes like a skyline."""
    image = Image.new("RGB", (320, 240), tuple(draw.integers(100, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for left in range(0, 320, 32):
        top = int(draw.integers(40, 200))
        pen.rectangle((left, top, left + 28, 240), fill=tuple(draw.integers(0, 140, 3).tolist()))
        for row in range(top + 8, 230, 16):
            pen.rectangle((left + 6, row, left + 12, row + 7), fill=(230, 220, 120))
    return np.asarray(image)


KINDS = {"noise": draw_noise, "text": draw_text, "gradient": draw_gradient, "landscape": draw_landscape,
         "bars": draw_bars}  # fmt: skip


def test_no_plates_are_beyond_and_other_plates_are_not():
    """100 drawn plates are the reference: of other plates at most 10% are beyond its 95% quantile, of pictures of
    other kinds at least 90%."""
    dataset = merge_labelled(load_dataset("synthetic:100", 0))
    preprocessing = preprocessing_of("efficientnet_lite0", 224)
    trunk, _ = build_trunk("efficientnet_lite0")
    trunk.load_state_dict(resolve_weights("efficientnet_lite0", "imagenet", 0).state)
    fast = fast_trunk(trunk, CPU, torch.float32, 224)

    @torch.inference_mode()
    def see(images: list[Tensor]) -> Tensor:
        views = [eval_view(preprocessing, *image.shape[1:]) for image in images]
        return torch.cat([fast(part) for part in view_batch(images, views, preprocessing).split(20)])

    reference = Reference.of(see([dataset.source.read(sample.path) for sample in dataset.train]))
    plates = see([dataset.source.read(sample.path) for sample in dataset.test[:40]])
    assert (reference.compare(plates)[:, 0] > 0.95).float().mean() <= 0.1
    draw = np.random.default_rng(0)
    others = {
        name: see([torch.from_numpy(picture(draw).copy()).permute(2, 0, 1) for _ in range(8)])
        for name, picture in KINDS.items()
    }
    is_beyond = {name: (reference.compare(rows)[:, 0] > 0.95).float().mean() for name, rows in others.items()}
    assert min(is_beyond.values()) >= 0.9, is_beyond
