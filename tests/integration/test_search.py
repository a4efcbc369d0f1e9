"""The search of all on real Ray Tune: its files, its winner computed again by hand, cut-offs and the budget."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from by_hand import ByHand
from conftest import ROOT
from sklearn.metrics import log_loss
from sklearn.model_selection import RepeatedStratifiedKFold
from test_options import chances_of, predict

from plates.checkpoint import load_bundle
from plates.data_issues import COLUMNS as DATA_COLUMNS
from plates.dataset import load_dataset, merge_labelled
from plates.logistic import STRENGTHS, fit_logistic, mask_folds
from ray_jobs import train as train_job
from ray_jobs import tune as tune_job

TRAIN = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--num-views", "2", "--epochs", "4"]
SEARCH = [*TRAIN, "--tta", "2", "--num-trials", "3", "--folds", "2", "--cv-repeats", "1"]
SIZES, CROPS = (64, 96, 128), ("none", "foreground")
PREDICTED = ["p_cleaned", "p_dirty"]
SETTINGS = ("head", "image_size", "crop", "num_views", "readout", "tta")


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture(scope="module")
def few(drawn: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 of the drawn plates of each class, so that a search takes seconds."""
    root = tmp_path_factory.mktemp("few") / "plates"
    shutil.copytree(drawn, root)
    for folder in (root / "train").iterdir():
        for path in sorted(folder.iterdir())[12:]:
            path.unlink()
    return str(root)


@pytest.fixture
def searched(kept, few, tmp_path_factory, monkeypatch, local_ray) -> Path:
    """A search in this process, shared by the tests; its cache lies beside it."""
    if not kept:
        folder = tmp_path_factory.mktemp("searched")
        with monkeypatch.context() as own:
            own.setenv("PLATES_CACHE", str(folder / "cache"))
            assert tune_job.main([*SEARCH, "--data", few, "--out", str(folder / "run")]) == 0
        kept["run"] = folder / "run"
    return kept["run"]


def read(run: Path) -> tuple[pd.DataFrame, dict, dict]:
    """trials.csv, metrics.json and config.json."""
    metrics, config = (json.loads((run / name).read_text()) for name in ("metrics.json", "config.json"))
    return pd.read_csv(run / "trials.csv"), metrics, config


def assert_same_outcome(run: Path, other: Path, tolerance: float) -> None:
    for name in ("trials.csv", "out_of_fold.csv", "predictions.csv", "history.csv", "history_baseline.csv"):
        one, two = (pd.read_csv(folder / name) for folder in (run, other))
        pd.testing.assert_frame_equal(one, two, atol=tolerance, rtol=tolerance)
    assert load_bundle(run / "checkpoint").preprocessing == load_bundle(other / "checkpoint").preprocessing
    for name in SETTINGS:
        assert read(run)[2][name] == read(other)[2][name]


def test_a_search_doubts_the_labels_that_held_out_images_speak_against(searched):
    table = pd.read_csv(searched / "out_of_fold.csv")
    means = {name: table.loc[table["label"] == name, f"p_{name}"].mean() for name in ("cleaned", "dirty")}
    other = {"cleaned": "dirty", "dirty": "cleaned"}
    doubtful = [
        (row["p_" + row["label"]], row["path"], other[row["label"]])
        for row in table.to_dict("records")
        if row["p_" + other[row["label"]]] >= max(means[other[row["label"]]], row["p_" + row["label"]])
    ]
    path = searched / "data_issues.csv"
    found = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=DATA_COLUMNS)
    labels = found[found["issue"] == "label"][["label_score", "path", "predicted_label"]]
    assert [*labels.itertuples(index=False, name=None)] == sorted(doubtful)
    assert json.loads((searched / "config.json").read_text())["data_check"]["lines"][0].startswith("images: train")


def test_a_search_tries_the_recipe_and_every_pass_of_the_trunk(searched):
    trials, metrics, config = read(searched)
    assert [*trials.columns[:4]] == ["trial", "head", "image_size", "crop"]
    assert {*SETTINGS, "strength", "lr", "step_size", "gamma"} < {*trials.columns}
    assert trials["trial"].tolist() == list(range(len(trials)))
    assert trials["is_baseline"].tolist() == [True] + [False] * (len(trials) - 1)
    by_adam = trials["head"] == "adam"
    assert by_adam.sum() == 3
    assert set(zip(trials["image_size"][by_adam], trials["readout"][by_adam], strict=True)) == {(64, "last/avg")}
    readouts = ["last/avg", "last/max", "pre/avg", "pre/max", "stage4/avg", "stage4/max"]
    expected = {(size, crop, views, readout, tta) for size in SIZES for crop in CROPS for readout in readouts
                for views, tta in ((1, 1), (8, 1), (8, 2))}  # fmt: skip
    named = trials.loc[~by_adam, ["image_size", "crop", "num_views", "readout", "tta"]]
    assert len(named) == len(expected)
    assert set(named.itertuples(index=False, name=None)) == expected
    assert set(trials["strength"][~by_adam]) <= set(STRENGTHS)
    assert (trials["num_folds"] == 2).all()
    near = trials[trials["log_loss"] <= trials["log_loss"].min() + 0.005]
    cost = near["image_size"] ** 2 * near["tta"]
    cheapest = near[cost == cost.min()]
    assert trials.index[trials["is_winner"]].tolist() == [cheapest["log_loss"].idxmin()]
    winner = trials[trials["is_winner"]].iloc[0]
    assert metrics["winner/trial"] == winner["trial"]
    assert metrics["winner/log_loss"] == pytest.approx(winner["log_loss"], abs=1e-6)
    info = json.loads((searched / "checkpoint" / "model.json").read_text())
    for name in SETTINGS:
        assert info.get(name, info["preprocessing"].get(name)) == config[name] == metrics[f"winner/{name}"]
        assert config[name] == winner[name]
    assert config["search"] == "all"
    assert config["status"] == "finished"
    assert not list(searched.glob(".*"))


@torch.inference_mode()
def test_the_winner_is_what_its_settings_give_by_hand(searched, few):
    """Its head, its held-out predictions and those of the test split."""
    _, metrics, config = read(searched)
    assert config["head"] == "logistic", "the drawn plates are there for it to win"
    history = pd.read_csv(searched / "history.csv")
    assert history["epoch"].tolist() == [0]
    assert history["lr"].isna().all()
    assert len(pd.read_csv(searched / "history_baseline.csv")) == 4
    by_hand, dataset = ByHand(searched / "checkpoint"), merge_labelled(load_dataset(few, 0))
    samples, heat = dataset.train, metrics["winner/temperature"]
    features = by_hand.features(dataset.source, samples, by_hand.train_numbers())
    splitter = RepeatedStratifiedKFold(n_splits=2, n_repeats=1, random_state=0)
    folds = list(splitter.split(samples.labels, samples.labels))
    kept = mask_folds([np.arange(len(samples)), *(train for train, _ in folds)], len(samples))
    weight, bias = (
        value[:, 0] for value in fit_logistic(features, samples.labels, 2, kept, [metrics["winner/strength"]])
    )
    seen = features[: len(by_hand.eval_numbers())].mean(0)
    state = load_bundle(searched / "checkpoint").state
    own = seen @ state["head.weight"].T + state["head.bias"]
    assert torch.allclose(own, (seen @ weight[0].T + bias[0]) / heat, atol=2e-3)
    held_out = torch.empty(len(samples), 2)
    for fold, (_, held) in enumerate(folds, 1):
        held_out[held] = seen[held] @ weight[fold].T + bias[fold]
    labels = samples.labels.numpy()
    assert metrics["winner/log_loss"] == pytest.approx(log_loss(labels, held_out.double().softmax(1)), abs=1e-3)
    table = pd.read_csv(searched / "out_of_fold.csv")
    assert table["path"].tolist() == [sample.path for sample in samples]
    assert table["label"].tolist() == [dataset.classes[label] for label in labels]
    expected = (held_out.double() / heat).softmax(1)
    assert np.allclose(table[PREDICTED], expected, atol=1e-3)
    is_right = table[PREDICTED].to_numpy().argmax(1) == labels
    assert metrics["winner/accuracy"] == pytest.approx(is_right.mean())
    for other in (heat * 0.8, heat * 1.25):
        worse = log_loss(labels, (held_out.double() / other).softmax(1))
        assert log_loss(labels, table[PREDICTED]) < worse, "the temperature is that of the least log-loss"
    assert torch.allclose(chances_of(searched), by_hand.predict(dataset.source, dataset.test), atol=5e-4)


def test_the_checkpoint_of_a_search_predicts_what_the_search_did(searched, few, tmp_path):
    assert predict(searched / "checkpoint", tmp_path / "out", "--data", few) == 0
    assert torch.allclose(chances_of(tmp_path / "out"), chances_of(searched), atol=1e-5)


def test_a_second_search_computes_no_view_again(searched, few, tmp_path, monkeypatch):
    """Not by `train` with what has won either, but for its validation split, which has other views."""
    cache = searched.parent / "cache"
    monkeypatch.setenv("PLATES_CACHE", str(cache))
    stored = {part: part.stat().st_mtime_ns for part in cache.rglob("*.arrow")}
    assert len(stored) >= 1 + 6
    assert tune_job.main([*SEARCH, "--data", few, "--out", str(tmp_path / "again")]) == 0
    assert {part: part.stat().st_mtime_ns for part in cache.rglob("*.arrow")} == stored
    assert_same_outcome(searched, tmp_path / "again", tolerance=1e-6)


def test_two_workers_find_the_same(searched, few, tmp_path):
    run = tmp_path / "run"
    assert tune_job.main([*SEARCH, "--data", few, "--num-workers", "2", "--out", str(run)]) == 0
    assert pd.read_csv(run / "timing.csv")["rank"].tolist()[1:] == [0, 1]
    assert_same_outcome(searched, run, tolerance=1e-3)


def read_results(run: Path) -> dict[str, str]:
    """What Tune stores of finished trials, with time and process: what is computed again is other text."""
    found = {}
    for file in run.glob(".ray_tune/*/*/result.json"):
        try:
            found[file.parent.name] = file.read_text()
        except FileNotFoundError:  # the sweep has just ended
            continue
    return {name: text for name, text in found.items() if text.endswith("\n")}


def test_a_search_that_was_stopped_goes_on_and_ends_as_an_undisturbed_one(searched, few, tmp_path, own_cache):
    """SIGTERM, once some trials are finished, to a process of its own; then the same command again."""
    run, environment = tmp_path / "run", {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ray_jobs.tune", *SEARCH, "--data", few, "--out", str(run)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while len(read_results(run)) < 4:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    assert "interrupted; the same command" in (tmp_path / "log").read_text()
    assert not (run / "trials.csv").exists()
    before, stored = read_results(run), {part.name for part in own_cache.rglob("*.arrow")}
    assert 4 <= len(before) < 3 + 2 * len(SIZES) * len(CROPS)
    last, is_over = {}, threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            last.update(read_results(run))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert tune_job.main([*SEARCH, "--data", few, "--out", str(run)]) == 0
    finally:
        is_over.set()
        watcher.join()
    assert len(last) == 3 + 2 * len(SIZES) * len(CROPS)
    assert {name: last[name] for name in before} == before
    assert len({part.name for part in own_cache.rglob("*.arrow")} - stored) == 1, "of the test split alone"
    assert_same_outcome(searched, run, tolerance=1e-6)


def test_what_the_budget_does_not_allow_is_left_out_and_named(searched, few, tmp_path, capsys):
    run = tmp_path / "run"
    assert tune_job.main([*SEARCH, "--data", few, "--budget-s", "1", "--out", str(run)]) == 0
    trials, _, config = read(run)
    told = " ".join(capsys.readouterr().out.split())
    assert set(trials["head"]) == {"adam"}
    assert config["head"] == "adam"
    for size in SIZES:
        for crop in CROPS:
            note = f"{size} px, crop {crop}: left out"
            assert note in told
            assert any(line.startswith(note) for line in config["notes"])
    assert len(pd.read_csv(run / "history.csv")) == 4
    baseline = read(searched)[0].iloc[0]
    assert trials["log_loss"][0] == pytest.approx(baseline["log_loss"], abs=1e-6)
    assert predict(run / "checkpoint", tmp_path / "out", "--data", few) == 0
    assert torch.allclose(chances_of(tmp_path / "out"), chances_of(run), atol=1e-5)


def test_the_recipe_alone_is_searched_as_before_and_its_winner_is_what_train_gives(folder, tmp_path, local_ray):
    """Trained on all labelled images: those of a folder with a validation split beside them."""
    run, whole, out = tmp_path / "run", tmp_path / "whole", tmp_path / "out"
    flags = [*SEARCH, "--tta", "1", "--num-trials", "6"]
    assert tune_job.main([*flags, "--search", "recipe", "--data", str(folder), "--out", str(run)]) == 0
    trials, _, config = read(run)
    assert [*trials.columns[:5]] == ["trial", "lr", "step_size", "gamma", "log_loss"]
    assert not {"head", "readout", "image_size", "crop", "strength", "tta"} & {*trials.columns}
    assert len(trials) == 6
    assert not (run / "out_of_fold.csv").exists()
    assert (config["head"], config["search"], config["num_images"]["train"]) == ("adam", "recipe", 17)
    winner = trials[trials["is_winner"]].iloc[0]
    assert winner["log_loss"] == trials["log_loss"].min()
    assert winner["trial"] > 0, "the schedule that is trained below must not be that of the flags"
    shutil.copytree(folder, whole)
    for name in ("cleaned/0.jpg", "dirty/0.png"):
        (whole / "val" / name).parent.mkdir(parents=True)
        shutil.copy(folder / "train" / name, whole / "val" / name)
    schedule = [f"--{name.replace('_', '-')}={float(winner[name])!r}" for name in ("lr", "gamma")]
    given = [*TRAIN, "--data", whole, *schedule, "--step-size", int(winner["step_size"]), "--out", out]
    assert train_job.main([*map(str, given)]) == 0
    state, expected = (load_bundle(folder / "checkpoint").state for folder in (run, out))
    assert torch.allclose(state["head.weight"], expected["head.weight"], atol=1e-5)
    assert torch.allclose(chances_of(run), chances_of(out), atol=1e-5)
    ours, theirs = (pd.read_csv(folder / "history.csv")["train/loss"] for folder in (run, out))
    assert np.allclose(ours, theirs, atol=1e-5)
