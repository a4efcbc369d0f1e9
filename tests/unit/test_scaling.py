import numpy as np
import pandas as pd
import pytest

from plates.config import BenchmarkConfig, UserError
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
