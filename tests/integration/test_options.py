"""What the head sees, and the logistic head: each option on 0, 1 and 2 workers, and against a computation by hand."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from by_hand import ByHand
from sklearn.metrics import log_loss
from torch.nn.functional import linear

from plates.checkpoint import load_bundle
from plates.cluster import Plan
from plates.command import parse
from plates.config import TrainConfig
from plates.dataset import check_dataset, load_dataset
from plates.device import best_precision, decide_precision
from plates.model import build_classifier, preprocessing_of
from plates.timing import Phases
from plates.train_loop.end_to_end import train_end_to_end
from plates.train_loop.group import Worker
from plates.train_loop.task import Task, Trained
from plates.trainer import make_task, run_loop
from plates.weights import resolve_weights
from ray_jobs import predict as predict_job
from ray_jobs import prepare as prepare_job
from ray_jobs import train as train_job

BASE = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--num-views", "3", "--head", "logistic"]
RESNET = ["--backbone", "resnet18", "--weights", "none"]
SEEN = ["--crop", "foreground", "--augment", "dihedral", "--tta", "3"]
TRUNK = [*RESNET, *SEEN, "--readout", "last/max+stage3/avg", "--head", "adam", "--epochs", "2", "--lr", "1e-5"]
CASES = {
    "default": [],
    "readout": ["--readout", "pre/max+stage3/avg"],
    "crop": ["--crop", "foreground"],
    "border": ["--resize", "border"],
    "center": ["--resize", "center"],
    "dihedral": ["--augment", "dihedral"],
    "both": ["--augment", "both"],
    "tta": ["--tta", "3"],
    "together": [*SEEN, "--readout", "pre/max+stage3/avg", "--resize", "border", "--num-views", "8", "--tta", "8"],
    "auto": [*RESNET, "--readout", "last/max"],
    "fp32": [*RESNET, "--readout", "last/max", "--precision", "fp32"],
    "layer4": [*TRUNK, "--trainable", "layer4"],
    "all": [*TRUNK, "--trainable", "all", "--precision", "fp32"],
}
IN_8_BITS = {"auto", "layer4"}  # where the CPU has bf16
# Of probabilities, those of a pass in bf16 against one in fp32, and of fp32 with batch norm folded against without.
ROUNDING = {name: 0.02 if name in IN_8_BITS else 2e-4 for name in CASES}
UNSEEN = {  # what model.json would say had an option not been there: other predictions
    "crop": {"crop": "none"},
    "border": {"crop_mode": "squash"},
    "center": {"crop_mode": "squash"},
    "tta": {"tta": 1},
    "together": {"tta": 1},
    "layer4": {"tta": 1},
    "all": {"crop": "none"},
}


@pytest.fixture(scope="module")
def kept() -> dict[object, object]:
    """What several tests look at, computed by the first one."""
    return {}


@pytest.fixture
def run_of(kept, drawn, tmp_path_factory):
    """The run directory of a case on 0 workers."""

    def train_once(name: str) -> Path:
        if name not in kept:
            run = tmp_path_factory.mktemp(name) / "run"
            given = [*BASE, *CASES[name], "--data", drawn, "--num-workers", "0", "--out", str(run)]
            assert train_job.main(given) == 0
            kept[name] = run
        return kept[name]

    return train_once


find_weights = cache(resolve_weights)  # one object, which goes through the object store once


def task_of(flags: list[str], run: Path) -> Task:
    config = parse(TrainConfig, [*BASE, *flags], "plates train")
    dataset, _ = check_dataset(load_dataset(config.data, config.seed), False)
    weights = find_weights(config.backbone, config.weights, config.seed)
    preprocessing = preprocessing_of(weights.backbone, config.image_size, config.crop, config.resize)
    best = [best_precision(torch.device("cpu"))]
    precision = decide_precision(config.precision, weights.backbone, "cpu", best)
    return make_task(config, dataset, weights, preprocessing, precision, run)


@pytest.fixture
def on_ray(kept, drawn, tmp_path_factory, local_ray):
    """All cases, one after the other, on one group of workers, from an empty cache."""

    def train_once(num_workers: int) -> dict[str, Trained]:
        def train_each(tasks, task, worker):  # by value: Ray's workers do not have this module
            from plates.train_loop import train

            return {name: train(one, worker) for name, one in tasks.items()}

        if num_workers not in kept:
            run = tmp_path_factory.mktemp(f"on-{num_workers}")
            tasks = {name: task_of([*flags, "--data", drawn], run) for name, flags in CASES.items()}
            tasks = {name: replace(task, cache_root=run / "cache") for name, task in tasks.items()}
            plan = Plan(num_workers, "cpu", 1, "test")
            kept[num_workers] = run_loop(partial(train_each, tasks), tasks["default"], plan)
        return kept[num_workers]

    return train_once


def chances_of(run: Path) -> torch.Tensor:
    """(N, C) float64 of predictions.csv."""
    return torch.tensor(pd.read_csv(run / "predictions.csv")[["p_cleaned", "p_dirty"]].to_numpy())


def predict(checkpoint: Path, out: Path, *flags: object) -> int:
    given = ["--checkpoint", checkpoint, "--out", out, "--num-workers", 0, *flags]
    return predict_job.main([*map(str, given)])


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_alone_predicts_what_its_run_did(name, run_of, drawn, tmp_path):
    """And plain torch does, in fp32 without the folded trunk, on views cut out, turned and averaged by hand."""
    run = run_of(name)
    assert predict(run / "checkpoint", tmp_path / "again", "--data", drawn, "--precision",
                   json.loads((run / "config.json").read_text())["precision"]) == 0  # fmt: skip
    chances, by_hand = chances_of(run), ByHand(run / "checkpoint")
    assert torch.allclose(chances_of(tmp_path / "again"), chances, atol=1e-5)
    dataset = load_dataset(drawn, 0)
    expected = by_hand.predict(dataset.source, dataset.test)
    assert expected.std(0).min() > 10 * ROUNDING[name] or name in IN_8_BITS, "predictions that tell nothing"
    assert torch.allclose(chances, expected, atol=ROUNDING[name])
    of_val = by_hand.predict(dataset.source, dataset.val)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["val/loss"] == pytest.approx(log_loss(dataset.val.labels, of_val), abs=5 * ROUNDING[name])
    if name in UNSEEN:
        other = ByHand(run / "checkpoint", **UNSEEN[name]).predict(dataset.source, dataset.test)
        assert (other - expected).abs().max() > 3 * ROUNDING[name] or name in IN_8_BITS


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("layer4", "all")])
@torch.inference_mode()
def test_a_logistic_head_is_that_of_the_views_asked_for(name, run_of, drawn):
    run, dataset = run_of(name), load_dataset(drawn, 0)
    metrics, bundle = json.loads((run / "metrics.json").read_text()), load_bundle(run / "checkpoint")
    assert bundle.info["metrics"]["head/strength"] == metrics["head/strength"]
    settings = metrics["head/strength"], metrics["head/temperature"]
    by_hand = ByHand(run / "checkpoint")
    features = by_hand.features(dataset.source, dataset.test, by_hand.train_numbers())
    ours = by_hand.model.head(features)
    theirs = linear(features, *by_hand.fit(dataset.source, dataset.train, *settings))
    # A feature that is all but constant over the training views is scaled up, and its rounding with it.
    assert (ours - theirs).abs().max() < (0.2 if name in IN_8_BITS else 0.03) * ours.std()
    history = pd.read_csv(run / "history.csv")
    assert history["epoch"].tolist() == [0]
    assert history["lr"].isna().all()
    assert history["val/loss"][0] == pytest.approx(metrics["val/loss"], abs=1e-6)
    loss = log_loss(dataset.train.labels, by_hand.predict(dataset.source, dataset.train))
    assert history["train/loss"][0] == pytest.approx(loss, abs=5 * ROUNDING[name])


@pytest.mark.parametrize(
    ("num_workers", "name"),
    [
        *((2, name) for name in CASES),
        *(pytest.param(1, name, marks=pytest.mark.slow) for name in ("auto", "fp32", "all")),
    ],
)
def test_the_same_model_on_0_1_and_2_workers(num_workers, name, run_of, on_ray):
    run, trained = run_of(name), on_ray(num_workers)[name]
    assert [row["rank"] for row in trained.timings] == list(range(num_workers))
    state = load_bundle(run / "checkpoint").state
    assert trained.state.keys() == state.keys()
    for key, value in state.items():
        rounding, least = (1e-2, 1e-2) if name in IN_8_BITS else (1e-4, 1e-3)
        tolerance = rounding * max(least, float(value.float().abs().max()))
        assert torch.allclose(trained.state[key].float(), value.float(), atol=tolerance), key
    chances = trained.predicted.logits.double().softmax(1)
    assert torch.allclose(chances, chances_of(run), atol=0.01 if name in IN_8_BITS else 1e-4)
    history = pd.read_csv(run / "history.csv")
    for mine, theirs in zip(trained.history, history.to_dict("records"), strict=True):
        assert mine == pytest.approx(theirs, abs=0.02 if name in IN_8_BITS else 1e-3, nan_ok=True)


@pytest.mark.parametrize("flags", [SEEN, ["--augment", "both", "--tta", "2", "--resize", "border"]], ids=" ".join)
def test_adams_head_from_features_is_the_head_end_to_end(flags, drawn, tmp_path):
    """Every view through the trunk at every step, where features are computed once."""
    task = task_of(
        ["--data", drawn, *RESNET, *flags, "--head", "adam", "--epochs", "5", "--precision", "fp32"], tmp_path
    )
    config, classes = task.config, task.dataset.classes
    model = build_classifier("resnet18", task.weights.state, len(classes), config.seed)
    worker = Worker(0, 1, torch.device("cpu"), is_ray=False, threads=(2,))
    fitted = train_end_to_end(task, worker, model, Phases())
    from plates.train_loop import train

    trained = run_loop(train, task, Plan(0, "cpu", 2, "test"))
    assert torch.allclose(trained.val_logits, fitted.val_logits, atol=1e-4)
    assert torch.allclose(trained.state["head.weight"], model.head.weight, atol=1e-4)
    for mine, theirs in zip(trained.history, fitted.history, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_views_than_were_trained_with_and_an_unreadable_image(num_workers, run_of, folder, tmp_path, local_ray):
    """That image is left out once, not once a view, and the rows of the others stay with them."""
    run = run_of("dihedral")
    (folder / "test" / "3.jpg").write_bytes(b"no image")
    stump = (folder / "test" / "5.jpg").read_bytes()[:300]
    (folder / "test" / "55.jpg").write_bytes(stump)
    out = tmp_path / "out"
    flags = ["--data", folder, "--tta", 2, "--num-workers", num_workers]
    assert predict(run / "checkpoint", out, *flags) == 3
    assert pd.read_csv(out / "skipped.csv")["path"].tolist() == ["test/3.jpg", "test/55.jpg"]
    paths = [f"test/{number}.jpg" for number in (0, 1, 2, 4, 5, 6)]
    assert pd.read_csv(out / "predictions.csv")["path"].tolist() == paths
    test = load_dataset(str(folder), 0)
    read = test.test.where([sample.path in paths for sample in test.test])
    expected, of_one = (
        ByHand(run / "checkpoint", tta=count).predict(test.source, read) for count in (2, 1)
    )  # the views are asked for now: model.json says 1
    assert torch.allclose(chances_of(out), expected, atol=2e-4)
    assert (of_one - expected).abs().max() > 2e-3


def test_more_views_than_a_plate_has_symmetries_are_one_line(run_of, drawn, tmp_path, capsys):
    assert predict(run_of("dihedral") / "checkpoint", tmp_path / "out", "--data", drawn, "--tta", 9) == 2
    assert "--tta 9: --augment dihedral has 8 views" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["both", "together"])
def test_a_packed_set_gives_the_same_logistic_model(name, run_of, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("plates.shards.IMAGES_PER_ROW_GROUP", 5)
    packed, out = tmp_path / "packed", tmp_path / "out"
    assert prepare_job.main(["--data", drawn, "--out", str(packed), "--num-workers", "0"]) == 0
    assert train_job.main([*BASE, *CASES[name], "--data", str(packed), "--out", str(out), "--num-workers", "0"]) == 0
    state, other = (load_bundle(run / "checkpoint").state for run in (run_of(name), out))
    assert torch.allclose(state["head.weight"], other["head.weight"], atol=1e-6)
    assert torch.allclose(chances_of(run_of(name)), chances_of(out), atol=1e-6)
