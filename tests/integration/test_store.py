"""The store of features: what is damaged, gone or at work beside."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import pyarrow as pa
import pytest
import torch
from test_train import CONFIG, assert_same, train_on

from plates.sources import FolderSource
from plates.storage import cache_root
from plates.store import KEY_TYPE, USE_FILE, FeatureStore, limit_size


def test_damaged_parts_are_computed_again(folder, tmp_path, own_cache):
    config = replace(CONFIG, data=str(folder))
    one = train_on(0, config, tmp_path)
    stored = list((own_cache / "features").rglob("*.arrow"))
    assert len(stored) == 4  # of training, validation and test, and of the training images as they are
    for part in stored:
        part.write_bytes(part.read_bytes()[:1000])
    again = train_on(0, config, tmp_path)
    assert not again.has_reused_features
    assert_same(one, again, tolerance=0)
    assert torch.equal(one.predicted.logits, again.predicted.logits)


def test_stored_features_come_back_exactly(tmp_path, monkeypatch):
    """From parts in any order, among rows of other runs; all that are asked for, or none."""
    monkeypatch.setattr("plates.store.BYTES_PER_PART", 50)
    rows, names = torch.randn(2, 5, 7), [bytes([number] * 16) for number in range(10)]
    keys, store = pa.array(names, KEY_TYPE), FeatureStore(tmp_path)
    for number in (5, 3, 0, 7, 1, 2, 4, 6, 9):
        store.add(names[number], rows.reshape(10, 7)[number])
    store.write(pa.array([b"x" * 16] * 3, KEY_TYPE), torch.zeros(3, 7))
    assert len(list(tmp_path.glob("*.arrow"))) > 3
    store.flush()
    with pytest.raises(FileNotFoundError, match="1 rows of features are gone"):
        FeatureStore(tmp_path).rows(keys)
    store.add(names[8], rows.reshape(10, 7)[8])
    store.flush()
    assert (FeatureStore(tmp_path).find(keys) >= 0).all()
    found = FeatureStore(tmp_path).rows(keys).arranged((2, 5))
    assert len(found) == 2
    assert torch.equal(found[:], rows)
    assert torch.equal(found[1], rows[1])
    assert torch.equal(found[0, torch.tensor([[4, 0], [2, 2]])], rows[0, torch.tensor([[4, 0], [2, 2]])])
    turned = FeatureStore(tmp_path).rows(keys).arranged((2, 5), 1, 0)
    assert torch.equal(turned[3], rows[:, 3])


def run_beside(config, tmp_path, monkeypatch, meanwhile=lambda: None):
    """A run that is held up after it has stored some parts, and one of the same features that goes through meanwhile.

    Returns: what both gave.
    """
    monkeypatch.setattr("plates.store.SECONDS_PER_PART", 0.0)
    monkeypatch.setattr("plates.device.CPU_BATCH_SIZE", 2)
    cache, read, calls = cache_root() / "features", FolderSource.read, count()
    is_held, may_go_on = threading.Event(), threading.Event()

    def hold_up(self, path):
        if next(calls) == 12:
            is_held.set()
            assert may_go_on.wait(60)
        return read(self, path)

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as held:
        held.setattr(FolderSource, "read", hold_up)
        first = pool.submit(train_on, 0, config, tmp_path / "a")
        assert is_held.wait(60)
        stored = {part for folder in cache.iterdir() for part in folder.iterdir()}
        assert len(stored) >= 3
        second = train_on(0, config, tmp_path / "b")
        assert stored < {part for folder in cache.iterdir() for part in folder.iterdir()}  # none is deleted
        meanwhile()
        may_go_on.set()
        return first.result(timeout=60), second


def test_two_runs_of_the_same_features_at_once_both_end_right(folder, tmp_path, monkeypatch):
    assert_same(*run_beside(replace(CONFIG, data=str(folder)), tmp_path, monkeypatch), tolerance=1e-6)


def test_parts_that_are_gone_are_computed_again(folder, tmp_path, monkeypatch, own_cache):
    """All of them, under the feet of a run at work: as where somebody empties the cache."""

    def clear():
        for part in (own_cache / "features").rglob("*.arrow"):
            part.unlink()

    config = replace(CONFIG, data=str(folder))
    assert_same(*run_beside(config, tmp_path, monkeypatch, clear), tolerance=1e-6)


def test_the_least_recently_used_go_and_none_that_is_in_use(tmp_path):
    stores = {}
    for age_s, name in enumerate(("newest", "middle", "oldest", "in use")):
        stores[name] = FeatureStore(tmp_path / name)
        stores[name].add(b"k" * 16, torch.ones(1000))
        stores[name].flush()
        used_at = (tmp_path / name / USE_FILE).stat().st_mtime - 60 * age_s
        os.utime(tmp_path / name / USE_FILE, (used_at, used_at))
    for name in ("newest", "middle", "oldest"):
        del stores[name]  # nobody uses them any more
    limit_size(tmp_path, 1e9)
    assert len([*tmp_path.iterdir()]) == 4
    size = sum(file.stat().st_size for file in (tmp_path / "newest").iterdir())
    limit_size(tmp_path, 2.5 * size)
    assert {folder.name for folder in tmp_path.iterdir()} == {"newest", "in use"}
    limit_size(tmp_path, 0)
    assert [folder.name for folder in tmp_path.iterdir()] == ["in use"]
    FeatureStore(tmp_path / "in use").rows(pa.array([b"k" * 16], KEY_TYPE))
