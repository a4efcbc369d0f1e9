"""A run that is cut off goes on from what it stored, and ends as if nothing had happened."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_train import CONFIG, train_on

from plates import features
from plates.dataset import FolderSource, load_dataset
from plates.train_loop import resume
from ray_jobs import train


class CutOffError(Exception):
    """Stands for the end of the process."""


def cut_off_after(num_reads: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets that many images be read and fails at the next; the list names the images read."""
    read, paths = FolderSource.read, []

    def count(self: FolderSource, path: str) -> torch.Tensor:
        paths.append(path)
        if len(paths) > num_reads:
            raise CutOffError
        return read(self, path)

    monkeypatch.setattr(FolderSource, "read", count)
    return paths


def test_features_of_a_run_cut_off_are_not_computed_again(folder, tmp_path, monkeypatch):
    config = replace(CONFIG, data=str(folder))
    whole = train_on(0, config, tmp_path / "a")
    monkeypatch.setenv("PLATES_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("plates.parts.SECONDS_PER_PART", 0.0)
    monkeypatch.setattr(features, "VIEWS_PER_FORWARD", 2)
    with monkeypatch.context() as broken:
        cut_off_after(12, broken)
        with pytest.raises(CutOffError):
            train_on(0, config, tmp_path / "b")
    (parts,) = (tmp_path / "other" / "features").glob("*.parts")
    num_stored = len(list(parts.glob("*.parquet")))
    assert num_stored >= 5
    next(parts.glob("*.parquet")).write_bytes(b"half a file")  # a damaged part is computed again
    paths = cut_off_after(1000, monkeypatch)
    again = train_on(0, config, tmp_path / "b")
    dataset = load_dataset(config.data, config.seed)
    assert len(paths) == len(dataset.train) + len(dataset.val) - (num_stored - 1)
    assert torch.allclose(again.val_logits, whole.val_logits, atol=1e-4)
    assert again.has_reused_features
    assert not list((tmp_path / "other" / "features").glob("*.parts"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_end_to_end_training_goes_on_from_its_last_epoch(num_workers, folder, tmp_path, monkeypatch, local_ray):
    config = replace(CONFIG, data=str(folder), trainable="layer4", epochs=4)
    whole = train_on(0, config, tmp_path / "a")
    monkeypatch.setattr(resume, "SECONDS_PER_STATE", 0.0)
    steps, step = [], torch.optim.lr_scheduler.StepLR.step

    def fail_in_third(self: torch.optim.lr_scheduler.StepLR, *arguments: object) -> None:
        steps.append(1)
        if len(steps) == 4:  # the schedule's first step is its construction
            raise CutOffError
        step(self, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(torch.optim.lr_scheduler.StepLR, "step", fail_in_third)
        with pytest.raises(CutOffError):
            train_on(0, config, tmp_path / "b")
    again = train_on(num_workers, config, tmp_path / "b")
    assert [row["epoch"] for row in again.history] == [0, 1, 2, 3]
    assert torch.allclose(again.val_logits, whole.val_logits, atol=1e-4)
    assert again.history[-1]["lr"] == pytest.approx(whole.history[-1]["lr"])
    changed = train_on(0, replace(config, lr=2e-3), tmp_path / "b")  # the state of other settings is left alone
    assert changed.history[0]["lr"] == 2e-3


def start(out, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ray_jobs.train", "--out", str(out), "--num-workers", "0", "--epochs", "40"]
    command += ["--data", "synthetic:24", "--backbone", "resnet18", "--weights", "none", "--image-size", "96", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(path, process) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


def test_a_stopped_run_goes_on_and_a_second_one_beside_it_is_refused(tmp_path):
    out, long = tmp_path / "run", ["--epochs", "250"]  # the first is still at work when the second has started
    first = start(out, *long)
    wait_for(out / "config.json", first)
    second = start(out, *long)
    assert second.wait(60) == 2
    assert "is at work in it" in second.stderr.read()
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 1
    assert "goes on" in said
    assert "Traceback" not in said
    assert json.loads((out / "config.json").read_text())["status"] == "unfinished"
    third = start(out, *long)
    third.communicate(timeout=200)
    assert third.returncode == 0
    assert len(pd.read_csv(out / "predictions.csv")) == 24
    assert not list(out.glob(".*"))


def test_a_full_disk_is_one_message(tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "features"))

    monkeypatch.setattr("plates.train_loop.frozen.save_features", fail)
    flags = ["--data", "synthetic:8", "--backbone", "resnet18", "--weights", "none", "--image-size", "32"]
    assert train.main([*flags, "--epochs", "1", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("plates train: No space left on device")
