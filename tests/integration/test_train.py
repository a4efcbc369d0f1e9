"""The main job on 0, 1 and 2 workers: the same model, and every file that is promised."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch

from plates.checkpoint import Bundle
from plates.cluster import Plan
from plates.config import TrainConfig
from plates.dataset import Samples, check_dataset, load_dataset
from plates.device import best_precision, decide_precision, devices_here
from plates.metrics import score
from plates.model import Weights, preprocessing_of
from plates.train_loop import predict, train
from plates.train_loop.task import Predicted, Trained
from plates.trainer import make_task, run_loop
from plates.weights import resolve_weights
from ray_jobs import predict as predict_job
from ray_jobs import train as train_job

CONFIG = TrainConfig(
    backbone="resnet18", weights="none", epochs=2, image_size=32, global_batch_size=6, precision="fp32"
)
RUN_FILES = {
    "config.json", "history.csv", "metrics.json", "timing.csv", "predictions.csv", "predictions.parquet",
    "submission.csv", "checkpoint", "report.html",
}  # fmt: skip


def train_on(where: int | Plan, config: TrainConfig, run, loop=train) -> Trained:
    """By a plan, or on a number of workers of one CPU."""
    dataset = load_dataset(config.data, config.seed)
    dataset, _ = check_dataset(dataset, False)
    weights = resolve_weights(config.backbone, config.weights, config.seed)
    plan = where if isinstance(where, Plan) else Plan(where, "cpu", 1, "test")
    preprocessing = preprocessing_of(weights.backbone, config.image_size)
    best = [best_precision(device) for device in devices_here(plan.device)]
    precision = decide_precision(config.precision, weights.backbone, plan.device, best)
    return run_loop(loop, make_task(config, dataset, weights, preprocessing, precision, run), plan)


def predict_on(where: int | Plan, config: TrainConfig, state: dict[str, torch.Tensor], run) -> Predicted:
    """The test split, by a model that was trained with this configuration."""
    dataset = replace(load_dataset(config.data, config.seed), train=Samples.of(), val=Samples.of())
    plan = where if isinstance(where, Plan) else Plan(where, "cpu", 1, "test")
    preprocessing = preprocessing_of(config.backbone, config.image_size)
    best = [best_precision(device) for device in devices_here(plan.device)]
    precision = decide_precision(config.precision, config.backbone, plan.device, best)
    bundle = Bundle(config.backbone, dataset.classes, preprocessing, state, {})
    weights = Weights(config.backbone, {}, "", "")
    return run_loop(
        partial(predict, bundle), make_task(config, dataset, weights, preprocessing, precision, run), plan
    )


def assert_same(one: Trained, other: Trained, tolerance: float) -> None:
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        assert torch.allclose(value.float(), other.state[name].float(), atol=tolerance), name
    assert torch.allclose(one.val_logits, other.val_logits, atol=tolerance * 10)
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance * 10)


@pytest.mark.parametrize("trainable", ["head", "layer4", "all"])
def test_the_same_model_on_0_1_and_2_workers(trainable, folder, tmp_path, local_ray):
    """13 training images in batches of 6: the last batch has one image, so one of two workers has none. The classes
    that a worker sees weigh other than those of the whole batch."""
    config = replace(CONFIG, data=str(folder), trainable=trainable, lr=1e-4, class_weights="cleaned=0.2,dirty=3")
    here = train_on(0, config, tmp_path / "0")
    counts = (1, 2) if trainable == "head" else (2,)
    for num_workers in counts:
        on_ray = train_on(num_workers, config, tmp_path / str(num_workers))  # not the finished state of another
        assert_same(here, on_ray, tolerance=1e-4)
        assert [row["rank"] for row in on_ray.timings] == list(range(num_workers))


def test_one_seed_one_model_and_another_seed_another(folder, tmp_path):
    config = replace(CONFIG, data=str(folder))
    one, same, other = (train_on(0, replace(config, seed=seed), tmp_path) for seed in (1, 1, 2))
    assert all(torch.equal(value, same.state[name]) for name, value in one.state.items())
    assert not torch.equal(one.state["head.weight"], other.state["head.weight"])


def test_training_learns_and_leaves_what_is_frozen(folder, tmp_path):
    """Pictures of two colours: anything that learns separates them."""
    config = replace(CONFIG, data="synthetic:24", trainable="layer4", epochs=6, image_size=64)
    trained = train_on(0, config, tmp_path)
    start = resolve_weights("resnet18", "none", 0).state
    assert trained.history[-1]["train/loss"] < trained.history[0]["train/loss"]
    assert torch.equal(trained.state["trunk.layer3.0.conv1.weight"], start["layer3.0.conv1.weight"])
    assert not torch.equal(trained.state["trunk.layer4.0.conv1.weight"], start["layer4.0.conv1.weight"])
    for name, value in start.items():
        if "running_" in name:
            assert torch.equal(trained.state[f"trunk.{name}"], value), name


def test_step_lr_is_stepped_after_each_epoch(folder, tmp_path):
    trained = train_on(0, replace(CONFIG, data=str(folder), epochs=5, step_size=2, gamma=0.5, lr=0.1), tmp_path)
    assert [row["lr"] for row in trained.history] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_validation_figures_are_exact(folder, tmp_path):
    trained = train_on(0, replace(CONFIG, data=str(folder)), tmp_path)
    val = load_dataset(str(folder), 0).val
    figures = score(trained.val_logits, val.labels, ("cleaned", "dirty"), "val")
    assert figures["val/num_images"] == len(val) == 4
    assert figures["val/loss"] == pytest.approx(trained.history[-1]["val/loss"], abs=1e-6)


@pytest.mark.parametrize("trainable", ["head", "layer4"])
def test_two_workers_predict_what_one_process_predicts(trainable, folder, tmp_path, local_ray):
    (folder / "test" / "broken.jpg").write_text("a text named .jpg")
    flags = ["--trainable", trainable, "--precision", "fp32"]
    assert run_train("--data", folder, "--out", tmp_path / "run", *flags) == 3
    tables = [pd.read_csv(tmp_path / "run" / "predictions.csv")]
    for num_workers in (0, 2):
        out = tmp_path / str(num_workers)
        flags = ["--data", str(folder), "--out", str(out), "--num-workers", str(num_workers), "--precision", "fp32"]
        assert predict_job.main(["--checkpoint", str(tmp_path / "run" / "checkpoint"), *flags]) == 3
        tables.append(pd.read_csv(out / "predictions.csv"))
        assert pd.read_csv(out / "skipped.csv")["path"].tolist() == ["test/broken.jpg"]
        assert len(pd.read_csv(out / "timing.csv")) == 1 + max(1, num_workers)
        assert {path.name for path in out.iterdir()} == RUN_FILES - {"checkpoint", "history.csv"} | {"skipped.csv"}
    for table in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], table, atol=1e-5)
    assert list(tables[0]["path"]) == [f"test/{i}.jpg" for i in range(7)]
    assert tables[0][["p_cleaned", "p_dirty"]].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)


def run_train(*flags: object) -> int:
    small = ["--backbone", "resnet18", "--weights", "none", "--epochs", "2", "--image-size", "32"]
    return train_job.main([*small, *map(str, flags)])


def test_a_run_writes_all_its_files_and_predict_repeats_them(folder, tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    assert run_train("--data", folder, "--out", run, "--class-weights", "auto", "--log-to", "tensorboard") == 0
    assert {path.name for path in run.iterdir()} == RUN_FILES | {"tensorboard"}
    config = json.loads((run / "config.json").read_text())
    assert config["status"] == "finished"
    assert (config["backbone"], config["num_workers"], config["seed"]) == ("resnet18", 0, 0)
    assert config["class_weights"] == pytest.approx({"cleaned": 13 / (2 * 7), "dirty": 13 / (2 * 6)})
    timing = pd.read_csv(run / "timing.csv")
    assert timing["rank"].isna().tolist() == [True, False]
    assert timing.loc[0, "total_s"] >= timing.loc[0, ["startup_s", "data_s", "train_s", "inference_s"]].sum() - 0.5
    history = pd.read_csv(run / "history.csv")
    assert list(history.columns) == ["epoch", "lr", "train/loss", "train/accuracy", "val/loss", "val/accuracy"]
    assert (run / "submission.csv").read_text().startswith("id,label\n0,")
    assert str(run / "report.html") in capsys.readouterr().out

    assert (
        predict_job.main(["--checkpoint", str(run / "checkpoint"), "--data", str(folder), "--out", str(again)]) == 0
    )
    before, after = (pd.read_csv(where / "predictions.csv") for where in (run, again))
    pd.testing.assert_frame_equal(before, after, atol=1e-6)
    assert list(before.columns) == ["path", "id", "label", "p_cleaned", "p_dirty", "distance_quantile"]
    pd.testing.assert_frame_equal(
        pd.read_parquet(run / "predictions.parquet"), before.astype({"id": str}), check_dtype=False, atol=1e-6
    )

    report = (run / "report.html").read_bytes()
    assert run_train("--data", folder, "--out", run, "--class-weights", "auto") == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (run / "report.html").read_bytes() == report


def test_drawn_plates_are_scored_against_labels_kept_aside(tmp_path):
    run = tmp_path / "run"
    assert run_train("--data", "synthetic:12", "--out", run) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    predictions = pd.read_csv(run / "predictions.csv")
    truth = {sample.path: sample.label for sample in load_dataset("synthetic:12", 0).test}
    expected = [("cleaned", "dirty")[truth[path]] for path in predictions["path"]]
    assert metrics["test/accuracy"] == pytest.approx((predictions["label"] == expected).mean())


def test_unreadable_images_end_with_their_exit_codes(folder, tmp_path, capsys):
    (folder / "train" / "dirty" / "1.png").write_text("a text named .png")
    assert run_train("--data", folder, "--out", tmp_path / "run") == 2
    assert "train/dirty/1.png" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (folder / "test" / "broken.jpg").write_bytes(b"")
    assert run_train("--data", folder, "--out", tmp_path / "run", "--skip-unreadable") == 3
    skipped = pd.read_csv(tmp_path / "run" / "skipped.csv")
    assert skipped["path"].tolist() == ["train/dirty/1.png", "test/broken.jpg"]
    assert "test/broken.jpg" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "run" / "predictions.csv")) == 7
    for name, flags in (("with", ["--skip-unreadable"]), ("without", [])):  # it is a test split: always gone on with
        out, checkpoint = tmp_path / name, str(tmp_path / "run" / "checkpoint")
        assert predict_job.main(["--checkpoint", checkpoint, "--data", str(folder), "--out", str(out), *flags]) == 3
        assert pd.read_csv(out / "skipped.csv")["path"].tolist() == ["test/broken.jpg"]
        assert len(pd.read_csv(out / "predictions.csv")) == 7


def test_without_a_test_split_nothing_is_predicted(folder, tmp_path, capsys):
    (folder / "test").rename(folder / "elsewhere")
    assert run_train("--data", folder, "--out", tmp_path / "run") == 0
    assert "no test split" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "run" / "predictions.csv").empty


def test_weights_of_a_class_that_there_is_not_are_refused(folder, tmp_path, capsys):
    assert run_train("--data", folder, "--out", tmp_path / "run", "--class-weights", "filthy=2") == 2
    assert "--class-weights filthy=2: no class filthy among cleaned, dirty" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_other_classes_is_refused(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_train("--data", folder, "--out", run) == 0
    (folder / "train" / "dirty").rename(folder / "train" / "filthy")
    other = ["--checkpoint", str(run / "checkpoint"), "--data", str(folder), "--out", str(tmp_path / "p")]
    assert predict_job.main(other) == 2
    assert "was trained on the classes cleaned, dirty" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_more_workers_than_the_cluster_has_is_said_at_once(folder, tmp_path, local_ray, capsys):
    start_s = time.monotonic()
    assert run_train("--data", folder, "--out", tmp_path / "run", "--num-workers", 64) == 2
    assert "--num-workers 64: the cluster has 2 CPUs" in capsys.readouterr().err
    assert time.monotonic() - start_s < 30
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "is_started"),
    [
        ("TrainConfig(num_workers=1)", True),
        ("TrainConfig()", False),
        ("TuneConfig()", True),
        ("TrainConfig(data='no-such-folder', num_workers=1)", False),
    ],
)
def test_ray_starts_beside_the_imports_where_it_is_wanted(config, is_started):
    code = f"""
import sys, threading
from plates.address import start_ray_early
from plates.config import TrainConfig, TuneConfig
start_ray_early({config})
for thread in threading.enumerate()[1:]:
    if not thread.daemon:
        thread.join()
started = "ray" in sys.modules and sys.modules["ray"].is_initialized()
assert [started, "plates.job" in sys.modules, "matplotlib" in sys.modules] == [{is_started}] * 3
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_packaged_weights_are_in_the_right_places(photos, tmp_path):
    """Tensors in a wrong order would leave noise; a head on true ImageNet features fits the photos at once."""
    config = TrainConfig(data=str(photos), backbone="efficientnet_lite0", epochs=30, num_views=2, step_size=30)
    trained = train_on(0, config, tmp_path)
    assert trained.history[-1]["train/accuracy"] >= 0.9


@pytest.mark.slow
def test_a_worker_that_cannot_read_the_data_is_named(folder, tmp_path, local_ray):
    from plates.config import UserError

    dataset, _ = check_dataset(load_dataset(str(folder), 0), False)
    (folder / "train" / "dirty" / "1.png").unlink()
    weights = resolve_weights("resnet18", "none", 0)
    task = make_task(
        replace(CONFIG, data=str(folder)),
        dataset,
        weights,
        preprocessing_of("resnet18", 32),
        "fp32",
        tmp_path,
    )
    with pytest.raises(UserError, match="a worker cannot read an image"):
        run_loop(train, task, Plan(2, "cpu", 1, "test"))
