from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.data import create_transform
from torchvision.transforms import v2

from plates.model import preprocessing_of
from plates.transforms import Preprocessing, View, draw_view, eval_view, make_views, to_picture, view_batch

PREPROCESSING = preprocessing_of("resnet18", image_size=64)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_views_equal_torchvision_on_the_same_draws():
    images = [picture(80, 120), picture(200, 90, 1), picture(64, 64, 2)]
    views = [draw_view(0, i, "a.jpg", *image.shape[1:]) for i, image in enumerate(images)]
    views[0] = View(3, 5, 40, 60, True)
    batch = view_batch(images, views, PREPROCESSING)
    for model_input, image, view in zip(batch, images, views, strict=True):
        cropped = v2.functional.resized_crop(
            image, view.top, view.left, view.height, view.width, [64, 64], antialias=True
        )
        flipped = v2.functional.horizontal_flip(cropped) if view.is_flipped else cropped
        rest = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std)]
        )
        assert (model_input - rest(flipped)).abs().max() < 1e-5


def test_the_whole_image_equals_torchvisions_resize():
    images = [picture(80, 120), picture(30, 33, 1)]
    reference = v2.Compose(
        [
            v2.Resize([64, 64], antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
        ]
    )
    batch = view_batch(images, [eval_view(PREPROCESSING, *image.shape[1:]) for image in images], PREPROCESSING)
    assert (batch - torch.stack([reference(image) for image in images])).abs().max() < 1e-5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(256, 341), (1000, 700), (40, 30), (2, 500)])
def test_the_way_of_devices_without_a_kernel_for_bytes_gives_the_same_pictures(shape, interpolation):
    """On CUDA views are made in float32; here the same lines run on a float32 tensor of the CPU."""
    image = picture(*shape)
    if interpolation == "bicubic":
        image = image // 2 + 64  # so that nothing is clipped between the two passes over bytes
    preprocessing = replace(PREPROCESSING, interpolation=interpolation)
    views = [eval_view(preprocessing, *shape), *(draw_view(0, index, "a.jpg", *shape) for index in range(20))]
    ours, theirs = (make_views(pixels, views, preprocessing) for pixels in (image, image.float()))
    assert ours.dtype == theirs.dtype == torch.uint8
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.5


@pytest.mark.parametrize(("crop_mode", "interpolation"), [("center", "bicubic"), ("squash", "bilinear")])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
def test_pictures_of_a_model_of_timm_equal_timms_evaluation(crop_mode, interpolation, crop_pct):
    """To the rounding of the crop to whole pixels, before resizing here and after it there."""
    ramp = torch.linspace(0, 255, 480)
    image = torch.stack([ramp[:360, None].expand(360, 480), ramp.expand(360, 480), ramp.flip(0).expand(360, 480)])
    image = image.round().to(torch.uint8)
    preprocessing = replace(PREPROCESSING, crop_mode=crop_mode, crop_pct=crop_pct, interpolation=interpolation)
    shape = {"mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": crop_pct, "crop_mode": crop_mode}
    theirs = create_transform(64, interpolation=interpolation, **shape)
    expected = theirs(v2.functional.to_pil_image(image)) * 255
    ours = make_views(image, [eval_view(preprocessing, 360, 480)], preprocessing)[0]
    assert (ours - expected).abs().max() <= 3  # half a pixel of the picture is 3 of 255 on these ramps


def test_a_view_is_a_function_of_seed_index_and_path():
    assert draw_view(0, 1, "a.jpg", 256, 341) == draw_view(0, 1, "a.jpg", 256, 341)
    views = {draw_view(s, i, p, 256, 341) for s in range(3) for i in range(3) for p in ("a.jpg", "b.jpg")}
    assert len(views) == 18


def test_views_are_distributed_as_torchvisions_random_resized_crop():
    torch.manual_seed(0)
    image = picture(256, 341)
    theirs = [v2.RandomResizedCrop(64).make_params([image]) for _ in range(3000)]
    ours = [draw_view(7, i, "a.jpg", 256, 341) for i in range(3000)]
    for name in ("top", "left", "height", "width"):
        mine = np.array([getattr(view, name) for view in ours])
        reference = np.array([params[name] for params in theirs])
        assert abs(mine.mean() - reference.mean()) < 5 * reference.std() * (2 / 3000) ** 0.5
        assert abs(mine.std() - reference.std()) < 0.1 * reference.std()
    assert abs(np.mean([view.is_flipped for view in ours]) - 0.5) < 0.05


def test_views_lie_inside_images_of_any_shape():
    for height, width in [(1, 1), (1, 500), (500, 1), (32, 2000)]:
        for index in range(50):
            view = draw_view(0, index, "a", height, width)
            assert 0 <= view.top <= height - view.height
            assert 0 <= view.left <= width - view.width
            assert min(view.height, view.width) >= 1


def test_preprocessing_survives_json_and_pictures_survive_normalisation():
    assert Preprocessing.from_dict(PREPROCESSING.to_dict()) == PREPROCESSING
    before_timm = {"image_size": 64, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "bilinear"}
    assert eval_view(Preprocessing.from_dict(before_timm), 10, 20) == View(0, 0, 10, 20, False)
    image = picture(64, 64)
    shown = to_picture(view_batch([image], [eval_view(PREPROCESSING, 64, 64)], PREPROCESSING)[0], PREPROCESSING)
    assert np.array_equal(shown, image.permute(1, 2, 0).numpy())
