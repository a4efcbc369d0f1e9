import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

from plates import scaling
from plates.cluster import Node, share_cpus
from plates.config import BenchmarkConfig, UserError
from plates.dataset import load_dataset
from plates.published import leave_out_unreadable, main
from plates.report.benchmark import say_model, show_benchmark, tabulate_rates, tabulate_seconds
from plates.rundir import write_json
from plates.scaling import Row, command_of, extrapolate, fit_model, flags_of, plan_rows, share_threads, summarize


def measure(num_workers: int, train_s: float, rate: float, startup_s: float = 10.0) -> dict:
    row = Row("plates", "cpu", num_workers)
    return {
        "row": row.name, "kind": "plates", "device": "cpu", "num_workers": num_workers, "device_name": "test",
        "num_nodes": 1, "threads_per_worker": 1, "precision": "fp32", "global_batch_size": 8, "startup_s": startup_s,
        "data_s": 0.0, "train_s": train_s, "inference_s": 1.0, "teardown_s": 0.5,
        "total_s": startup_s + train_s + 1.5, "train_images_per_sec": rate, "inference_images_per_sec": 5.0,
        "val/loss": 0.5, "val/accuracy": 0.75, "device_seconds": 1.0, "is_extrapolated": False, "num_epochs": 100,
        "startup_process_s": 5.0, "startup_group_s": 4.0, "steady_images_per_sec": 20.0,
    }  # fmt: skip


def published(num_epochs: int, train_s: float, accuracy: float) -> dict:
    """What the published loop prints."""
    return {
        "startup_s": 4.0, "train_s": train_s, "inference_s": 4.0, "num_epochs": num_epochs, "num_train": 30,
        "num_test": 8, "num_threads": 2, "device_name": "test", "steady_images_per_sec": None, "val/loss": 0.6,
        "val/accuracy": accuracy,
    }  # fmt: skip


def repeat_published(*measured: dict) -> dict:
    """Its entry of the benchmark's table, each process having taken 9 s more than training."""
    row = {"row": "published loop, cpu", "kind": "published", "device": "cpu", "num_workers": 0}
    rows = [row | extrapolate(found, BenchmarkConfig(epochs=100), found["train_s"] + 9.0) for found in measured]
    return summarize(pd.DataFrame([*rows, measure(1, 10.0, 10.0)]))[0]


def threads_of(rows: list[Row], nodes: Sequence[Node]) -> dict[str, int]:
    return share_threads(rows, lambda count, device: share_cpus(count, device, [*nodes]))


def test_rows_are_by_device_the_published_loop_and_its_counts():
    names = [row.name for row in plan_rows(BenchmarkConfig(), num_cpus=6, num_gpus=0)]
    assert names == [
        "published loop, cpu", "one process, all cores, cpu", "1 Ray worker, cpu", "2 Ray workers, cpu",
        "4 Ray workers, cpu",
    ]  # fmt: skip
    rows = plan_rows(BenchmarkConfig(devices=("cpu", "cuda"), worker_counts=(2,)), num_cpus=2, num_gpus=0)
    assert [(row.kind, row.device, row.num_workers) for row in rows] == [
        (kind, device, count)
        for device in ("cpu", "cuda")
        for kind, count in (("published", 0), ("plates", 0), ("plates", 2))
    ]


def test_of_four_gpus_each_worker_has_a_quarter_of_the_cpus_in_every_row():
    rows = plan_rows(BenchmarkConfig(), num_cpus=16, num_gpus=4)
    assert [row.num_workers for row in rows if row.device == "cpu"] == [0, 0, 1, 2, 4, 8, 16]
    assert [row.num_workers for row in rows if row.device == "cuda"] == [0, 0, 1, 2, 4]
    threads = threads_of(rows, [Node(num_cpus=16, num_gpus=4)])
    assert threads == {"cpu": 1, "cuda": 4}
    for row in rows:
        command = command_of(row, BenchmarkConfig(), threads[row.device], Path("run"))
        told = [command[place + 1] for place, flag in enumerate(command) if flag == "--cpus-per-worker"]
        assert told == ([str(threads[row.device])] if row.num_workers else []), row
        if row.kind == "plates":
            assert command[command.index("--device") + 1] == row.device


def test_threads_are_those_that_the_nodes_with_gpus_have_room_for():
    rows = plan_rows(BenchmarkConfig(), num_cpus=24, num_gpus=4)
    assert threads_of(rows, [Node(16, 0), Node(8, 4)])["cuda"] == 2, "not 24 / 4: the head node has no GPU"
    too_many = plan_rows(BenchmarkConfig(worker_counts=(1, 2, 8)), num_cpus=8, num_gpus=4)
    assert threads_of(too_many, [Node(8, 4)]) == {"cpu": 1, "cuda": 4}, "8 workers on 4 GPUs will not run"
    assert threads_of(plan_rows(BenchmarkConfig(devices=("cuda",)), 8, 0), [Node(8, 0)]) == {"cuda": 1}


def test_weak_scaling_keeps_the_images_of_a_worker_and_step_and_needs_drawn_plates():
    config = BenchmarkConfig(data="synthetic:50", scaling="weak", num_views=2, lr=2e-3)
    for num_workers, growth in ((0, 1), (1, 1), (4, 4)):
        words = flags_of(config, num_workers)
        flags = dict(zip(words[::2], words[1::2], strict=True))
        assert flags["--data"] == f"synthetic:{50 * growth}"
        assert flags["--global-batch-size"] == str(8 * growth)
        assert float(flags["--lr"]) == pytest.approx(2e-3 * math.sqrt(growth))
    assert "synthetic:160" in flags_of(BenchmarkConfig(scaling="weak"), 4), "of 40 by default"
    assert "synthetic:100:hard" in flags_of(BenchmarkConfig(data="synthetic:50:hard", scaling="weak"), 2)
    strong = flags_of(BenchmarkConfig(data="synthetic:50"), 4)
    assert [strong[strong.index(flag) + 1] for flag in ("--data", "--global-batch-size", "--lr")] == [
        "synthetic:50", "8", "0.001",
    ]  # fmt: skip
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


def test_unreadable_images_are_skipped_in_every_row(folder):
    assert flags_of(BenchmarkConfig(skip_unreadable=True), 2).count("--skip-unreadable") == 1
    assert "--skip-unreadable" not in flags_of(BenchmarkConfig(), 2)
    for path in ("train/cleaned/1.jpg", "test/3.jpg"):
        (folder / path).write_bytes(b"no picture")
    dataset = load_dataset(str(folder), seed=0)
    left, num_unreadable = leave_out_unreadable(dataset)
    assert num_unreadable == 2
    assert len(left.train) == len(dataset.train) - 1
    assert len(left.test) == len(dataset.test) - 1
    assert len(left.val) == len(dataset.val)


def test_the_published_loop_takes_the_cpus_of_its_container(monkeypatch, capsys):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    settings = {"data": "synthetic:4", "backbone": "resnet18", "weights": "none", "trainable": "head", "seed": 0}
    settings |= {"image_size": 32, "device": "cpu", "num_epochs": 1, "skip_unreadable": False, "limit_s": 0}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        main([json.dumps(settings)])
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
    assert tabulate_rates([entry])[1][-1] == "–"


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
    for header, ran, did_not in (tabulate_seconds(entries), tabulate_rates(entries)):
        assert len(header) == len(ran) == len(did_not)
        assert did_not == ["4 Ray workers, cuda", *["–"] * (len(header) - 1)]
        assert "–" not in ran


def test_the_tables_show_what_the_csv_has():
    entries = summarize(pd.DataFrame([measure(2, 10.0, 90.0), measure(2, 30.0, 30.0), measure(2, 20.0, 45.0)]))
    header, cells = tabulate_seconds(entries)
    assert dict(zip(header, cells, strict=True)) == {
        "row": "2 Ray workers, cpu", "start-up": "10.0", "process and Ray": "5.0", "group": "4.0",
        "data": "0.0", "train": "20.0 (10.0–30.0)", "inference": "1.0", "teardown": "0.5",
        "total": "31.5 (21.5–41.5)", "speed-up": "1.00", "device-s": "1",
    }  # fmt: skip
    header, cells = tabulate_rates(entries)
    assert dict(zip(header, cells, strict=True)) == {
        "row": "2 Ray workers, cpu", "device": "test", "precision": "fp32", "nodes": "1", "threads": "1",
        "global batch": "8", "train/s": "45.0", "a worker": "22.5", "steady/s": "20.0", "infer/s": "5.0",
        "efficiency": "1.00", "val accuracy": "75.0%",
    }  # fmt: skip


def test_the_page_quotes_the_course_outside_the_table(tmp_path):
    entries = summarize(pd.DataFrame([measure(1, 10.0, 10.0)]))
    found = {"repeats": 1, "scaling": "strong", "rows": entries, "model": fit_model(entries)}
    write_json(tmp_path / "benchmark.json", found)
    section = show_benchmark(tmp_path)
    assert section is not None
    assert "454.933 s" in section["quoted"]
    assert "141.777 s" in section["quoted"]
    assert not any("454" in cell for _, _, rows, _ in section["tables"] for cells in rows for cell in cells)


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


def test_the_published_loop_cut_short_is_marked_and_so_is_its_accuracy():
    entry = repeat_published(published(3, 6.0, 0.5))
    assert entry["is_extrapolated"]
    assert entry["train_s"]["median"] == pytest.approx(200.0)
    assert entry["teardown_s"]["median"] == pytest.approx(1.0)
    assert entry["total_s"]["median"] == pytest.approx(4 + 200 + 4 + 1)
    assert entry["train_images_per_sec"] == pytest.approx(15.0)
    _, cells = tabulate_rates([entry])
    assert cells[0] == "published loop, cpu (extrapolated)"
    assert cells[-1] == "50.0% after 3 epochs"


def test_the_published_loop_in_full_is_measured():
    entry = repeat_published(published(100, 150.0, 0.875), published(100, 170.0, 0.875))
    assert not entry["is_extrapolated"]
    assert entry["train_s"]["median"] == pytest.approx(160.0)
    _, cells = tabulate_rates([entry])
    assert (cells[0], cells[-1]) == ("published loop, cpu", "87.5%")


def test_the_accuracy_of_repeats_on_both_sides_of_the_limit_is_that_of_the_short_ones():
    entry = repeat_published(published(100, 179.0, 0.9), published(3, 5.5, 0.5), published(100, 178.0, 0.9))
    _, cells = tabulate_rates([entry])
    assert (cells[0], cells[-1]) == ("published loop, cpu (extrapolated)", "50.0% after 3 epochs")
