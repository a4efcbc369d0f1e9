"""Tables of path, label and split."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import write_picture

from plates.config import UserError
from plates.dataset import check_dataset, load_dataset, load_test_split
from plates.samples import Sample


def write_table(file: Path, rows: list[tuple[str, ...]], columns: str = "path,label,split") -> str:
    table = pd.DataFrame(rows, columns=columns.split(","))
    table.to_csv(file, index=False) if file.suffix == ".csv" else table.to_parquet(file, index=False)
    return str(file)


def rows_of(folder: Path) -> list[tuple[str, ...]]:
    files = [file.relative_to(folder) for file in folder.rglob("*.*")]
    return [(str(file), file.parts[1] if file.parts[0] == "train" else "", file.parts[0]) for file in files]


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_table_of_a_folder_is_the_folder(name, folder):
    one, other = load_dataset(str(folder), 0), load_dataset(write_table(folder / name, rows_of(folder)[::-1]), 0)
    assert (one.classes, one.train, one.val, one.test) == (other.classes, other.train, other.val, other.test)
    assert other.source.read_bytes("test/3.jpg") == (folder / "test" / "3.jpg").read_bytes()


def test_splits_are_as_the_table_says(tmp_path):
    paths = [str(tmp_path / "deep" / "a.jpg"), *(f"{n}.jpg" for n in range(6))]
    splits = ["validation", "train", "", "val", "valid", "test", "test"]
    labels = ["dirty", "dirty", "cleaned", "cleaned", "cleaned", "dirty", "cleaned"]
    data = write_table(tmp_path / "table.csv", list(zip(paths, labels, splits, strict=True)))
    dataset = load_dataset(data, 0)
    assert [*dataset.train] == [Sample("0.jpg", 1), Sample("1.jpg", 0)]
    assert [*dataset.val] == [Sample(paths[0], 1), Sample("2.jpg", 0), Sample("3.jpg", 0)]
    assert [*dataset.test] == [Sample("4.jpg", 1), Sample("5.jpg", 0)]
    write_picture(Path(paths[0]), 1)
    assert dataset.source.read_bytes(paths[0]) == Path(paths[0]).read_bytes()
    with pytest.raises(UserError, match=r"4 images cannot be read \(0.jpg: No such file"):
        check_dataset(dataset, skip_unreadable=False)


def test_rows_without_a_split_are_to_train_on(tmp_path):
    rows = [(f"{name}{n}.jpg", name) for name in ("b", "a") for n in range(7)]
    dataset = load_dataset(write_table(tmp_path / "table.csv", rows, "path,label"), 0)
    assert [sample.path for sample in dataset.val] == ["a0.jpg", "a6.jpg", "b0.jpg", "b6.jpg"]
    assert (dataset.classes, len(dataset.train), len(dataset.test)) == (("a", "b"), 10, 0)


def test_rows_to_predict_have_labels_of_the_classes_that_are_known(tmp_path):
    data = write_table(tmp_path / "table.csv", [("1.jpg", "b", "test"), ("2.jpg", "a", "test")])
    assert [*load_test_split(data, 0).test] == [Sample("1.jpg"), Sample("2.jpg")]
    dataset = load_test_split(data, 0, ("a", "b"))
    assert (dataset.classes, [*dataset.test]) == ((), [Sample("1.jpg", 1), Sample("2.jpg", 0)])
    with pytest.raises(UserError, match=r"1.jpg of test: b is not a class of train \(a, c\)"):
        load_test_split(data, 0, ("a", "c"))


GOOD = [("1.jpg", "a", "train"), ("2.jpg", "b", "train"), ("3.jpg", "a", "val")]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (GOOD, "file,label,split", "has no column path; a table has path, label and, if wanted, split"),
        (GOOD, "path,class,split", "has no column label"),
        ([*GOOD, ("2.jpg", "b", "test")], "path,label,split", "2.jpg is listed more than once"),
        ([*GOOD, ("", "b", "test"), ("", "a", "test")], "path,label,split", "an empty path is listed more than once"),
        ([*GOOD, ("4.jpg", "", "train")], "path,label,split", "4.jpg of train has no label"),
        ([*GOOD, ("4.jpg", "", "val")], "path,label,split", "4.jpg of val has no label"),
        ([*GOOD, ("4.jpg", "b", "dev")], "path,label,split", "dev is no split; they are train, val, valid, valid"),
        ([*GOOD, ("4.jpg", "c", "val")], "path,label,split", r"4.jpg of val: c is not a class of train \(a, b\)"),
        ([*GOOD, ("4.jpg", "c", "test")], "path,label,split", "4.jpg of test: c is not a class of train"),
        ([*GOOD, ("4.jpg", "c/d", "train")], "path,label,split", "label c/d: a class has no / in its name"),
        (GOOD[:1], "path,label,split", "its training rows have 1 classes; at least 2"),
        (GOOD[2:], "path,label,split", "its training rows have 0 classes; at least 2"),
        (GOOD[:2], "path,label,split", "a has 1 image; the split needs at least 2 a class"),
    ],
)
@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_table_that_cannot_be_used_is_named_with_the_rule(rows, columns, message, name, tmp_path):
    data = write_table(tmp_path / name, rows, columns)
    with pytest.raises(UserError, match=message) as raised:
        load_dataset(data, 0)
    assert str(raised.value).startswith(f"--data {data}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "path,label\n1.jpg,a,more\n"), ("a.csv", ""), ("a.parquet", "?")]
)
def test_a_damaged_table_is_one_line(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"--data {tmp_path / name}: cannot be (read as a table|listed)") as raised:
        load_dataset(str(tmp_path / name), 0)
    assert "\n" not in str(raised.value)
