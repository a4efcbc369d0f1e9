"""Views by number: symmetries, turns, borders, what is cut off before all; and the keys of features."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

from plates.dataset import Samples
from plates.features import Drawing, FrozenTrunk, compute_features, row_keys, trunk_key
from plates.foreground import foreground_box
from plates.model import build_trunk, preprocessing_of
from plates.sources import Source
from plates.train_loop.end_to_end import ImageCache
from plates.transforms import (
    EVAL,
    View,
    cut_background,
    draw_view,
    eval_view,
    find_view,
    make_views,
    to_input,
    to_picture,
)

pytestmark = pytest.mark.usefixtures("one_thread")
PREPROCESSING = preprocessing_of("efficientnet_lite0", 48)
CPU = torch.device("cpu")
SHAPES = [(80, 80), (60, 90), (101, 64)]
T = Image.Transpose
TURNS = [None, T.ROTATE_180, T.ROTATE_90, T.ROTATE_270]  # by pairs of symmetries


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def ramps(height: int, width: int) -> Tensor:
    down, across = torch.linspace(20, 235, height)[:, None], torch.linspace(20, 235, width)
    return torch.stack([(one + torch.zeros(height, width)) for one in (down, across, across.flip(0))]).round().byte()


def see(image: Tensor, number: int, preprocessing=PREPROCESSING, *, is_turned: bool = False) -> np.ndarray:
    """(S, S, 3) uint8 of one view, as the model sees it."""
    view = find_view(preprocessing, number, 0, "a.jpg", *image.shape[1:], is_turned=is_turned)
    batch = to_input(make_views(image, [view], preprocessing), torch.tensor([view.is_flipped]), preprocessing)
    return to_picture(batch[0], preprocessing)


@pytest.mark.parametrize("crop_mode", ["squash", "border", "center"])
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetries_are_the_eight_of_the_plain_view(shape, crop_mode):
    preprocessing, image = replace(PREPROCESSING, crop_mode=crop_mode), picture(*shape)
    plain = Image.fromarray(see(image, EVAL, preprocessing))
    seen = [see(image, number, preprocessing) for number in range(-1, -9, -1)]
    for turn, of_turn in zip(TURNS, zip(seen[::2], seen[1::2], strict=True), strict=True):
        turned = plain if turn is None else plain.transpose(turn)
        assert np.array_equal(of_turn[0], np.asarray(turned))
        assert np.array_equal(of_turn[1], np.asarray(ImageOps.mirror(turned)))
    assert len({pixels.tobytes() for pixels in seen}) == 8


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_symmetry_is_the_view_of_evaluation(shape):
    for crop_mode in ("squash", "border", "center"):
        preprocessing = replace(PREPROCESSING, crop_mode=crop_mode)
        assert find_view(preprocessing, EVAL, 3, "a", *shape, is_turned=True) == eval_view(preprocessing, *shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_symmetries_follow_from_nothing_but_the_image(shape):
    for number in range(-1, -9, -1):
        one = find_view(PREPROCESSING, number, 0, "a", *shape, is_turned=False)
        assert one == find_view(PREPROCESSING, number, 7, "b", *shape, is_turned=True)


def test_drawn_views_may_be_turned_and_are_else_the_same():
    views = [draw_view(0, index, "a.jpg", 60, 90) for index in range(60)]
    turned = [draw_view(0, index, "a.jpg", 60, 90, is_turned=True) for index in range(60)]
    assert [replace(view, num_turns=0) for view in turned] == views
    counts = np.bincount([view.num_turns for view in turned], minlength=4)
    assert counts.min() >= 5
    assert len(counts) == 4
    assert views[0] == View(1, 40, 50, 46, False), "as it was drawn before there were turns"


def test_a_turned_view_is_the_drawn_one_turned():
    image = picture(60, 90)
    for number in range(6):
        view = draw_view(0, number, "a.jpg", 60, 90, is_turned=True)
        plain = make_views(image, [replace(view, num_turns=0)], PREPROCESSING)[0]
        turned = make_views(image, [view], PREPROCESSING)[0]
        assert torch.equal(turned, plain.rot90(view.num_turns, (1, 2)))
        expected = turned.flip(2) if view.is_flipped else turned
        assert np.array_equal(see(image, number, is_turned=True), expected.permute(1, 2, 0).numpy())


def test_random_crops_do_not_depend_on_resize():
    for number in range(20):
        views = {
            find_view(replace(PREPROCESSING, crop_mode=mode), number, 0, "a", 60, 90, is_turned=False)
            for mode in ("squash", "border", "center")
        }
        assert views == {draw_view(0, number, "a", 60, 90)}


def of_timm(image: Tensor, crop_mode: str, interpolation: str = "bilinear") -> np.ndarray:
    """(S, S, 3) levels of timm's evaluation, the normalisation undone."""
    shape = {"mean": PREPROCESSING.mean, "std": PREPROCESSING.std, "crop_pct": 1.0, "crop_mode": crop_mode}
    theirs = create_transform(48, interpolation=interpolation, **shape)
    return to_picture(theirs(v2.functional.to_pil_image(image)), PREPROCESSING).astype(int)


@pytest.mark.parametrize("shape", [(360, 480), (480, 360), (480, 480), (300, 101)])
def test_a_border_is_timms(shape):
    """To half a pixel, but where the border begins: timm pads what is resized, we resize what is padded."""
    image, preprocessing = ramps(*shape), replace(PREPROCESSING, crop_mode="border")
    ours, expected = see(image, EVAL, preprocessing).astype(int), of_timm(image, "border")
    height_px, width_px = (48 * side / max(shape) for side in shape)
    rows, columns = (np.abs(np.arange(48) - 23.5) for _ in shape)
    is_inside = (rows[:, None] < height_px / 2 - 1) & (columns < width_px / 2 - 1)
    is_border = (rows[:, None] > height_px / 2 + 1) | (columns > width_px / 2 + 1)
    assert np.abs(ours - expected)[is_inside].max() <= 0.5 * 215 / min(height_px, width_px), (
        "a pixel is so many levels"
    )
    assert (expected[is_border] == 128).all(), "half of 255, this backbone's mean"
    assert (ours[is_border] == 128).all()
    assert is_border.any() == (shape[0] != shape[1])
    if not is_border.any():
        assert np.abs(ours - expected).max() <= 1


@pytest.mark.parametrize("shape", [(360, 480), (480, 360), (480, 480)])
def test_a_centre_is_timms(shape):
    image, preprocessing = ramps(*shape), replace(PREPROCESSING, crop_mode="center")
    assert np.abs(see(image, EVAL, preprocessing).astype(int) - of_timm(image, "center")).max() <= 4


def test_the_border_has_the_means_colour_by_channel():
    preprocessing = replace(preprocessing_of("resnet18", 48), crop_mode="border")
    seen = see(picture(24, 48), EVAL, preprocessing)
    assert np.abs(seen[:10] - 255 * np.array(preprocessing.mean)).max() <= 0.5
    assert np.abs(seen[-10:] - 255 * np.array(preprocessing.mean)).max() <= 0.5
    model_input = make_views(picture(24, 48), [eval_view(preprocessing, 24, 48)], preprocessing)
    assert to_input(model_input, torch.tensor([False]), preprocessing)[0, :, :10].abs().max() < 0.01


def test_squash_sees_all_of_an_image_of_any_shape():
    assert eval_view(PREPROCESSING, 60, 90) == View(0, 0, 60, 90, False)
    image = picture(60, 90)
    expected = v2.functional.resize(image, [48, 48], antialias=True)
    assert np.array_equal(see(image, EVAL), expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("crop_mode", ["squash", "border", "center"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_and_floats_give_the_same_views(shape, crop_mode):
    """To 1 of 255: turned ones and those with a border, too."""
    preprocessing, image = replace(PREPROCESSING, crop_mode=crop_mode), picture(*shape)
    views = [find_view(preprocessing, number, 0, "a", *shape, is_turned=True) for number in range(-8, 8)]
    ours, theirs = (make_views(pixels, views, preprocessing) for pixels in (image, image.float()))
    assert ours.dtype == theirs.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= 1


def plate_on_white() -> Tensor:
    image = torch.full((3, 120, 160), 255, dtype=torch.uint8)
    image[:, 30:90, 40:110] = picture(60, 70) // 2
    return image


class Pictures(Source):
    """By path, in memory."""

    def __init__(self, **images: Tensor) -> None:
        self.images = images

    def read_bytes(self, path: str) -> bytes:
        return self.images[path].numpy().tobytes()

    def digest(self, path: str) -> bytes:
        return hashlib.sha256(self.read_bytes(path)).digest()

    def read(self, path: str) -> Tensor:
        return self.images[path]


def test_the_background_is_cut_off_before_all_views():
    image, cropping = plate_on_white(), replace(PREPROCESSING, crop="foreground")
    assert foreground_box(image).tolist() == [29, 39, 62, 72]
    within = image[:, 29:91, 39:111]
    assert torch.equal(cut_background(image, cropping), within)
    assert cut_background(image, PREPROCESSING) is image
    trunk = build_trunk("timm/test_resnet")[0].eval()
    numbers = [-1, -4, 0, 1]

    def compute(of: Tensor, preprocessing) -> Tensor:
        frozen = FrozenTrunk(trunk, preprocessing, CPU, "fp32")
        return next(compute_features(frozen, Pictures(a=of), [("a", numbers)], Drawing(0)))

    cropped, plain = compute(image, cropping), compute(image, PREPROCESSING)
    assert torch.equal(cropped, compute(within, PREPROCESSING))
    assert not torch.equal(cropped, plain)
    for preprocessing, expected in ((cropping, within), (PREPROCESSING, image)):
        cache = ImageCache(Pictures(a=image), preprocessing, CPU)
        assert torch.equal(cache.read("a"), expected)
        assert torch.equal(cache.read("a"), expected), "kept"


DRAWING = Drawing(0)


def samples(paths=("a.jpg", "b.jpg"), contents=(1, 2)) -> Samples:
    return Samples.of(paths).with_digests([bytes([content]) * 32 for content in contents])


def keys(numbers, drawing=DRAWING, **changes) -> list[bytes]:
    return row_keys(samples(**changes), numbers, drawing).to_pylist()


def test_a_symmetrys_key_follows_from_the_bytes_alone():
    numbers = range(-1, -9, -1)
    known = keys(numbers)
    assert len(set(known)) == 16
    assert keys(numbers, Drawing(5, is_turned=True), paths=("x/c.png", "d")) == known
    assert not set(keys(numbers, contents=(3, 4))) & set(known)
    assert keys(numbers, contents=(2, 1)) == known[8:] + known[:8]


def test_a_drawn_views_key_follows_from_bytes_path_seed_number_and_turning():
    known = keys(range(3))
    assert len(set(known)) == 6
    for changes in ({"drawing": Drawing(1)}, {"drawing": Drawing(0, is_turned=True)}, {"paths": ("c.jpg", "d.jpg")},
                    {"contents": (3, 4)}, {"numbers": range(3, 6)}):  # fmt: skip
        assert not set(keys(**{"numbers": range(3), **changes})) & set(known), changes
    assert keys(range(3)) == known
    assert not set(keys([1, 2], Drawing(1))) & set(keys([1, 2], Drawing(11)))


def test_the_plain_view_has_one_key_whichever_others_are_asked_for():
    alone = keys([EVAL])
    assert keys([-1, -2, 0])[::3] == alone
    assert keys([EVAL], Drawing(9, is_turned=True)) == alone
    assert keys(range(-1, -9, -1))[::8] == alone


@pytest.mark.parametrize(
    "change",
    [{"readout": "last/max"}, {"readout": "last/max+last/avg"}, {"crop": "foreground"}, {"crop_mode": "border"},
     {"crop_pct": 0.9}, {"image_size": 64}, {"precision": "bf16"}, {"device": "cuda"}, {"backbone": "resnet34"}],
    ids=str,
)  # fmt: skip
def test_a_trunks_key_follows_from_all_that_its_features_do(change):
    trunk = torch.nn.Conv2d(3, 4, 3)

    def key(backbone="resnet18", readout="last/avg", precision="fp32", device="cpu", **changes) -> str:
        return trunk_key(trunk, backbone, readout, replace(PREPROCESSING, **changes), precision, device)

    assert key() == key()
    assert key(**change) != key()
