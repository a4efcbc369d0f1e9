import io
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from plates.duplicates import MAX_DISTANCE, MAX_GREY_DISTANCE, find_pairs, find_sets
from plates.images import decode, is_stored_rotated
from plates.looks import LOOK, MIRROR, look_at
from plates.synthetic import draw_plate

MIRRORED = Image.Transpose.FLIP_LEFT_RIGHT


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def look(data: bytes) -> np.ndarray:
    return look_at(b"", decode(data)).kept


def are_near(one: np.ndarray, other: np.ndarray) -> bool:
    """By counting bits and comparing greys, as they are and mirrored."""
    return any(
        np.unpackbits(one["hash"] ^ bits).sum() <= MAX_DISTANCE
        and abs(one["grey"].astype(int) - grey).max() <= MAX_GREY_DISTANCE
        for bits, grey in ((other["hash"], other["grey"]), (other["hash"] ^ MIRROR, other["grey"][:, ::-1]))
    )


def assert_only_copies_are_near(pictures: list[Image.Image], num_copied: int) -> None:
    looks = [look(encode(image, "PNG")) for image in pictures]
    for image, own in zip(pictures[:num_copied], looks, strict=False):
        assert [how for how, data in copies_of(image).items() if not are_near(own, look(data))] == []
    assert not any(are_near(*pair) for pair in combinations(looks, 2))
    sets, _ = find_sets(np.arange(len(looks)), np.array(looks, LOOK))
    assert len({*sets}) == len(looks)


def copies_of(image: Image.Image) -> dict[str, bytes]:
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return {
        "quality 60": encode(image, quality=60),
        "quality 95": encode(image, quality=95),
        "half": encode(half, quality=90),
        "mirrored": encode(image.transpose(MIRRORED), "PNG"),
        "mirrored, half, quality 75": encode(half.transpose(MIRRORED), quality=75),
    }


def plates(difficulty: str, count: int) -> list[Image.Image]:
    return [Image.fromarray(draw_plate(7, index, index % 2 == 0, difficulty)) for index in range(count)]


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_copies_of_drawn_plates_are_near_and_other_plates_are_not(difficulty):
    drawn = [draw_plate(index % 3, index, index % 2 == 0, difficulty) for index in range(60)]
    assert_only_copies_are_near([Image.fromarray(picture) for picture in drawn], 20)


def test_copies_of_photos_are_near_and_other_photos_are_not(photos):
    paths = sorted((photos / "train").rglob("*.jpg"))
    assert_only_copies_are_near([Image.open(path).convert("RGB") for path in paths], len(paths))


def test_a_mirrored_pictures_hash_follows_from_the_hash():
    """All frequencies of an odd number of half waves from left to right change their sign."""
    image = Image.fromarray(draw_plate(7, 0, True, "hard"))
    plain, mirrored = (look(encode(one, "PNG"))["hash"] for one in (image, image.transpose(MIRRORED)))
    assert np.unpackbits(plain ^ mirrored).sum() > 80
    assert np.unpackbits(plain ^ MIRROR ^ mirrored).sum() <= 2


def test_flat_pictures_of_different_greys_are_not_alike():
    white, grey, same = (look(encode(Image.new("RGB", (90, 60), (level,) * 3))) for level in (255, 90, 92))
    assert are_near(grey, same)
    assert not are_near(white, grey)


def test_a_look_tells_size_and_rotation():
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.effect_noise((60, 40), 40).convert("RGB")
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        plain, rotated = encode(image, kind), encode(image, kind, exif=turned)
        assert (is_stored_rotated(plain), is_stored_rotated(rotated)) == (False, True), kind
        kept = look_at(b"d", decode(rotated), is_rotated=True).kept
        assert (int(kept["width"]), int(kept["height"]), bool(kept["is_rotated"])) == (40, 60, True), kind
    assert not is_stored_rotated(b"\xff\xd8\xff\xe1 broken")


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (7, 3)])
def test_any_shape_has_a_hash(shape):
    assert look_at(b"", torch.zeros(3, *shape, dtype=torch.uint8)).kept["hash"].shape == (32,)


@pytest.mark.parametrize("few", [1500, 1499])
def test_the_index_finds_the_same_pairs_as_comparing_all(few):
    """Random looks, and around some of them others that differ in up to a little more than the limits, some in bits
    that are spread over as many chunks as can be."""
    draw = np.random.default_rng(0)
    looks = np.zeros(1500, LOOK)
    looks["hash"] = draw.integers(0, 256, (1500, 32), np.uint8)
    looks["grey"] = draw.integers(0, 230, (1500, 8, 8), np.uint8)
    for index in range(0, 1500, 3):
        flips = np.zeros(256, np.uint8)
        spread = (np.arange(0.5, MAX_DISTANCE) * 256 / MAX_DISTANCE).astype(int)
        at_random = draw.choice(256, draw.integers(1, MAX_DISTANCE + 4), replace=False)
        flips[at_random if index % 5 else spread] = 1
        grey = looks["grey"][index] + draw.integers(0, MAX_GREY_DISTANCE + (index % 4 == 0) * 2, (8, 8), np.uint8)
        bits = looks["hash"][index] ^ np.packbits(flips)
        looks["hash"][index + 1], looks["grey"][index + 1] = (
            (bits ^ MIRROR, grey[:, ::-1]) if index % 2 else (bits, grey)
        )
    found = set()
    for one, other, distances in find_pairs(looks, few=few):
        assert max(distances, default=0) <= MAX_DISTANCE
        found |= {tuple(sorted(pair)) for pair in zip(one.tolist(), other.tolist(), strict=True)}
    bits = np.unpackbits(looks["hash"], axis=1).astype(np.float32)
    candidates = set()
    for other in (bits, np.unpackbits(looks["hash"] ^ MIRROR, axis=1).astype(np.float32)):
        distances = bits.sum(1)[:, None] + other.sum(1) - 2 * bits @ other.T
        candidates |= {(one, two) for one, two in np.argwhere(distances <= MAX_DISTANCE).tolist() if one < two}
    assert found == {(one, two) for one, two in candidates if are_near(looks[one], looks[two])}
    assert 300 < len(found) < len(candidates) < 500, "some of the copies are just too far"


def test_sets_of_duplicates():
    """Equal files whether or not they were looked at; equal and near hashes only of those that were."""
    looks = np.zeros(8, LOOK)
    looks["width"] = [0, 9, 9, 9, 9, 0, 9, 0]
    looks["hash"] = np.random.default_rng(1).integers(0, 256, (8, 32), np.uint8)
    looks["hash"][3] = looks["hash"][2]
    looks["hash"][4] = looks["hash"][2] ^ MIRROR
    looks["hash"][4, 0] ^= 1
    looks["hash"][7] = looks["hash"][6]
    sets, bits = find_sets(np.array([0, 0, 2, 3, 4, 0, 6, 7]), looks)
    assert sets[0] == sets[1] == sets[5]
    assert sets[2] == sets[3] == sets[4]
    assert len({sets[0], sets[2], sets[6], sets[7]}) == 4
    assert bits.tolist() == [np.inf, np.inf, 0, 0, 1, np.inf, np.inf, np.inf]


def test_many_files_that_show_the_same_are_one_set():
    looks = np.zeros(20_000, LOOK)
    looks["width"] = 9
    sets, bits = find_sets(np.arange(20_000), looks)
    assert not sets.any()
    assert not bits.any()
