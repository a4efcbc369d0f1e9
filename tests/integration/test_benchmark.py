"""The benchmark as a user runs it: whole processes, one of them on Ray, one that cannot run here."""

import json

import pandas as pd
import torch

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
        "published loop, cpu", "one process, cpu", "1 Ray worker, cpu", "one process, cuda", "1 Ray worker, cuda"
    ]  # fmt: skip
    assert rows["published loop, cpu"]["is_extrapolated"]
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in rows["one process, cuda"]["reason"]
        assert "could not run" in out
    on_ray, here = rows["1 Ray worker, cpu"], rows["one process, cpu"]
    assert on_ray["val/accuracy"] == here["val/accuracy"]
    assert on_ray["startup_s"]["median"] > here["startup_s"]["median"]
    table = pd.read_csv(run / "benchmark.csv")
    assert len(table) == 5
    assert len(pd.read_csv(run / "predictions.csv")) == 12
    page = (run / "report.html").read_text()
    assert "extrapolated" in page
    assert "No model of the scaling" in page
