from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from plates.dataset import load_dataset
from plates.export.check import MismatchError, difference_of
from plates.export.graph import find_boxes, make_pictures
from plates.foreground import crop_to_foreground, foreground_box
from plates.model import preprocessing_of
from plates.transforms import Preprocessing, eval_view, make_views

PREPROCESSING = preprocessing_of("resnet18", image_size=64)
SIZES = [(256, 341), (40, 56), (64, 64), (65, 63), (1, 1), (1, 500), (700, 3), (383, 385), (771, 1000)]
pytestmark = pytest.mark.usefixtures("one_thread")


def draw_noise(height: int, width: int) -> Tensor:
    """(1, 3, H, W) uint8 with blacks and whites, which bicubic overshoots."""
    noise = torch.randint(-100, 356, (1, 3, height, width), generator=torch.Generator().manual_seed(height + width))
    return noise.clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def plates() -> Tensor:
    """(12, 3, 256, 341) uint8: drawings with and without a plain background."""
    dataset = load_dataset("synthetic:12:hard", 3)
    return torch.stack([dataset.source.read(sample.path) for sample in dataset.test])


def compare_with_kernel(images: Tensor, preprocessing: Preprocessing) -> None:
    """torch's kernel for bytes, on crops that are cut out of the image."""
    found = make_pictures(images.movedim(1, -1), preprocessing)
    crops = [crop_to_foreground(image) if preprocessing.crop == "foreground" else image for image in images]
    views = [[eval_view(preprocessing, *crop.shape[1:])] for crop in crops]
    expected = torch.cat([make_views(*pair, preprocessing) for pair in zip(crops, views, strict=True)])
    difference = (found - expected.float()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_those_of_torchs_kernel_for_bytes(size, interpolation):
    preprocessing = replace(PREPROCESSING, interpolation=interpolation)
    for crop_mode, crop_pct in (("squash", 1.0), ("squash", 0.875), ("center", 0.9), ("border", 1.0)):
        compare_with_kernel(draw_noise(*size), replace(preprocessing, crop_mode=crop_mode, crop_pct=crop_pct))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_photo_of_6_million_pixels_is_made_small(interpolation):
    image = draw_noise(3000, 2000)
    compare_with_kernel(image, replace(PREPROCESSING, image_size=224, interpolation=interpolation))


@pytest.mark.parametrize("crop_mode", ["squash", "center", "border"])
def test_pictures_of_a_batch_are_of_each_images_own_box(plates, crop_mode):
    compare_with_kernel(plates, replace(PREPROCESSING, crop="foreground", crop_mode=crop_mode))


@pytest.mark.parametrize("size", [(256, 341), (384, 300), (385, 300), (900, 700), (1200, 1537), (40, 16), (60, 15)])
def test_boxes_of_a_batch_are_those_of_each_image(plates, size):
    """Up to 384 pixels a side a cell is a pixel; with less than 16 cells a side the box is whole."""
    images = interpolate(plates, size, mode="bilinear", antialias=True)
    found = find_boxes(images.movedim(1, -1)).tolist()
    assert found == [foreground_box(image).tolist() for image in images]
    assert ([0, 0, *size] in found) or min(size) > 100
    assert any(box != [0, 0, *size] for box in found) or min(size) < 100


def test_a_strip_of_few_cells_stays_whole(plates):
    strip = interpolate(plates, (1600, 60), mode="bilinear")  # cells of 6 pixels: 10 columns
    assert find_boxes(strip.movedim(1, -1)).tolist() == [[0, 0, 1600, 60]] * len(plates)


@pytest.mark.parametrize("wrong", [0.0011, float("nan")])
def test_a_probability_that_is_off_is_refused(wrong):
    right = torch.tensor([[0.25, 0.75]])
    assert difference_of(right + 0.0009, right) == pytest.approx(0.0009, abs=1e-6)
    with pytest.raises(MismatchError, match=r"more than 0\.001"):
        difference_of(right + torch.tensor([0, wrong]), right)
