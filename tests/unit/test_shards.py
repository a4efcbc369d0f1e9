"""Hugging Face's image layout in Parquet, as others write it and as `plates prepare` does."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from plates import shards
from plates.config import UserError
from plates.dataset import check_dataset, load_dataset, load_test_split, merge_labelled, row_groups
from plates.samples import Sample
from plates.shards import IMAGES_PER_ROW_GROUP, schema_of, write_shard

NAMES = ["dirty", "cleaned"]  # not in sorted order, as a ClassLabel may have them


def write_foreign(file: Path, rows: list[tuple[bytes | None, str | None, object]], *, is_named: bool = True) -> None:
    """Rows of an image's bytes, its path and its label, in row groups of 3, by pyarrow alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if is_named else None
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    label = pa.string() if isinstance(rows[0][2], str) else pa.int64()
    schema = pa.schema([("image", image), ("label", label)], metadata)
    columns = [[{"bytes": data, "path": path} for data, path, _ in rows], [label for *_, label in rows]]
    table = pa.table(columns, schema=schema)
    pq.write_table(table, file, row_group_size=3)


def pictures(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.rglob("*.jpg"))]


def test_a_folder_of_shards_has_the_splits_of_its_names(folder, tmp_path):
    some = pictures(folder)
    root = tmp_path / "hub" / "data"
    write_foreign(root / "train-00000-of-00002.parquet", [(some[n], f"z{n}.jpg", n % 2) for n in range(4)])
    write_foreign(root / "train-00001-of-00002.parquet", [(some[n], f"a{n}.jpg", n % 2) for n in range(4, 8)])
    write_foreign(root / "validation-00000-of-00001.parquet", [(some[8], "v.jpg", 1), (some[9], "w.jpg", 0)])
    write_foreign(root / "test-00000-of-00001.parquet", [(some[10], "t.jpg", -1), (some[11], "u.jpg", 1)])
    (tmp_path / "hub" / "README.md").write_text("A data set.")
    dataset = load_dataset(str(tmp_path / "hub"), 0)
    assert dataset.classes == ("cleaned", "dirty")
    expected = [Sample(f"{'z' if n < 4 else 'a'}{n}.jpg", 1 - n % 2) for n in range(8)]
    assert [*dataset.train] == expected  # as they are stored
    assert [*dataset.val] == [Sample("v.jpg", 0), Sample("w.jpg", 1)]
    assert [*dataset.test] == [Sample("t.jpg"), Sample("u.jpg", 0)]
    for sample, data in zip((*dataset.train, *dataset.val, *dataset.test), some, strict=False):
        assert dataset.source.read_bytes(sample.path) == data
        assert dataset.source.digest(sample.path) == hashlib.sha256(data).digest()
    checked, skipped = check_dataset(dataset, skip_unreadable=False)
    assert not skipped
    assert checked.train.table["digest"].to_pylist() == [hashlib.sha256(data).digest() for data in some[:8]]


def test_paths_are_made_up_where_there_is_none_of_its_own(folder, tmp_path):
    data = pictures(folder)[0]
    names = ["a.jpg", None, "b.jpg", "b.jpg"]
    write_foreign(tmp_path / "shards" / "train-0.parquet", [(data, name, n % 2) for n, name in enumerate(names)])
    write_foreign(tmp_path / "shards" / "val-0.parquet", [(data, None, 0), (data, "c.jpg", 1)])
    dataset = load_dataset(str(tmp_path / "shards"), 0)
    made_up = [f"train/train-0-00000{n}" for n in (1, 2, 3)]
    assert [sample.path for sample in dataset.train] == ["a.jpg", *made_up]
    assert [sample.path for sample in dataset.val] == ["val/val-0-000000", "c.jpg"]


def test_labels_may_be_text_and_a_file_all_there_is(folder, tmp_path):
    some, file = pictures(folder), tmp_path / "shards" / "birds.parquet"
    write_foreign(file, [(some[n], f"{n}.jpg", f"class {n % 2}") for n in range(14)], is_named=False)
    for place in (file, file.parent):
        dataset = load_dataset(str(place), 0)
        assert dataset.classes == ("class 0", "class 1")
        assert [sample.path for sample in dataset.val] == ["0.jpg", "1.jpg", "12.jpg", "13.jpg"]
    write_foreign(file, [(some[n], f"{n}.jpg", n % 3) for n in range(12)], is_named=False)
    assert load_dataset(str(file), 0).classes == ("0", "1", "2")


def test_each_row_group_is_read_once_though_its_paths_are_in_no_order(folder, tmp_path, monkeypatch):
    """By the check and by whatever goes through all labelled images, which a sweep merges."""
    some, reads = pictures(folder), []
    rows = [(some[n % len(some)], f"{n * 37 % 101:03d}.jpg", n % 2) for n in range(90)]
    write_foreign(tmp_path / "shards" / "train.parquet", rows)
    read_row_group = pq.ParquetFile.read_row_group

    def count(self, number, *arguments, **options):
        reads.append(number)
        return read_row_group(self, number, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    shards.row_group.cache_clear()
    dataset, _ = check_dataset(load_dataset(str(tmp_path / "shards"), 0), skip_unreadable=False)
    assert 30 <= len(reads) <= 45  # of train each once, then up to 8 again for what val has in them
    groups = row_groups(dataset.source, dataset.train)
    assert torch.equal(groups, groups.sort().values)
    merged = merge_labelled(dataset).train
    assert torch.equal(row_groups(dataset.source, merged[: len(dataset.train)]), groups)


def test_images_that_are_not_there_are_unreadable(folder, tmp_path):
    some = pictures(folder)
    write_foreign(
        tmp_path / "shards" / "train.parquet", [(data, f"{n}.jpg", n % 2) for n, data in enumerate([*some[:8], None])]
    )
    with pytest.raises(UserError, match=r"1 images cannot be read \(8.jpg: train.parquet holds its name"):
        check_dataset(load_dataset(str(tmp_path / "shards"), 0), skip_unreadable=False)


def test_what_is_no_data_set_is_one_line(folder, tmp_path):
    some = pictures(folder)
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"picture": [b"1"]}), tmp_path / "shards" / "a.parquet")
    with pytest.raises(UserError, match=r"it needs image \(bytes and path\) and label"):
        load_dataset(str(tmp_path / "shards"), 0)
    write_foreign(tmp_path / "shards" / "a.parquet", [(some[n], f"{n}.jpg", n % 2) for n in range(4)])
    write_foreign(tmp_path / "shards" / "test-0.parquet", [(some[n], f"t{n}.jpg", 1) for n in range(2)])
    with pytest.raises(UserError, match=r"a.parquet names no split \(train, .*\), while others do"):
        load_dataset(str(tmp_path / "shards"), 0)
    (tmp_path / "shards" / "a.parquet").unlink()
    with pytest.raises(UserError, match="its training rows have 0 classes"):
        load_dataset(str(tmp_path / "shards"), 0)
    test = load_test_split(str(tmp_path / "shards"), 0, ("cleaned", "dirty")).test
    assert [*test] == [Sample("t0.jpg", 0), Sample("t1.jpg", 0)]
    write_foreign(tmp_path / "shards" / "train-0.parquet", [(some[n], f"{n}.jpg", n % 3) for n in range(4)])
    with pytest.raises(UserError, match="its shards are damaged"):  # a number that the schema has no name of
        load_dataset(str(tmp_path / "shards"), 0)


def test_what_an_older_version_packed_is_to_be_prepared_again(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 1, "classes": ["a", "b"], "shards": []}))
    pq.write_table(pa.table({"image": [b"1"], "label": ["a"]}), tmp_path / "train-00000.parquet")
    with pytest.raises(UserError, match="is of format 1, this version reads 2; prepare it again"):
        load_dataset(str(tmp_path), 0)


def test_a_shard_is_what_hugging_face_reads(tmp_path):
    """By the metadata that its library finds Image and ClassLabel by."""
    images = [{"bytes": bytes([n]), "path": f"{n}.jpg"} for n in range(100)]
    rows = [{"image": image, "label": n % 3 - 1, "sha256": ""} for n, image in enumerate(images)]
    write_shard(tmp_path / "a.parquet", schema_of(["b", "c"]), iter(rows))
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert file.num_row_groups == -(-100 // IMAGES_PER_ROW_GROUP)
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        assert features["image"] == {"_type": "Image"}
        assert features["label"] == {"names": ["b", "c"], "_type": "ClassLabel"}
        assert file.read().to_pylist() == rows
