"""A folder of sound images with planted faults: every fault is found, and no sound file is named."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from plates.config import UserError
from plates.data_issues import COLUMNS, doubt_labels, drop_duplicates, find_issues, tell_imbalance
from plates.dataset import Dataset, check_dataset, load_dataset, look_over, merge_labelled

MIRRORED, SIZE = Image.Transpose.FLIP_LEFT_RIGHT, (160, 120)


def paint(seed: int, size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    """Blurred blocks, slanted, in each picture others."""
    blocks = np.random.default_rng(seed).integers(0, 256, (13, 17, 3), np.uint8)
    slanted = Image.fromarray(blocks).resize((510, 390), Image.Resampling.BICUBIC).rotate(15 + seed % 60)
    return slanted.crop((100, 70, 410, 320)).convert(mode).resize(size)


def save(root: Path, path: str, image: Image.Image, **options) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    image.save(root / path, **options)


def issues_of(dataset: Dataset) -> pd.DataFrame:
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return find_issues(dataset, *look_over(splits, dataset.source.check)).table


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """45 images: 20 to train on and 5 of validation a class or two, 5 to predict."""
    for index in range(40):
        save(tmp_path, f"train/{('cleaned', 'dirty')[index % 2]}/{index:02d}.jpg", paint(index), quality=90)
    for index in range(40, 50):
        save(tmp_path, f"val/{('cleaned', 'dirty')[index % 2]}/{index}.png", paint(index))
    for index in range(50, 55):
        save(tmp_path, f"test/{index}.png", paint(index))
    return tmp_path


def plant(root: Path) -> dict[str, set[str]]:
    """Faults of 14 kinds; by path the issues that are to be found."""
    train, expected = root / "train", defaultdict[str, set[str]](set)

    def put(path: str, image: Image.Image, *issues: str, **options) -> None:
        save(root, path, image, **options)
        expected[path] |= {*issues}

    for index, suffix in enumerate(("jpg", "png", "webp")):
        (train / "dirty" / f"empty{index}.{suffix}").touch()
        expected[f"train/dirty/empty{index}.{suffix}"] = {"empty"}
        put(f"val/dirty/text{index}.{suffix}", paint(100 + index), "unreadable")
        (root / f"val/dirty/text{index}.{suffix}").write_text("no image" * 9)
    for index, suffix in enumerate(("jpg", "jpg", "png", "png")):
        put(f"train/cleaned/cut{index}.{suffix}", paint(110 + index), "truncated")
        path = root / f"train/cleaned/cut{index}.{suffix}"
        path.write_bytes(path.read_bytes()[: -500 * (index + 1)])
    turned = Image.Exif()
    turned[0x0112] = 8
    for index, suffix in enumerate(("jpg", "png", "tif")):
        put(f"test/turned{index}.{suffix}", paint(120 + index), "exif_rotated", exif=turned)
    for index, size in enumerate([(31, 40), (300, 8), (16, 16)]):
        put(f"train/cleaned/tiny{index}.png", paint(130 + index, size), "tiny")
    put("train/dirty/huge.png", paint(140, (8000, 6400), "1"), "huge")
    for index, size in enumerate([(900, 800), (34, 33), (700, 120), (90, 500)]):
        put(f"val/cleaned/odd{index}.png", paint(150 + index, size), "extreme_size")
    for one, other, image in (
        ("train/cleaned/same0.jpg", "train/cleaned/same1.jpg", 160),
        ("train/cleaned/leak0.jpg", "test/leak1.jpg", 161),
        ("train/dirty/held0.jpg", "val/dirty/held1.jpg", 162),
        ("train/cleaned/both0.jpg", "train/dirty/both1.jpg", 163),
    ):
        put(one, paint(image), "exact_duplicate")
        put(other, paint(image), "exact_duplicate")
    for one, other, image, copy, options in (
        ("train/cleaned/near0.jpg", "test/near1.jpg", 170, paint(170), {"quality": 60}),
        ("train/dirty/half0.png", "val/dirty/half1.jpg", 171, paint(171).resize((80, 60)), {"quality": 90}),
        ("train/dirty/flip0.png", "train/dirty/flip1.png", 172, paint(172).transpose(MIRRORED), {}),
        ("train/cleaned/other0.png", "train/dirty/other1.webp", 173, paint(173), {"quality": 80}),
    ):
        put(one, paint(image), "near_duplicate")
        put(other, copy, "near_duplicate", **options)
    for index in range(3):
        put(f"train/Dirty/{index}.png", paint(180 + index))
    return {path: issues for path, issues in expected.items() if issues}


def test_a_sound_folder_has_no_issues(sound):
    dataset = load_dataset(str(sound), 0)
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    found = find_issues(dataset, *look_over(splits, dataset.source.check))
    assert found.table.empty
    assert found.lines == ["images: train 40 (cleaned 20, dirty 20); val 10 (cleaned 5, dirty 5); test 5"]


def test_every_planted_fault_is_found_and_no_sound_file_is_named(sound):
    expected = plant(sound)
    assert sum(map(len, expected.values())) == 37
    table = issues_of(load_dataset(str(sound), 0))
    assert [*table] == COLUMNS
    of_images = table[table["path"].notna()]
    assert not of_images.duplicated(["path", "issue"]).any()
    assert of_images.groupby("path")["issue"].agg(set).to_dict() == expected
    assert (of_images["split"] == of_images["path"].str.split("/").str[0]).all()
    of_classes = table[table["path"].isna()][["issue", "split", "given_label"]]
    assert sorted(of_classes.itertuples(index=False, name=None)) == [
        ("class_name", "train", "Dirty"), ("class_name", "train", "dirty"), ("missing_class", "val", "Dirty")
    ]  # fmt: skip


def test_duplicates_name_their_others_in_cleanlabs_columns(sound):
    plant(sound)
    table = issues_of(load_dataset(str(sound), 0)).set_index(["path", "issue"])
    both = table.loc[("train/cleaned/both0.jpg", "exact_duplicate")]
    assert both["near_duplicate_sets"] == "train/dirty/both1.jpg"
    assert (both["given_label"], both["near_duplicate_score"]) == ("cleaned", 0)
    assert both["is_near_duplicate_issue"]
    near = table.loc[("test/near1.jpg", "near_duplicate")]
    assert near["near_duplicate_sets"] == "train/cleaned/near0.jpg"
    assert 0 < near["near_duplicate_score"] < 0.1
    duplicates = table[table.index.get_level_values("issue").str.endswith("duplicate")]
    assert duplicates["given_label"].iloc[:2].tolist() == ["cleaned", "dirty"], "contradictions come first"
    assert duplicates[["is_label_issue", "label_score", "predicted_label"]].isna().all(axis=None)


def test_a_copy_of_a_file_beside_a_near_one_is_both(sound):
    save(sound, "train/dirty/a.png", paint(1000))
    (sound / "test/b.png").write_bytes((sound / "train/dirty/a.png").read_bytes())
    save(sound, "val/dirty/c.jpg", paint(1000), quality=70)
    table = issues_of(load_dataset(str(sound), 0))
    assert sorted(table[["path", "issue", "near_duplicate_sets"]].itertuples(index=False, name=None)) == [
        ("test/b.png", "exact_duplicate", "train/dirty/a.png"),
        ("test/b.png", "near_duplicate", "val/dirty/c.jpg"),
        ("train/dirty/a.png", "exact_duplicate", "test/b.png"),
        ("train/dirty/a.png", "near_duplicate", "val/dirty/c.jpg"),
        ("val/dirty/c.jpg", "near_duplicate", "train/dirty/a.png; test/b.png"),
    ]


def test_what_was_not_decoded_is_counted_and_has_exact_duplicates_alone(sound):
    plant(sound)
    dataset, seen = load_dataset(str(sound), 0), {}
    _, skipped = check_dataset(dataset, skip_unreadable=True, seen=seen)
    at_start = find_issues(dataset, seen, skipped)
    assert not any(line.startswith("not decoded") for line in at_start.lines), "the test split is yet to come"
    hashed = dataset.test.with_digests([dataset.source.digest(sample.path) for sample in dataset.test])
    seen["test"] = type(seen["val"])(hashed, np.zeros(len(hashed), seen["val"].looks.dtype))
    found = find_issues(dataset, seen, skipped)
    of_test = found.table[found.table["split"] == "test"]
    assert [*zip(of_test["path"], of_test["issue"], strict=True)] == [("test/leak1.jpg", "exact_duplicate")]
    assert [line for line in found.lines if line.startswith(f"not decoded: {len(hashed)} images")]


def test_one_of_each_set_stays_in_training_and_none_that_val_or_test_has(sound):
    plant(sound)
    listed, seen = load_dataset(str(sound), 0), {}
    dataset, _ = check_dataset(listed, skip_unreadable=True, seen=seen)
    seen |= look_over({"test": dataset.test}, dataset.source.check)[0]
    smaller, rows = drop_duplicates(dataset, seen)
    expected = {
        "train/cleaned/same1.jpg": "train/cleaned/same0.jpg",
        "train/cleaned/leak0.jpg": "test/leak1.jpg",
        "train/dirty/held0.jpg": "val/dirty/held1.jpg",
        "train/dirty/both1.jpg": "train/cleaned/both0.jpg",
        "train/cleaned/near0.jpg": "test/near1.jpg",
        "train/dirty/half0.png": "val/dirty/half1.jpg",
        "train/dirty/flip1.png": "train/dirty/flip0.png",
        "train/dirty/other1.webp": "train/cleaned/other0.png",
    }
    assert dict(zip(rows["path"], rows["near_duplicate_sets"], strict=True)) == expected
    assert {s.path for s in dataset.train} - {s.path for s in smaller.train} == {*expected}
    assert (smaller.val, smaller.test) == (dataset.val, dataset.test)
    merged, of_merged = drop_duplicates(merge_labelled(dataset), seen)
    assert merged.val is merged.train, "a sweep trains on all labelled images"
    for one, other in [item for item in expected.items() if item[1].startswith("val/")]:
        assert expected.pop(one) == other
        expected[other] = one
    assert dict(zip(of_merged["path"], of_merged["near_duplicate_sets"], strict=True)) == expected


def test_a_class_of_duplicates_alone_is_not_dropped_whole(sound):
    for path in (sound / "train" / "dirty").iterdir():
        (sound / "test" / path.name).write_bytes(path.read_bytes())
    seen = {}
    dataset, _ = check_dataset(load_dataset(str(sound), 0), skip_unreadable=False, seen=seen)
    seen |= look_over({"test": dataset.test}, dataset.source.check)[0]
    with pytest.raises(UserError, match="--drop-duplicates: no image of class dirty is left"):
        drop_duplicates(dataset, seen)


def test_labels_in_doubt_by_hand():
    """Means over the label's images: a 0.6, b 0.7, c 0.49. a3 and b3 are more of another class, but reach no mean."""
    table = pd.DataFrame(
        [
            ("a1", "a", 0.9, 0.05, 0.05), ("a2", "a", 0.6, 0.3, 0.1), ("a3", "a", 0.3, 0.65, 0.05),
            ("b1", "b", 0.02, 0.95, 0.03), ("b2", "b", 0.15, 0.75, 0.1), ("b3", "b", 0.55, 0.4, 0.05),
            ("c1", "c", 0.1, 0.1, 0.8), ("c2", "c", 0.1, 0.72, 0.18),
        ],
        columns=["path", "label", "p_a", "p_b", "p_c"],
    )  # fmt: skip
    rows = doubt_labels(table, pd.DataFrame({"path": table["path"], "split": "train"}))
    assert rows is not None
    assert rows[["path", "label_score", "given_label", "predicted_label"]].to_numpy().tolist() == [
        ["c2", 0.18, "c", "b"]
    ]
    worse = table.assign(p_a=[0.9, 0.6, 0.3, 0.02, 0.15, 0.65, 0.1, 0.1])
    rows = doubt_labels(worse, pd.DataFrame({"path": table["path"], "split": "train"}))
    assert rows is not None
    assert rows["path"].tolist() == ["c2", "b3"], "worst first"


def test_uneven_classes_are_told_from_a_third_on():
    assert tell_imbalance({"train": {"a": 30, "b": 8}, "val": {"a": 6, "b": 4}}) == []
    (line,) = tell_imbalance({"train": {"a": 30, "b": 8}, "val": {"a": 7, "b": 4}})
    assert line.startswith("classes are uneven: b 12, a 37; --class-weights auto")
