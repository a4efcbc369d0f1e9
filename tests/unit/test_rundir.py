import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from plates import rundir
from plates.config import BenchmarkConfig, TrainConfig, UserError

CONFIG = TrainConfig(data="synthetic:8", epochs=2)


def test_a_new_run_gets_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = rundir.find_run(None, "train", CONFIG), rundir.find_run(None, "train", CONFIG)
    assert one != other
    assert one.parent == tmp_path / "runs"
    assert not one.exists()


def test_a_finished_run_is_never_taken_again(tmp_path):
    run = tmp_path / "run"
    rundir.claim_run(run, "train", CONFIG, {})
    assert rundir.find_run(str(run), "train", CONFIG) == run
    rundir.finish_run(run)
    with pytest.raises(UserError, match="holds a finished run"):
        rundir.find_run(str(run), "train", CONFIG)


def test_an_unfinished_run_is_taken_again_by_the_same_settings_only(tmp_path):
    run = tmp_path / "run"
    rundir.claim_run(run, "train", CONFIG, {})
    with pytest.raises(UserError, match=r"other settings \(epochs, lr differ\)"):
        rundir.find_run(str(run), "train", replace(CONFIG, epochs=3, lr=0.1))
    with pytest.raises(UserError, match="job"):
        rundir.find_run(str(run), "tune", CONFIG)


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        rundir.find_run(str(tmp_path), "train", CONFIG)
    with pytest.raises(UserError, match="is a file"):
        rundir.find_run(str(tmp_path / "thesis.txt"), "train", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "metrics.json"
    rundir.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        rundir.write_json(path, {"a": object()})
    with pytest.raises(ZeroDivisionError):
        rundir.write_whole(path, lambda file: file.write_text("half") and 1 / 0)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_finite_is_null_in_json(tmp_path):
    values = {"val/loss": float("nan"), "rows": [np.float64("inf"), 0.5, (1, -float("inf"))], "text": "NaN"}
    rundir.write_json(tmp_path / "metrics.json", values)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    read = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert read == {"val/loss": None, "rows": [None, 0.5, [1, None]], "text": "NaN"}


def test_an_unfinished_run_of_settings_with_lists_is_taken_again(tmp_path):
    config = BenchmarkConfig(devices=("cpu",), worker_counts=(1, 2))
    rundir.claim_run(tmp_path / "run", "benchmark", config, {})
    rundir.find_run(str(tmp_path / "run"), "benchmark", config)
    with pytest.raises(UserError, match=r"\(worker_counts differ\)"):
        rundir.find_run(str(tmp_path / "run"), "benchmark", replace(config, worker_counts=(1, 2, 4)))


def test_tables_are_written_alike(tmp_path):
    table = pd.DataFrame({"id": ["0001"], "label": ["cleaned"]})
    rundir.write_csv(tmp_path / "a.csv", table)
    rundir.write_parquet(tmp_path / "a.parquet", table)
    assert (tmp_path / "a.csv").read_text() == "id,label\n0001,cleaned\n"
    assert pd.read_parquet(tmp_path / "a.parquet").equals(table)


def test_a_full_disk_is_named_whatever_the_library_says(tmp_path):
    def write(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    (tmp_path / "a.csv").write_text("whole")
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.csv'"):
        rundir.write_whole(tmp_path / "a.csv", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.csv", "whole")]
