import io

import numpy as np
import pytest
import torch
from conftest import write_picture
from PIL import Image

from plates.config import UserError
from plates.dataset import Sample, check_dataset, image_ids, load_dataset, load_test_split
from plates.images import UnreadableImageError, decode, prefetch


def encode(image: Image.Image, suffix: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def test_every_sixth_image_of_each_class_is_held_out(folder):
    dataset = load_dataset(str(folder), seed=0)
    assert [s.path for s in dataset.val] == [
        "train/cleaned/0.jpg", "train/cleaned/6.jpg", "train/dirty/0.png", "train/dirty/6.png"
    ]  # fmt: skip
    assert len(dataset.train) == 13
    assert dataset.classes == ("cleaned", "dirty")
    assert [s.path for s in dataset.test] == [f"test/{i}.jpg" for i in range(7)]
    assert Sample("train/dirty/7.png", 1) in dataset.train


def test_the_real_photos_split_as_published(photos):
    dataset = load_dataset(str(photos), seed=0)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (32, 8, 744)
    assert [s.label for s in dataset.val] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_folder_val_replaces_the_split(folder):
    write_picture(folder / "val" / "dirty" / "x.JPG", 1)
    dataset = load_dataset(str(folder), seed=0)
    assert dataset.val == (Sample("val/dirty/x.JPG", 1),)
    assert len(dataset.train) == 17


def test_wrapping_folders_are_looked_through_and_litter_is_not(folder, tmp_path):
    write_picture(folder / "train" / "__MACOSX" / "a.jpg", 1)
    write_picture(folder / "train" / "dirty" / ".hidden.jpg", 1)
    (folder / "train" / "dirty" / "notes.txt").write_text("no image")
    wrapped = tmp_path / "outer" / "inner"
    wrapped.parent.mkdir()
    folder.rename(wrapped)
    dataset = load_dataset(str(tmp_path / "outer"), seed=0)
    assert dataset.classes == ("cleaned", "dirty")
    assert len(dataset.train) + len(dataset.val) == 17


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: root.rename(root.with_name("elsewhere")), "no such folder"),
        (lambda root: (root / "train").rename(root / "other"), "holds no train/ folder"),
        (lambda root: (root / "train" / "dirty").rename(root / "dirty"), "1 class folders; at least 2"),
        (lambda root: (root / "train" / "empty").mkdir(), "train/empty holds no images"),
        (lambda root: write_picture(root / "train" / "rare" / "a.jpg", 1), "train/rare holds 1 image"),
        (lambda root: write_picture(root / "val" / "new" / "a.jpg", 1), "val/new is not a class"),
        (lambda root: (root / "val" / "dirty").mkdir(parents=True), "val/ holds no images"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_rule(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load_dataset(str(folder), seed=0)


def test_unreadable_images_are_named_or_skipped(folder):
    (folder / "train" / "dirty" / "1.png").write_text("not an image")
    (folder / "train" / "cleaned" / "2.jpg").write_bytes(b"")
    whole = (folder / "train" / "cleaned" / "0.jpg").read_bytes()
    (folder / "train" / "cleaned" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    dataset = load_dataset(str(folder), seed=0)
    with pytest.raises(UserError, match=r"3 images cannot be read \(train/cleaned/2.jpg: the file is empty"):
        check_dataset(dataset, skip_unreadable=False)
    checked, skipped, digests = check_dataset(dataset, skip_unreadable=True)
    assert sorted((s.path, s.split) for s in skipped) == [
        ("train/cleaned/0.jpg", "val"), ("train/cleaned/2.jpg", "train"), ("train/dirty/1.png", "train")
    ]  # fmt: skip
    assert set(digests) == {s.path for s in (*checked.train, *checked.val)}
    assert len(digests) == 14


def test_a_class_without_readable_images_stops_even_when_skipping(folder):
    for path in (folder / "train" / "dirty").iterdir():
        path.write_text("not an image")
    with pytest.raises(UserError, match="no image of class dirty"):
        check_dataset(load_dataset(str(folder), seed=0), skip_unreadable=True)


def test_a_plain_folder_can_be_predicted(folder):
    assert [s.path for s in load_test_split(str(folder / "test"), 0).test] == [f"{i}.jpg" for i in range(7)]
    assert len(load_test_split(str(folder), 0).test) == 7


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


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "TIFF"])
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


def test_ids_are_stems_unless_they_collide():
    paths = ["test/a/1.jpg", "test/b/1.jpg", "test/b/2.jpg", "test/b/3.jpg", "test/b/3.png"]
    assert image_ids(paths) == ["test/a/1", "test/b/1", "2", "test/b/3.jpg", "test/b/3.png"]


def test_drawings_are_a_function_of_the_seed():
    one, other = load_dataset("synthetic:12", seed=3), load_dataset("synthetic:12", seed=3)
    assert one == other
    path = one.test[0].path
    assert torch.equal(one.source.read(path), other.source.read(path))
    assert not torch.equal(one.source.read(path), load_dataset("synthetic:12", seed=4).source.read(path))
    assert set(one.true_test_labels) == {s.path for s in one.test}
    assert all(s.label is None for s in one.test)


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
