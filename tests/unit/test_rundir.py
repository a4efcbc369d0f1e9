import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import rights_of_nobody

from plates import rundir
from plates.config import BenchmarkConfig, TrainConfig, UserError

CONFIG = TrainConfig(data="synthetic:8", epochs=2)


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


def test_a_run_directory_that_may_not_be_listed_is_one_line():
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        (Path(place) / "run").mkdir(mode=0)
        Path(place).chmod(0o755)
        with rights_of_nobody(), pytest.raises(UserError, match=r"--out .*run: cannot be used \(Permission denied"):
            rundir.find_run(f"{place}/run", "train", CONFIG)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "metrics.json"
    rundir.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        rundir.write_json(path, {"a": object()})
    with pytest.raises(ZeroDivisionError):
        rundir.write_atomically(path, lambda file: file.write_text("half") and 1 / 0)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from plates import rundir

def write(file):
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

rundir.write_atomically(Path(sys.argv[1]), write)
"""


def test_what_a_killed_process_was_writing_is_in_nobodys_way_and_goes(tmp_path):
    """Killed in its very first write, before there is a config.json, then in that of a checkpoint."""
    for name in ("config.json", "checkpoint/model.json"):
        killed = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(tmp_path / name)])
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / name).exists()
        assert [file.read_text() for file in tmp_path.rglob(f"*/{Path(name).name}")] == ["half"]
        rundir.claim_run(rundir.find_run(str(tmp_path), "train", CONFIG), "train", CONFIG, {})
    rundir.finish_run(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["checkpoint", "config.json"]


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
        rundir.write_atomically(tmp_path / "a.csv", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.csv", "whole")]


CLAIM = """
import socket, sys, time
from pathlib import Path
from plates import rundir
from plates.config import TrainConfig, UserError
socket.gethostname = lambda: sys.argv[2]
try:
    rundir.claim_run(Path(sys.argv[1]), "train", TrainConfig(data="synthetic:8", epochs=2), {})
except UserError as error:
    print(error, flush=True)
else:
    print("claimed", flush=True)
    time.sleep(60)
"""


def claim(run: Path, *wrapper: str, host: str = "pod") -> tuple[subprocess.Popen[str], str]:
    """Claims a directory in a process of its own; the process, which lives on, and what it said."""
    command = [*wrapper, sys.executable, "-c", CLAIM, str(run), host]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    return process, process.stdout.readline().strip()


def test_a_directory_has_one_holder_and_a_killed_one_leaves_it_at_once(tmp_path):
    """Whatever the hosts are called: containers may share a name, and a pod that starts again has another."""
    run = tmp_path / "run"
    first, said = claim(run)
    try:
        assert said == "claimed"
        for host in ("pod", "other-pod"):
            second, said = claim(run, host=host)
            second.kill()
            assert "is at work in it" in said
    finally:
        first.kill()
        first.wait()
    third, said = claim(run, host="pod-after-restart")
    third.kill()
    assert said == "claimed"


def test_the_lock_holds_between_containers_of_one_name(tmp_path):
    """Each claims from a PID namespace of its own."""
    wrapper = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    holders = [claim(tmp_path / "run", *wrapper) for _ in range(3)]
    for process, _ in holders:
        os.killpg(process.pid, signal.SIGKILL)
    said = [what for _, what in holders]
    assert said[0] == "claimed"
    assert all("is at work in it" in what for what in said[1:])


def test_a_record_of_another_container_holds_by_its_last_sign_alone():
    """As in an object store: the same host's name and process number say nothing of each other there."""
    me = {"host": "pod", "processes": rundir.process_table(), "pid": os.getpid(), "started": 1.0}
    assert not rundir.is_held(me, me, age_s=1)
    other = {**me, "processes": "another kernel's or namespace's"}
    assert rundir.is_held(other, me, age_s=1)
    assert not rundir.is_held(other, me, age_s=61)
