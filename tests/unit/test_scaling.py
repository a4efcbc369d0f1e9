import json
import subprocess
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

from plates import published, scaling
from plates.config import BenchmarkConfig, UserError
from plates.dataset import load_dataset
from plates.published import leave_out_unreadable
from plates.report.benchmark import say_model, tabulate_benchmark
from plates.scaling import Row, extrapolate, fit_model, flags_of, plan_rows, summarize


def measure(num_workers: int, train_s: float, rate: float, startup_s: float = 10.0) -> dict:
    row = Row("plates", "cpu", num_workers)
    return {
        "row": row.name, "kind": "plates", "device": "cpu", "num_workers": num_workers, "device_name": "test",
        "num_nodes": 1, "threads_per_worker": 1, "precision": "fp32", "global_batch_size": 8, "startup_s": startup_s,
        "data_s": 0.0, "train_s": train_s, "inference_s": 1.0, "teardown_s": 0.5,
        "total_s": startup_s + train_s + 1.5, "train_images_per_sec": rate, "inference_images_per_sec": 5.0,
        "val/loss": 0.5, "val/accuracy": 0.75, "device_seconds": 1.0, "is_extrapolated": False,
    }  # fmt: skip


def test_rows_are_the_published_loop_and_each_device_by_its_counts():
    names = [row.name for row in plan_rows(BenchmarkConfig(), num_cpus=6, num_gpus=0)]
    assert names == [
        "published loop, cpu", "one process, cpu", "1 Ray worker, cpu", "2 Ray workers, cpu", "4 Ray workers, cpu"
    ]  # fmt: skip
    rows = plan_rows(BenchmarkConfig(devices=("cpu", "cuda"), worker_counts=(2,)), num_cpus=2, num_gpus=0)
    assert [(row.device, row.num_workers) for row in rows[1:]] == [("cpu", 0), ("cpu", 2), ("cuda", 0), ("cuda", 2)]


def test_weak_scaling_grows_the_work_and_needs_drawn_plates():
    config = BenchmarkConfig(data="synthetic:50", scaling="weak", num_views=2)
    assert "synthetic:200" in flags_of(config, 4)
    assert "synthetic:50" in flags_of(config, 0)
    assert flags_of(BenchmarkConfig(num_views=2), 4).count("--num-views") == 1
    with pytest.raises(UserError, match="--scaling weak: needs --data synthetic:N"):
        BenchmarkConfig(data="photos", scaling="weak")


def test_weak_scaling_has_its_own_efficiency_and_no_fit_of_strong_scaling():
    """The work grows with the workers, and so do the seconds a little: T(1)/T(N)."""
    repeats = pd.DataFrame([measure(n, 10.0 + n, 100.0 * n / (10.0 + n)) for n in (0, 1, 2, 4, 8)])
    entries = summarize(repeats, "weak")
    assert [entry.get("efficiency") for entry in entries[1:]] == pytest.approx([1, 11 / 12, 11 / 14, 11 / 18])
    assert ["total_speedup" in entry for entry in entries] == [True, True, False, False, False]
    model = fit_model(entries, "weak")
    assert "T(1) / T(N)" in say_model(model)
    assert "parallel_s" not in model
    assert "parallel_s" in fit_model(summarize(repeats))
    assert len({len(cells) for cells in tabulate_benchmark({"rows": entries})}) == 1


def test_unreadable_images_are_skipped_in_every_row(folder):
    assert flags_of(BenchmarkConfig(skip_unreadable=True), 2).count("--skip-unreadable") == 1
    assert "--skip-unreadable" not in flags_of(BenchmarkConfig(), 2)
    for path in ("train/cleaned/1.jpg", "test/3.jpg"):
        (folder / path).write_bytes(b"no picture")
    dataset = load_dataset(str(folder), seed=0)
    left = leave_out_unreadable(dataset)
    assert len(left.train) == len(dataset.train) - 1
    assert len(left.test) == len(dataset.test) - 1
    assert len(left.val) == len(dataset.val)


def test_the_published_loop_takes_the_cpus_of_its_container(monkeypatch, capsys):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    settings = {"data": "synthetic:4", "backbone": "resnet18", "weights": "none", "trainable": "head", "seed": 0}
    settings |= {"image_size": 32, "device": "cpu", "num_epochs": 1, "skip_unreadable": False}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        published.main([json.dumps(settings)])
    finally:
        torch.set_num_threads(before)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_threads"] == 1


def test_a_row_runs_and_keeps_the_text_of_its_predictions(tmp_path, monkeypatch):
    """The training process is stood for by one that writes odd ids and class names."""
    text = "path,id,label,p_01,p_NA\ntest/0001.jpg,0001,01,0.9,0.1\ntest/NA.jpg,NA,NA,0.1,0.90\n"

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "predictions.csv").write_text(text)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(scaling, "read_run", lambda run, wall_s: {})
    scaling.measure_row(Row("plates", "cpu", 0), BenchmarkConfig(), 1, tmp_path)
    assert (tmp_path / "predictions.csv").read_text() == text


def test_a_diverged_row_has_no_accuracy_and_a_place_in_the_table():
    rows = [measure(1, 10.0, 10.0) | {"val/loss": None, "val/accuracy": None}]
    (entry,) = summarize(pd.DataFrame(rows))
    assert entry["val/loss"] is None
    assert tabulate_benchmark({"rows": [entry]})[0][-2] == "–"


def test_repeats_become_min_median_max_and_ratios():
    repeats = [measure(1, s, 100 / s) for s in (20.0, 10.0, 40.0)] + [
        measure(2, s, 100 / s) for s in (12.5, 12.5, 10.0)
    ]
    one, two = summarize(pd.DataFrame(repeats))
    assert one["train_s"] == {"min": 10.0, "median": 20.0, "max": 40.0}
    assert two["scaling"] == pytest.approx(8 / 5)
    assert two["efficiency"] == pytest.approx(0.8)
    assert two["total_speedup"] == pytest.approx(31.5 / 24.0)
    assert two["train_images_per_sec_per_worker"] == pytest.approx(4)


def test_what_cannot_run_is_a_row_that_says_why():
    failed = {"row": "4 Ray workers, cuda", "kind": "plates", "device": "cuda", "num_workers": 4, "reason": "no GPU"}
    entries = summarize(pd.DataFrame([measure(1, 10.0, 10.0), failed]))
    assert entries[1]["reason"] == "no GPU"
    cells = tabulate_benchmark({"rows": entries})
    assert len(cells[0]) == len(cells[1])
    assert cells[1][0] == "4 Ray workers, cuda"


def test_the_model_finds_the_parts_it_was_made_of():
    repeats = [measure(n, 8.0 + 64.0 / n, 1.0) for n in (1, 2, 4, 8)]
    model = fit_model(summarize(pd.DataFrame(repeats)))
    assert model["serial_s"] == pytest.approx(9.5)  # with inference and teardown
    assert model["parallel_s"] == pytest.approx(64.0)
    assert np.abs(model["residuals_s"]).max() < 1e-6
    assert model["predicted_total_s"]["16"] == pytest.approx(10 + 9.5 + 4)
    # 8 to 16 workers save 4 of 27.5 s, 16 to 32 save 2 of 23.5 s
    assert model["workers_past_which_doubling_saves_under_10_percent"] == 16
    assert "not a measurement" in say_model(model)


def test_too_few_counts_are_not_fitted():
    model = fit_model(summarize(pd.DataFrame([measure(n, 10.0, 1.0) for n in (1, 2, 4)])))
    assert "3 worker counts measured" in say_model(model)


def test_the_published_loop_is_marked_as_extrapolated():
    measured = {
        "train_s": 6.0, "inference_s": 4.0, "num_epochs": 3, "num_train": 30, "num_test": 8, "num_threads": 2,
        "device_name": "test",
    }  # fmt: skip
    row = extrapolate(measured, BenchmarkConfig(epochs=100), wall_s=15.0)
    assert row["is_extrapolated"]
    assert row["train_s"] == pytest.approx(200.0)
    assert row["total_s"] == pytest.approx(5 + 200 + 4)
    assert row["train_images_per_sec"] == pytest.approx(15.0)
