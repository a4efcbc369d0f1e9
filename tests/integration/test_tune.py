"""The sweep on real Ray Tune: files, and a sweep killed in the middle that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pandas as pd
import pytest

from ray_jobs import tune as tune_job

SMALL = [
    "--data", "synthetic:24", "--backbone", "resnet18", "--weights", "none", "--image-size", "32", "--epochs", "4",
    "--folds", "3", "--cv-repeats", "2", "--num-views", "2",
]  # fmt: skip


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
    assert {path.name for path in (run / "checkpoint").iterdir()} == {"model.safetensors", "model.json"}
    page = (run / "report.html").read_text()
    assert f"{metrics['nested/log_loss']:.4f}" in page
    assert "not distinguishable" in page
    assert not (run / ".ray_tune").exists()


def test_a_sweep_cut_off_while_predicting_keeps_its_trials_unless_labels_changed(
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
        broken.setattr("plates.predict.predict", cut_off)
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


@pytest.mark.slow
def test_a_trial_that_trains_the_trunk_is_a_run_of_its_own_on_all_cpus(tmp_path, local_ray):
    """Its one worker takes both CPUs: it must not wait for one that the trial's own process holds."""
    run = tmp_path / "run"
    flags = [*SMALL, "--data", "synthetic:12", "--trainable", "layer4", "--epochs", "1", "--cv-repeats", "1"]
    assert tune_job.main([*flags, "--folds", "2", "--num-trials", "1", "--num-workers", "1", "--out", str(run)]) == 0
    trials = pd.read_csv(run / "trials.csv")
    assert trials["num_folds"].tolist() == [2]
    assert not list(run.glob(".*"))
    assert list((run / "tensorboard").glob("*/events.out.tfevents*"))
    assert len(pd.read_csv(run / "predictions.csv")) == 12
    assert "nested cross-validation was not run" in (run / "report.html").read_text()
