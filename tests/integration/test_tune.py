"""The sweep on real Ray Tune: files, and a sweep killed in the middle that goes on."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray

from ray_jobs import tune as tune_job

SMALL = [
    "--data", "synthetic:24", "--backbone", "resnet18", "--weights", "none", "--image-size", "32", "--epochs", "4",
    "--folds", "3", "--cv-repeats", "2", "--num-views", "2", "--search", "recipe",
]  # fmt: skip
TRUNK = [*SMALL, "--trainable", "layer4", "--folds", "2"]
FOUR = [*TRUNK, "--epochs", "3", "--num-trials", "4", "--seed", "1", "--lr", "1e-5"]


def test_a_sweep_writes_all_its_files(tmp_path, local_ray, capsys):
    run = tmp_path / "run"
    assert tune_job.main([*SMALL, "--num-trials", "5", "--out", str(run)]) == 0
    trials = pd.read_csv(run / "trials.csv")
    assert trials["trial"].tolist() == list(range(5))
    assert trials["is_winner"].sum() == 1
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["winner/log_loss"] == pytest.approx(trials["log_loss"].min())
    assert metrics["baseline/lr"] == 1e-3
    assert len(pd.read_csv(run / "predictions.csv")) == 24
    written = {path.name for path in (run / "checkpoint").iterdir()}
    assert written == {"model.safetensors", "model.json", "reference.safetensors", "README.md"}
    page = (run / "report.html").read_text()
    assert f"{metrics['nested/log_loss']:.4f}" in page
    assert "not distinguishable" in page
    assert not (run / ".ray_tune").exists()


def test_a_sweep_cut_off_after_its_trials_keeps_its_trials_unless_labels_changed(
    tmp_path, folder, monkeypatch, local_ray
):
    """Its baseline diverges, too: that is stored, resumed and shown as infinitely bad."""
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    flags = [*SMALL, "--data", str(folder), "--num-trials", "4", "--lr", "3e38", "--out"]

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    def stored() -> dict[str, Any]:  # with time and process, so that what is computed again is other text
        texts = {str(file): file.read_text() for file in run.glob(".ray_tune/*/*/result.json")}
        return texts | {"figures": json.loads((run / "checkpoint" / "model.json").read_text())["metrics"]}

    with monkeypatch.context() as broken:
        broken.setattr("plates.job.tabulate_predictions", cut_off)
        assert tune_job.main([*flags, str(run)]) == 1
        before = stored()
        assert len(before) == 4 + 1
        assert tune_job.main([*flags, str(run)]) == 1
    assert stored() == before
    for name in ("cleaned/1.jpg", "cleaned/3.jpg", "cleaned/5.jpg", "dirty/0.png", "dirty/2.png", "dirty/4.png"):
        here, there = folder / "train" / name, ("cleaned", "dirty")[name.startswith("cleaned")]
        here.rename(folder / "train" / there / f"moved-{here.name}")
    assert tune_job.main([*flags, str(run)]) == 0
    assert tune_job.main([*flags, str(fresh)]) == 0
    trials = pd.read_csv(run / "trials.csv")
    pd.testing.assert_frame_equal(trials, pd.read_csv(fresh / "trials.csv"), atol=1e-6)
    assert trials["log_loss"].tolist()[0] == float("inf")
    assert not trials["is_winner"].tolist()[0]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["baseline/lr"] == 3e38
    assert metrics["baseline/log_loss"] is None
    assert "diverged" in (run / "report.html").read_text()
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("search", ["recipe", "all"])
@pytest.mark.parametrize("are_damaged", [False, True])
def test_a_sweep_without_images_to_predict_ends_well(are_damaged, search, folder, tmp_path, local_ray):
    for path in (folder / "test").iterdir():
        path.write_bytes(b"no image") if are_damaged else path.unlink()
    flags = ["--data", str(folder), "--num-trials", "2", "--folds", "2", "--cv-repeats", "1", "--search", search]
    ended = tune_job.main([*SMALL, *flags, "--out", str(tmp_path / "run")])
    assert ended == (3 if are_damaged else 0)
    assert pd.read_csv(tmp_path / "run" / "predictions.csv").empty


def test_too_many_folds_are_one_line(tmp_path, capsys):
    assert tune_job.main([*SMALL, "--folds", "12", "--out", str(tmp_path / "run")]) == 2
    assert "--folds 12: the smallest class has 12 images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    """In processes of their own: killed once some trials are finished, then the same command again."""
    environment = {**os.environ, "PLATES_CACHE": str(tmp_path / "cache")}
    flags = [*SMALL, "--epochs", "100", "--num-trials", "60"]
    command = [sys.executable, "-m", "ray_jobs.tune", *flags, "--out"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = subprocess.Popen([*command, str(run)], env=environment, stderr=subprocess.PIPE, start_new_session=True)
    deadline_s = time.monotonic() + 120
    while len(list(run.glob(".ray_tune/*/*/result.json"))) < 10:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "trials.csv").exists()
    resumed = subprocess.run([*command, str(run)], env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    undisturbed = subprocess.run([*command, str(whole)], env=environment, capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    pd.testing.assert_frame_equal(pd.read_csv(run / "trials.csv"), pd.read_csv(whole / "trials.csv"), atol=1e-6)


def watch(run: Path, is_over: threading.Event) -> set[frozenset[tuple[str, str]]]:
    """Which (trial, fold) were at work at the same time: a fold has its Ray Train folder that long."""
    seen = set()
    while not is_over.wait(0.1):
        folders = [folder.parent for folder in run.glob(".ray_tune/*/folds/*/*/.ray_train")]
        seen.add(frozenset((folder.parent.name, folder.name) for folder in folders))
    return seen


@contextmanager
def watching(run: Path) -> Iterator[Future]:
    is_over = threading.Event()
    with ThreadPoolExecutor() as pool:
        try:
            yield pool.submit(watch, run, is_over)
        finally:
            is_over.set()


@pytest.fixture
def ray_of_four_cpus() -> Iterator[None]:
    """More CPUs than the machine may have: room for two trials of two."""
    ray.shutdown()
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(address="local", num_cpus=4, object_store_memory=200_000_000, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def test_trials_that_train_the_trunk_run_side_by_side_on_all_cpus(tmp_path, ray_of_four_cpus, capsys):
    """The workers of two trials take all CPUs: they must not wait for one that a trial's own process holds."""
    run = tmp_path / "run"
    flags = [*TRUNK, "--data", "synthetic:12", "--epochs", "1", "--cv-repeats", "1", "--num-trials", "2"]
    flags += ["--log-to", "tensorboard"]
    with watching(run) as watched:
        assert tune_job.main([*flags, "--out", str(run)]) == 0
    assert max(len({trial for trial, _ in at_work}) for at_work in watched.result()) == 2
    trials = pd.read_csv(run / "trials.csv")
    assert trials["num_folds"].tolist() == [2, 2]
    assert not list(run.glob(".*"))
    assert list((run / "tensorboard").glob("*/events.out.tfevents*")), "of each trial"
    assert list((run / "tensorboard").glob("events.out.tfevents*")), "of the winner"
    assert len(pd.read_csv(run / "predictions.csv")) == 12
    told = capsys.readouterr().out
    assert "2 trials at a time, each on 1 Ray worker of 2 CPUs" in told
    assert "there is no nested estimate" in " ".join(told.split())
    assert "there is no nested estimate" in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_poor_ones_of_four_trials_side_by_side_are_stopped_early(tmp_path, ray_of_four_cpus):
    """Trial 2 learns twenty times as fast as the others and diverges, so that whichever came before is better."""
    run = tmp_path / "run"
    with watching(run) as watched:
        assert tune_job.main([*FOUR, "--out", str(run)]) == 0
    assert max(len({trial for trial, _ in at_work}) for at_work in watched.result()) == 2
    trials = pd.read_csv(run / "trials.csv")
    is_stopped = trials["num_folds"] < 4
    assert set(trials["num_folds"]) == {2, 4}
    assert is_stopped[2]
    assert not is_stopped[trials["is_winner"]].any()
    assert not is_stopped[trials[["fold_0", "fold_1"]].mean(axis=1).argmin()], "ASHA keeps the best of each rung"
    page = (run / "report.html").read_text()
    assert f"{is_stopped.sum()} of which were stopped early" in page
    assert page.count("stopped after 2 folds") == is_stopped.sum()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_sweep_of_the_trunk_ends_as_an_undisturbed_one_and_trains_no_fold_twice(tmp_path):
    """One trial at a time, so that ASHA's choice does not hang on which came first. Killed in the third trial, which
    ASHA must compare with the two that ended before."""
    environment = {**os.environ, "PLATES_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "ray_jobs.tune", *FOUR, "--cpus-per-worker", "2", "--out"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, str(run)], env=environment, stderr=log, start_new_session=True)
        while not list(run.glob(".ray_tune/*/folds/2/0.json")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = {(file.parent.name, file.stem) for file in run.glob(".ray_tune/*/folds/*/*.json")}
    with watching(run) as watched:
        resumed = subprocess.run([*command, str(run)], env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    trained = frozenset().union(*watched.result())
    assert ("3", "0") in trained
    assert not trained & finished
    undisturbed = subprocess.run([*command, str(whole)], env=environment, capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    trials = pd.read_csv(whole / "trials.csv")
    pd.testing.assert_frame_equal(pd.read_csv(run / "trials.csv"), trials, atol=1e-4)
    scores = trials[["fold_0", "fold_1"]].mean(axis=1)
    expected = [4] + [2 if scores[i] > scores[:i].median() else 4 for i in (1, 2, 3)]
    assert trials["num_folds"].tolist() == expected
    assert expected[2] == 2, "a trial that would pass had ASHA forgotten the first two"
