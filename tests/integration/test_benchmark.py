"""The benchmark as a user runs it: whole processes, one of them on Ray, one that cannot run here."""

import json
import subprocess
import sys

import pandas as pd
import torch

from plates import scaling
from plates.scaling import Row
from ray_jobs import benchmark as benchmark_job


def test_a_benchmark_writes_its_table_and_says_what_could_not_run(tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--data", "synthetic:12", "--backbone", "resnet18", "--weights", "none", "--image-size", "32"]
    flags += ["--epochs", "2", "--repeats", "1", "--worker-counts", "1", "--devices", "cpu", "cuda"]
    assert benchmark_job.main([*flags, "--out", str(run)]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads((run / "benchmark.json").read_text())
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == [
        f"{row}, {device}"
        for device in ("cpu", "cuda")
        for row in ("published loop", "one process, all cores", "1 Ray worker")
    ]
    published = rows["published loop, cpu"]
    assert (published["is_extrapolated"], published["num_epochs"]) == (False, 2)
    assert 0 <= published["val/accuracy"] <= 1
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in rows["one process, all cores, cuda"]["reason"]
        assert "reason" in rows["published loop, cuda"]
        assert "could not run" in out
    on_ray, here = rows["1 Ray worker, cpu"], rows["one process, all cores, cpu"]
    assert on_ray["val/accuracy"] == here["val/accuracy"]
    assert on_ray["startup_s"]["median"] > here["startup_s"]["median"]
    table = pd.read_csv(run / "benchmark.csv")
    assert len(table) == 6
    parts = table.set_index("row").loc["1 Ray worker, cpu", ["startup_process_s", "startup_group_s"]]
    assert (parts > 0.5).all()
    assert parts.sum() < on_ray["startup_s"]["median"]
    assert len(pd.read_csv(run / "predictions.csv")) == 12
    page = (run / "report.html").read_text()
    assert "454.933 s" in page
    assert "No model of the scaling" in page


def test_a_benchmark_ends_with_exit_code_3_where_an_image_could_not_be_read(folder, tmp_path, monkeypatch, capsys):
    """The two rows that need no Ray, each in a process of its own."""
    rows = [Row("published", "cpu", 0), Row("plates", "cpu", 0)]
    monkeypatch.setattr(scaling, "plan_rows", lambda *_: rows)
    (folder / "train" / "dirty" / "1.png").write_bytes(b"no picture")
    run = tmp_path / "run"
    flags = ["--data", str(folder), "--backbone", "resnet18", "--weights", "none", "--image-size", "32"]
    flags += ["--epochs", "1", "--repeats", "1", "--devices", "cpu", "--skip-unreadable", "--out", str(run)]
    assert benchmark_job.main(flags) == 3
    assert f"could not be read: {run / 'skipped.csv'}" in capsys.readouterr().out
    assert pd.read_csv(run / "benchmark.csv")["exit_code"].tolist() == [3, 3]
    assert pd.read_csv(run / "skipped.csv")["path"].tolist() == ["train/dirty/1.png"]
    assert "train/dirty/1.png" in (run / "report.html").read_text()


def test_the_published_loop_stops_after_its_first_epochs_where_all_would_take_too_long(folder):
    """The drawn pictures are 17 labelled ones, of which 4 are validated."""
    settings = {"data": str(folder), "backbone": "resnet18", "weights": "none", "trainable": "head", "seed": 0}
    settings |= {"image_size": 32, "device": "cpu", "num_epochs": 5, "skip_unreadable": False}
    found = {}
    for limit_s in (0.0, 1e9):
        command = [sys.executable, "-m", "plates.published", json.dumps(settings | {"limit_s": limit_s})]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        found[limit_s] = json.loads(ended.stdout.splitlines()[-1])
    assert {limit_s: measured["num_epochs"] for limit_s, measured in found.items()} == {0.0: 3, 1e9: 5}
    for measured in found.values():
        assert (measured["val/accuracy"] * 4).is_integer()
        assert measured["train_s"] > 0
