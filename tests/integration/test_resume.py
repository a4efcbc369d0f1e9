"""A run that is cut off goes on from what it stored, and ends as if nothing had happened."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, write_picture
from safetensors.torch import save_file
from test_train import CONFIG, train_on

from plates.config import TrainConfig
from plates.dataset import load_dataset
from plates.rundir import STATE_FILE, find_run, write_atomically
from plates.sources import FolderSource
from plates.train_loop import resume
from plates.weights import resolve_weights
from ray_jobs import train as train_job


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
    monkeypatch.setattr("plates.store.SECONDS_PER_PART", 0.0)
    monkeypatch.setattr("plates.device.CPU_BATCH_SIZE", 2)
    with monkeypatch.context() as broken:
        cut_off_after(12, broken)
        with pytest.raises(CutOffError):
            train_on(0, config, tmp_path / "b")
    stored = sorted((tmp_path / "other" / "features").rglob("*.arrow"))  # of each view of an image
    assert len(stored) >= 10
    stored[0].write_bytes(b"half a file")  # a damaged part is computed again
    paths = cut_off_after(1000, monkeypatch)
    again = train_on(0, config, tmp_path / "b")
    dataset = load_dataset(config.data, config.seed)
    # Those to train on for their views and as they are; those to predict are looked at, too, and not counted here.
    num_images = 2 * len(dataset.train) + len(dataset.val)
    num_whole = (len(stored) - 1) // 2  # two views an image
    assert num_images - num_whole - 1 <= len(paths) <= num_images - num_whole
    assert torch.allclose(again.val_logits, whole.val_logits, atol=1e-4)
    assert torch.allclose(again.predicted.logits, whole.predicted.logits, atol=1e-4)
    assert again.has_reused_features


@pytest.mark.parametrize(
    ("num_workers", "trainable", "precision"),
    [(0, "layer4", "fp32"), (0, "layer4", "bf16"), (0, "layer4", "fp16"), (0, "all", "bf16"), (2, "layer4", "bf16")],
)
def test_end_to_end_training_goes_on_from_its_last_epoch(
    num_workers, trainable, precision, folder, tmp_path, monkeypatch, local_ray
):
    config = replace(CONFIG, data=str(folder), trainable=trainable, precision=precision, lr=1e-4, epochs=4)
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
    tolerance = 0.02 if num_workers and precision == "bf16" else 1e-4  # sums of 8 bits in another order
    assert torch.allclose(again.val_logits, whole.val_logits, atol=tolerance)
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


def test_a_run_without_out_is_resumed_as_its_message_says(tmp_path):
    """The directory that it was given is named."""
    command = [sys.executable, "-m", "ray_jobs.train", "--data", "synthetic:24", "--num-workers", "0", "--epochs"]
    command += ["300", "--backbone", "resnet18", "--weights", "none", "--image-size", "96"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("runs/*/config.json")) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    message = first.communicate(timeout=60)[1].strip().splitlines()[-1]
    (run,) = (tmp_path / "runs").iterdir()
    out = message.removeprefix("plates train: interrupted; the same command with --out ").removesuffix(" goes on")
    assert tmp_path / out == run
    config = TrainConfig(data="synthetic:24", num_workers=0, epochs=300, backbone="resnet18", weights="none",
                         image_size=96, out=out)  # fmt: skip
    assert find_run(str(run), "train", config) == run


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
    assert f"plates train: interrupted; the same command with --out {out} goes on" in said
    assert "Traceback" not in said
    assert json.loads((out / "config.json").read_text())["status"] == "unfinished"
    third = start(out, *long)
    third.communicate(timeout=200)
    assert third.returncode == 0
    assert len(pd.read_csv(out / "predictions.csv")) == 24
    assert not list(out.glob(".*"))


LIMITED = """
import resource, sys
from ray_jobs import train
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("limit", "name"), [(12_000, ".arrow"), (1_000_000, "model.safetensors")])
def test_no_room_for_a_file_is_one_message(limit, name, tmp_path):
    """The system's limit of a file's size, which anyone can set, in the place of a full disk."""
    flags = ["--data", "synthetic:8", "--backbone", "resnet18", "--weights", "none", "--image-size", "32"]
    command = [sys.executable, "-c", LIMITED, str(limit), *flags, "--epochs", "1", "--num-workers", "0"]
    ended = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    message = ended.stderr.strip().splitlines()[-1]
    assert message.startswith("plates train: File too large: ")
    assert f"{name}; make room" in message
    assert message.endswith(f"the same command with --out {tmp_path / 'run'} goes on")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real disk of 1 MiB, where the system lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a Ray worker may still map a file of it


def test_a_full_disk_names_the_file(small_disk):
    state = {"weight": torch.zeros(1 << 20)}
    for name, write in {
        "a.safetensors": lambda file: save_file(state, file),
        "a.csv": lambda file: pd.DataFrame({"a": range(1_000_000)}).to_csv(file),
        "a.parquet": lambda file: pd.DataFrame({"a": torch.randn(1_000_000).numpy()}).to_parquet(file),
    }.items():
        with pytest.raises(OSError, match=rf"No space left on device: '.*/{name}'") as raised:
            write_atomically(small_disk / name, write)
        assert raised.value.errno == errno.ENOSPC
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize(
    ("on_ray", "trainable", "place", "name"),
    [(0, "head", "out", "model.safetensors"), (0, "layer4", "out", STATE_FILE),
     pytest.param(1, "layer4", "out", STATE_FILE, marks=pytest.mark.slow),
     (0, "head", "cache", ".arrow"), (1, "head", "cache", ".arrow")],
)  # fmt: skip
def test_a_run_on_a_full_disk_is_one_message_and_goes_on_with_room(
    on_ray, trainable, place, name, small_disk, tmp_path, monkeypatch, local_ray, capfd
):
    """In the run directory or in the cache, here or on a worker."""
    run = small_disk / "run" if place == "out" else tmp_path / "run"
    if place == "cache":
        monkeypatch.setenv("PLATES_CACHE", str(small_disk))
    flags = ["--data", "synthetic:12", "--backbone", "resnet18", "--weights", "none", "--image-size", "32"]
    flags += ["--num-workers", str(on_ray), "--trainable", trainable, "--epochs", "60", "--out", str(run)]
    assert train_job.main(flags) == 1
    message = (
        rf"plates train: No space left on device: \S*{name}; make room; the same command with --out {run} goes on"
    )
    assert len(re.findall(message, capfd.readouterr().err)) == 1
    subprocess.run(["mount", "-o", "remount,size=300m", str(small_disk)], check=True)
    assert train_job.main(flags) == 0
    assert len(pd.read_csv(run / "predictions.csv")) == 12


def test_a_stored_state_is_taken_up_by_what_it_follows_from_and_by_nothing_else(folder, tmp_path, monkeypatch):
    """Another spelling of the same places is the same run; other contents of the same weights file are not."""
    monkeypatch.setattr(resume, "SECONDS_PER_STATE", 0.0)
    weights = tmp_path / "trunk.safetensors"
    save_file(resolve_weights("resnet18", "none", 0).state, weights)
    config = replace(CONFIG, data=str(folder), trainable="layer4", weights=str(weights), out=str(tmp_path / "run"))
    first = train_on(0, config, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    spelled = replace(config, data="data", weights="./trunk.safetensors", out="run", skip_unreadable=True)
    again = train_on(0, spelled, tmp_path / "run")
    assert again.timings[0]["train_images_per_sec"] is None  # all epochs were found
    assert torch.equal(again.val_logits, first.val_logits)
    other = resolve_weights("resnet18", "none", 1).state
    for change in (lambda: save_file(other, weights), lambda: write_picture(folder / "train/cleaned/1.jpg", 77)):
        change()
        changed, fresh = train_on(0, config, tmp_path / "run"), train_on(0, config, tmp_path / "fresh")
        assert changed.timings[0]["train_images_per_sec"]
        assert torch.equal(changed.val_logits, fresh.val_logits)
