import hashlib
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from plates.synthetic import CLASSES, draw_plate

SEED = 7
COUNT = 40


@cache
def draw_pairs() -> tuple[np.ndarray, np.ndarray]:
    """The same plates cleaned and dirty, two uint8 (COUNT, 256, 341, 3)."""
    cleaned, dirty = (
        np.stack([draw_plate(SEED, index, is_dirty) for index in range(COUNT)]) for is_dirty in (False, True)
    )
    return cleaned, dirty


def test_classes_are_in_label_order():
    assert CLASSES == ("cleaned", "dirty")


@pytest.mark.parametrize("is_dirty", [False, True])
def test_picture_is_writable_rgb_bytes(is_dirty: bool):
    picture = draw_plate(0, 0, is_dirty)
    assert (picture.shape, picture.dtype) == ((256, 341, 3), np.uint8)
    assert picture.flags.writeable


def test_picture_depends_on_arguments_only():
    cleaned, dirty = draw_pairs()
    np.random.seed(1)
    for index in (3, 1, 2):
        assert np.array_equal(draw_plate(SEED, index, True), dirty[index])
        assert np.array_equal(draw_plate(SEED, index, False), cleaned[index])


def test_other_process_draws_the_same():
    code = (
        "import hashlib; from plates.synthetic import draw_plate\n"
        f"for i in range(6): print(hashlib.sha256(draw_plate({SEED}, i, i % 2 == 1)).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    pictures = [draw_pairs()[index % 2][index] for index in range(6)]
    assert printed.split() == [hashlib.sha256(picture).hexdigest() for picture in pictures]


def test_index_and_seed_each_give_another_plate():
    cleaned, _ = draw_pairs()
    assert len({picture.tobytes() for picture in cleaned}) == COUNT
    assert not np.array_equal(draw_plate(SEED + 1, 0, False), cleaned[0])
    # (1, 2) and (2, 1) would collide if seed and index were only added up.
    assert not np.array_equal(draw_plate(1, 2, False), draw_plate(2, 1, False))


def test_dirt_is_all_that_differs():
    cleaned, dirty = draw_pairs()
    changed = (cleaned != dirty).any(axis=3)
    share = changed.mean(axis=(1, 2))
    assert share.min() > 0.0005
    assert share.max() < 0.4
    # The plate never reaches the left and right edges, so the table must stay as it was.
    assert not changed[:, :, :8].any()
    assert not changed[:, :, -8:].any()


def test_amount_of_dirt_varies():
    cleaned, dirty = draw_pairs()
    share = (cleaned != dirty).any(axis=3).mean(axis=(1, 2))
    assert np.quantile(share, 0.9) > 4 * np.quantile(share, 0.1)


def test_colour_and_contrast_alone_do_not_tell_the_class():
    cleaned, dirty = (pictures.astype(np.float32) for pictures in draw_pairs())
    for statistic in (np.mean, np.std):
        clean_values, dirty_values = (statistic(pictures, axis=(1, 2)) for pictures in (cleaned, dirty))
        for channel in range(3):
            values = np.concatenate((clean_values[:, channel], dirty_values[:, channel]))
            is_dirty = np.repeat((False, True), COUNT)
            accuracies = [np.mean((values > value) == is_dirty) for value in values]
            assert max(*accuracies, 1 - min(accuracies)) < 0.75
