"""A packed data set: the same images, splits and results as what it was packed from."""

import json
from dataclasses import replace

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from test_features import train_whole_loop
from test_train import CONFIG, train_on

from plates import shards
from plates.dataset import load_dataset, row_groups
from plates.head import epoch_order
from plates.model import preprocessing_of
from plates.train_loop.end_to_end import ImageCache, train_batches
from plates.train_loop.group import Worker
from plates.trainer import make_task
from plates.weights import resolve_weights
from ray_jobs import prepare, train

PREPROCESSING = preprocessing_of("resnet18", 32)

SMALL = ["--backbone", "resnet18", "--weights", "none", "--image-size", "32", "--epochs", "2", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "IMAGES_PER_ROW_GROUP", 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_packed_folder_is_the_folder(num_workers, folder, tmp_path, monkeypatch, local_ray):
    monkeypatch.setattr("plates.pack.IMAGES_PER_SHARD", 5)
    packed = tmp_path / "packed"
    flags = ["--num-workers", str(num_workers)]
    assert prepare.main(["--data", str(folder), "--out", str(packed), *flags]) == 0
    one, other = load_dataset(str(folder), 0), load_dataset(str(packed), 0)
    assert (one.classes, one.train, one.val, one.test) == (other.classes, other.train, other.val, other.test)
    for sample in [*one.train, *one.val, *one.test]:
        assert torch.equal(one.source.read(sample.path), other.source.read(sample.path))
    for sample in [*one.train, *one.val]:
        assert one.source.check(sample.path).digest == other.source.check(sample.path).digest
    assert len(list(packed.glob("train-*.parquet"))) == -(-len(one.train) // 5)


def test_row_groups_of_large_images_are_small(folder, tmp_path, monkeypatch):
    """No more is in memory, and read at once, than some bytes, however large the images are."""
    monkeypatch.setattr(shards, "BYTES_PER_ROW_GROUP", 1)
    assert prepare.main(["--data", str(folder), "--out", str(tmp_path / "packed"), "--num-workers", "0"]) == 0
    with pq.ParquetFile(tmp_path / "packed" / "train-00000-of-00001.parquet") as file:
        assert file.num_row_groups == file.metadata.num_rows == 13
    one, other = load_dataset(str(folder), 0), load_dataset(str(tmp_path / "packed"), 0)
    assert all(torch.equal(one.source.read(s.path), other.source.read(s.path)) for s in one.train)


def test_a_shard_may_be_empty(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("plates.pack.IMAGES_PER_SHARD", 1)
    (folder / "test" / "3.jpg").write_bytes(b"no image")
    assert prepare.main(["--data", str(folder), "--out", str(tmp_path / "a"), "--num-workers", "0"]) == 3
    assert len(load_dataset(str(tmp_path / "a"), 0).test) == 6


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_reads_each_row_group_about_once(world_size, tmp_path, monkeypatch):
    """Of layer4 and all, by each worker, where no decoded image is kept."""
    packed, reads = tmp_path / "packed", []
    assert prepare.main(["--data", "synthetic:180", "--out", str(packed), "--num-workers", "0"]) == 0
    read_row_group = pq.ParquetFile.read_row_group

    def count(self, number, *arguments, **options):
        reads.append(number)
        return read_row_group(self, number, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    dataset = load_dataset(str(packed), 0)
    config = replace(CONFIG, data=str(packed), image_size=32, global_batch_size=8)
    task = make_task(config, dataset, resolve_weights("resnet18", "none", 0), PREPROCESSING, "fp32", tmp_path)
    order = epoch_order(0, 0, row_groups(dataset.source, dataset.train)).tolist()
    for rank in range(world_size):
        shards.row_group.cache_clear()
        reads.clear()
        worker = Worker(rank, world_size, torch.device("cpu"), is_ray=False, threads=(2,) * world_size)
        cache = ImageCache(dataset.source, PREPROCESSING, worker.device, budget_bytes=0)
        num_images = sum(len(labels) for _, labels, _ in train_batches(task, worker, 0, order, cache))
        assert num_images == 150 / world_size
        assert len(set(reads)) > 40
        assert len(reads) <= 1.2 * 50


def test_on_shards_the_head_from_features_is_the_head_end_to_end(folder, tmp_path, monkeypatch):
    """Thirteen row groups are more than an epoch mixes at once: both ways take the images in the same order."""
    monkeypatch.setattr(shards, "IMAGES_PER_ROW_GROUP", 1)
    packed = tmp_path / "packed"
    assert prepare.main(["--data", str(folder), "--out", str(packed), "--num-workers", "0"]) == 0
    config = replace(CONFIG, data=str(packed), epochs=3)
    model, fitted = train_whole_loop(config, tmp_path)
    trained = train_on(0, config, tmp_path)
    assert torch.allclose(trained.val_logits, fitted.val_logits, atol=1e-4)
    assert torch.allclose(trained.state["head.weight"], model.head.weight, atol=1e-4)
    from_folder = train_on(0, replace(config, data=str(folder)), tmp_path)
    assert not torch.allclose(trained.state["head.weight"], from_folder.state["head.weight"], atol=1e-6)


@pytest.mark.slow
def test_training_on_shards_is_training_on_the_drawings(tmp_path, local_ray):
    packed = tmp_path / "packed"
    assert prepare.main(["--data", "synthetic:13", "--out", str(packed)]) == 0
    assert train.main([*SMALL, "--data", "synthetic:13", "--out", str(tmp_path / "a")]) == 0
    assert train.main([*SMALL, "--data", str(packed), "--num-workers", "2", "--out", str(tmp_path / "b")]) == 0
    one, other = (pd.read_csv(tmp_path / name / "predictions.csv") for name in "ab")
    assert list(one["path"]) == list(other["path"])
    assert abs(one["p_dirty"] - other["p_dirty"]).max() < 1e-4
    figures = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab"]
    assert figures[0]["test/accuracy"] == figures[1]["test/accuracy"]


def test_what_cannot_be_read_is_left_out_or_refused(folder, tmp_path, capsys):
    (folder / "test" / "3.jpg").write_bytes(b"no image")
    assert prepare.main(["--data", str(folder), "--out", str(tmp_path / "a")]) == 3
    assert [row.path for row in pd.read_csv(tmp_path / "a" / "skipped.csv").itertuples()] == ["test/3.jpg"]
    assert len(load_dataset(str(tmp_path / "a"), 0).test) == 6
    (folder / "train" / "dirty" / "3.png").write_bytes(b"")
    assert prepare.main(["--data", str(folder), "--out", str(tmp_path / "b")]) == 2
    assert "train/dirty/3.png: the file is empty" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    (tmp_path / "a" / "train-00000-of-00001.parquet").write_bytes(b"half")
    assert train.main([*SMALL, "--data", str(tmp_path / "a"), "--out", str(tmp_path / "c")]) == 2
    assert "prepare it again" in capsys.readouterr().err
