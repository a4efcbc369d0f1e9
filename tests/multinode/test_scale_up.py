"""A cluster that starts from nothing, by Ray's own autoscaler over nodes that it fakes on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import ROOT, free_ports, wait_for_port

SMALL = ["--data", "synthetic:8", "--backbone", "resnet18", "--weights", "none", "--image-size", "32"]
SMALL += ["--epochs", "1", "--device", "cpu"]


@pytest.fixture
def growing_cluster() -> Iterator[str]:
    """A head without CPUs; at most two nodes of one CPU come when asked for."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    port, others = 6379, free_ports(5)  # the port is fixed in Ray's fake provider
    node = {"node_config": {}, "resources": {"CPU": 1, "object_store_memory": 100_000_000}}
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "provider": {"type": "external", "module": "mortal_nodes.MortalNodes", "disable_node_updaters": True},
        "available_node_types": {
            "ray.head.default": {"node_config": {}, "resources": {"CPU": 0}, "max_workers": 0},
            "worker": {**node, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
    }
    lists = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
             "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
             "rsync_filter"]  # fmt: skip
    config |= {name: [] for name in lists}
    config |= {"auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False}
    config |= {"upscaling_speed": 1.0}
    (folder / "growing.yaml").write_text(json.dumps(config))
    names = ["ray-client-server-port", "dashboard-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port",
             "metrics-export-port"]  # fmt: skip
    command = ["ray", "start", "--head", "--block", "--num-cpus=0", f"--port={port}", f"--temp-dir={folder}/ray"]
    command += [f"--{name}={number}" for name, number in zip(names, others, strict=True)]
    command += [f"--autoscaling-config={folder}/growing.yaml", "--object-store-memory=100000000"]
    environment = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    wait_for_port(port)
    yield f"127.0.0.1:{port}"
    os.killpg(head.pid, signal.SIGTERM)
    head.wait(30)
    for process in psutil.process_iter(["cmdline"]):  # the fake nodes are no children of the head
        if str(folder) in " ".join(process.info["cmdline"] or []):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def train(address: str, out: Path, num_workers: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ray_jobs.train", *SMALL, "--num-workers", str(num_workers), "--out", str(out)]
    environment = {**os.environ, "RAY_ADDRESS": address}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_workers_bring_up_the_nodes_they_need(growing_cluster, tmp_path):
    done = train(growing_cluster, tmp_path / "run", 2)
    assert done.returncode == 0, done.stderr
    assert "the cluster starts" in done.stdout
    assert pd.read_csv(tmp_path / "run" / "timing.csv").iloc[1:]["node"].nunique() == 2


@pytest.mark.slow
def test_a_run_whose_last_node_is_taken_away_waits_for_its_replacement(growing_cluster, tmp_path):
    command = [sys.executable, "-m", "ray_jobs.train", *SMALL, "--data", "synthetic:24", "--image-size", "96"]
    command += ["--epochs", "40", "--trainable", "layer4", "--num-workers", "1", "--out", str(tmp_path / "run")]
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": growing_cluster}, stdout=file, stderr=file)
    while run.poll() is None and "training:" not in log.read_text():
        time.sleep(0.2)
    lines = [(p, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"])]
    raylets = [(p, line) for p, line in lines if "/raylet/raylet " in line and ":6379 " in line]
    (worker,) = [p for p, line in raylets if "--head" not in line]
    worker.kill()
    assert run.wait(200) == 0, log.read_text()
    assert "a worker was lost; going on with 1 worker" in log.read_text()
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 40
