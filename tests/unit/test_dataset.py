import hashlib
import os
import pickle
import shutil
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import joblib
import pandas as pd
import pytest
import torch
from conftest import rights_of_nobody, write_picture

from plates.config import DataConfig, UserError
from plates.dataset import check_dataset, in_threads, load_dataset, load_test_split
from plates.predict import image_ids
from plates.rundir import write_csv
from plates.samples import Sample, Samples


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
    assert [*dataset.val] == [Sample("val/dirty/x.JPG", 1)]
    assert len(dataset.train) == 17


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_a_validation_split_has_other_names(name, folder):
    write_picture(folder / name / "dirty" / "x.jpg", 1)
    dataset = load_dataset(str(folder), seed=0)
    assert ([*dataset.val], len(dataset.train)) == ([Sample(f"{name}/dirty/x.jpg", 1)], 17)
    write_picture(folder / "val" / "dirty" / "x.jpg", 1)
    with pytest.raises(UserError, match=f"val and {name} are names of one split"):
        load_dataset(str(folder), seed=0)


def test_a_test_split_in_folders_of_the_classes_has_labels(folder, tmp_path):
    shutil.rmtree(folder / "test")
    for path in ("test/dirty/b.jpg", "test/cleaned/deep/a.jpg"):
        write_picture(folder / path, 1)
    labelled = [Sample("test/cleaned/deep/a.jpg", 0), Sample("test/dirty/b.jpg", 1)]
    dataset = load_dataset(str(folder), seed=0)
    assert [*dataset.test] == labelled
    assert len(dataset.train) + len(dataset.val) == 17
    (folder / "train").rename(tmp_path / "elsewhere")  # to predict with a checkpoint of these classes, or of others
    known = ("cleaned", "dirty")
    assert [*load_test_split(str(folder), 0, known).test] == labelled
    assert [*load_test_split(str(folder / "test"), 0, known).test][1] == Sample("dirty/b.jpg", 1)
    assert load_test_split(str(folder), 0, ("dirty", "rare")).test[0].label is None
    write_picture(folder / "test" / "c.jpg", 1)
    assert {sample.label for sample in load_test_split(str(folder), 0, known).test} == {None}


def test_what_is_left_out_is_counted(folder, monkeypatch):
    assert load_dataset(str(folder), 0).left_out == ""
    for name in ("train/dirty/a.txt", "train/dirty/b.TXT", "test/c.mp4", "train/README", "README.md", "test/.d.jpg"):
        (folder / name).write_text("no image")
    for name in ("test/empty", "train/dirty/empty", "spare", ".git"):
        (folder / name).mkdir()
    for name in ("train/loose.jpg", "loose.jpg"):
        write_picture(folder / name, 1)
    assert load_dataset(str(folder), 0).left_out == (
        "not looked at: 5 files of other kinds (.txt 2, .md 1, without one 1, .mp4 1), 2 empty folders, "
        "1 hidden folder, 1 image in no split, 1 other folder, 1 image in no class folder, 1 hidden file"
    )


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
        (lambda root: root.rename(root.with_name("elsewhere")), "no such folder or file; give .*kaggle:NAME"),
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
    checked, skipped = check_dataset(dataset, skip_unreadable=True)
    assert sorted((s.path, s.split) for s in skipped) == [
        ("train/cleaned/0.jpg", "val"), ("train/cleaned/2.jpg", "train"), ("train/dirty/1.png", "train")
    ]  # fmt: skip
    for samples in (checked.train, checked.val):
        found = [hashlib.sha256((folder / sample.path).read_bytes()).digest() for sample in samples]
        assert samples.table["digest"].to_pylist() == found
    assert len(checked.train) + len(checked.val) == 14


def test_a_class_without_readable_images_stops_even_when_skipping(folder):
    for path in (folder / "train" / "dirty").iterdir():
        path.write_text("not an image")
    with pytest.raises(UserError, match="no image of class dirty"):
        check_dataset(load_dataset(str(folder), seed=0), skip_unreadable=True)


def test_a_plain_folder_can_be_predicted(folder):
    assert [s.path for s in load_test_split(str(folder / "test"), 0).test] == [f"{i}.jpg" for i in range(7)]
    assert len(load_test_split(str(folder), 0).test) == 7


def test_split_names_deep_in_a_plain_folder_are_names_like_others(tmp_path):
    for path in ("a.jpg", "holidays/test/b.jpg", "holidays/c.jpg", "work/train/d.jpg", "work/train/new/e.jpg"):
        write_picture(tmp_path / path, 1)
    found = [sample.path for sample in load_test_split(str(tmp_path), 0).test]
    assert found == ["a.jpg", "holidays/c.jpg", "holidays/test/b.jpg", "work/train/d.jpg", "work/train/new/e.jpg"]
    write_picture(tmp_path / "trip" / "test" / "train" / "f.jpg", 1)
    assert [s.path for s in load_test_split(str(tmp_path / "trip"), 0).test] == ["test/train/f.jpg"]


@pytest.mark.parametrize(
    "beside", ["notes.csv", "__MACOSX/train/x/a.jpg", ".cache/train/x/a.jpg", "lost+found/a.jpg"]
)
def test_what_lies_beside_a_wrapping_folder_is_not_looked_at(folder, beside):
    (folder.parent / "disk" / "wrapper").mkdir(parents=True)
    wrapped = folder.rename(folder.parent / "disk" / "wrapper" / "data")
    write = write_picture if beside.endswith("jpg") else lambda path, _: path.write_text("id,label")
    write(folder.parent / "disk" / beside, 1)
    assert len(load_dataset(str(folder.parent / "disk"), 0).train) == 13
    assert len(load_test_split(str(folder.parent / "disk"), 0).test) == 7
    for name in ("train", "test"):
        (wrapped / name).rename(wrapped / f"other-{name}")
    with pytest.raises(UserError, match="holds no train/ folder"):
        load_dataset(str(folder.parent / "disk"), 0)


def test_links_are_followed_but_not_in_circles(folder):
    listed = load_dataset(str(folder), 0)
    for link, target in {
        "train/dirty/loop": "..",
        "train/everything": "..",
        "train/cleaned/self": ".",
        "test/up": "../..",
        "test/one/other": "../two",
        "test/two/one": "../one",
    }.items():
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).symlink_to(target)
    assert load_dataset(str(folder), 0) == listed
    assert [*load_test_split(str(folder / "test"), 0).test] == [Sample(f"{i}.jpg") for i in range(7)]
    for name, place in {"train/dirty/more": "more", "train/rare": "rare", "test/more": "more"}.items():
        write_picture(folder.parent / place / "a.jpg", 1)
        write_picture(folder.parent / place / "b.jpg", 2)
        (folder / name).symlink_to(folder.parent / place)
    grown = load_dataset(str(folder), 0)
    assert grown.classes == ("cleaned", "dirty", "rare")
    assert len(grown.train) + len(grown.val) == 17 + 4
    assert [s.path for s in grown.test[-2:]] == ["test/more/a.jpg", "test/more/b.jpg"]


def test_a_folder_whose_name_begins_as_the_drawings_is_a_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in ("synthetic_plates", "synthetic2"):
        folder = folder.rename(name)
        assert len(load_dataset(DataConfig(data=name).data, 0).train) == 13
        assert len(load_test_split(name, 0).test) == 7


def test_a_name_that_is_not_utf8_is_listed_as_unreadable(folder):
    Path(os.fsdecode(bytes(folder / "test") + b"/caf\xe9.jpg")).write_bytes((folder / "test" / "0.jpg").read_bytes())
    (folder / "train" / "dirty" / "1.png").rename(os.fsdecode(bytes(folder / "train" / "dirty") + b"/\xff\xfe.png"))
    (folder / "train" / "dirty" / "2.png").rename(folder / "train" / "dirty" / r"a\x41.png")
    dataset = load_dataset(str(folder), 0)
    reason = "its name is not UTF-8; rename it"
    checked, skipped = check_dataset(dataset, skip_unreadable=True)
    assert [(item.path, item.reason) for item in skipped] == [(r"train/dirty/\xff\xfe.png", reason)]
    assert r"train/dirty/a\x41.png" in [sample.path for sample in (*checked.train, *checked.val)]
    outcomes = zip(dataset.test, in_threads(dataset.source.digest, dataset.test), strict=True)
    unread = [(sample.path, str(found)) for sample, found in outcomes if not isinstance(found, bytes)]
    assert unread == [(r"test/caf\xe9.jpg", reason)]
    write_csv(folder / "skipped.csv", pd.DataFrame([asdict(item) for item in skipped]))
    (folder / "train" / "dirty").rename(os.fsdecode(bytes(folder / "train") + b"/dirt\xff"))
    with pytest.raises(UserError, match=r"train/dirt\\xff: a class must have a name in UTF-8"):
        load_dataset(str(folder), 0)


def test_images_are_checked_by_threads_for_the_cpus_of_the_container(monkeypatch):
    """On a host of 64 CPUs, of which the container has 2: each thread may hold 0.5 GB of pixels."""
    threads = set()

    def look(path: str) -> bytes:
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return path.encode()

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    paths = [str(number) for number in range(64)]
    assert list(in_threads(look, Samples.of(paths))) == [path.encode() for path in paths]
    assert 2 <= len(threads) <= 6


def test_a_folder_that_may_not_be_listed_is_named_where_it_matters(folder):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        root = Path(place, "disk", "photos")
        shutil.copytree(folder, root)
        beside = [root.parent / "lost+found", root / "private", root / "train" / ".private"]
        within, whole = root / "test" / "private", Path(place, "whole")
        for one in (*beside, within, whole):
            one.mkdir(mode=0)
        Path(place).chmod(0o755)
        with rights_of_nobody():
            for load in (load_dataset, load_test_split):
                for data, named in ((root, within), (whole, whole), (whole / "below", whole)):
                    with pytest.raises(UserError, match=f"cannot be (listed|reached) .*Permission denied: '{named}"):
                        load(str(data), 0)
        within.rmdir()
        with rights_of_nobody():
            assert len(load_dataset(str(root.parent), 0).train) == 13


def test_ids_are_stems_unless_they_collide():
    paths = ["test/a/1.jpg", "test/b/1.jpg", "test/b/2.jpg", "test/b/3.jpg", "test/b/3.png"]
    assert image_ids(paths) == ["test/a/1", "test/b/1", "2", "test/b/3.jpg", "test/b/3.png"]


def test_drawings_are_a_function_of_the_seed():
    one, other = load_dataset("synthetic:12", seed=3), load_dataset("synthetic:12", seed=3)
    assert one == other
    path = one.test[0].path
    assert torch.equal(one.source.read(path), other.source.read(path))
    assert not torch.equal(one.source.read(path), load_dataset("synthetic:12", seed=4).source.read(path))
    assert set(one.test.labels.tolist()) == {0, 1}  # kept aside for the score: not told by the path


def test_a_listed_image_takes_few_bytes_in_any_process():
    """Here, and on the workers that the data set is sent to, digests included."""
    dataset, _ = check_dataset(load_dataset("synthetic:2000", 0), skip_unreadable=False)
    splits = (dataset.train, dataset.val, dataset.test)
    assert sum(samples.table.nbytes for samples in splits) < 100 * 4000
    assert len(pickle.dumps(dataset)) < 150 * 4000
