"""A cluster of several raylets on this machine: workers spread over nodes, and nodes go away."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pandas as pd
import pytest
import ray
from ray.cluster_utils import Cluster

from plates import preflight
from ray_jobs import check, train

SMALL = ["--data", "synthetic:12", "--backbone", "resnet18", "--weights", "none", "--image-size", "32"]
SMALL += ["--epochs", "2", "--precision", "fp32"]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one CPU each."""
    ray.shutdown()
    memory = {"object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **memory)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_workers_spread_over_nodes_and_give_the_same_model(cluster, tmp_path, capsys):
    assert train.main([*SMALL, "--num-workers", "2", "--out", str(tmp_path / "two")]) == 0
    assert train.main([*SMALL, "--num-workers", "0", "--out", str(tmp_path / "here")]) == 0
    workers = pd.read_csv(tmp_path / "two" / "timing.csv").iloc[1:]
    assert workers["node"].nunique() == 2
    both = [pd.read_csv(tmp_path / name / "predictions.csv") for name in ("two", "here")]
    assert list(both[0]["path"]) == list(both[1]["path"])
    assert abs(both[0]["p_dirty"] - both[1]["p_dirty"]).max() < 1e-4


def test_preflight_finds_nothing_where_nothing_is_wrong(cluster, folder, tmp_path, capsys):
    flags = ["--num-workers", "2", "--out", str(tmp_path / "run")]
    (folder / "train" / "cleaned" / "1.jpg").write_bytes(b"no image")  # no fault of a node
    assert check.main([*flags, "--data", str(folder)]) == 0
    table = capsys.readouterr().out
    assert table.count("none") == 2
    assert [path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)] == [
        tmp_path / "cache", tmp_path / "cache" / "features"
    ]  # fmt: skip
    assert check.main([*flags, "--device", "cuda"]) == 2
    assert "the cluster has no GPU" in capsys.readouterr().err


@pytest.fixture
def other_machine(cluster, folder, tmp_path) -> Iterator[None]:
    """A third node, which has an empty disk where the others have the photos, and another torch."""
    if os.geteuid():
        pytest.skip("only root may give a process another disk")
    other = tmp_path / "other" / "torch-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n")
    start = f"ray start --address={cluster.address} --num-cpus=1 --object-store-memory=100000000 --block"
    command = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {folder} && exec {start}"]
    environment = {**os.environ, "PYTHONPATH": str(other.parent), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    node = subprocess.Popen(command, env=environment, start_new_session=True)
    ray.init(address=cluster.address)
    while sum(node["Alive"] for node in ray.nodes()) < 4:
        time.sleep(0.5)
    ray.shutdown()
    yield
    os.killpg(node.pid, signal.SIGTERM)
    node.wait(30)


def test_preflight_names_the_node_and_what_it_cannot_do(other_machine, folder, tmp_path, capsys):
    flags = ["--data", str(folder), "--out", str(tmp_path / "run"), "--num-workers", "2"]
    assert check.main(flags) == 2
    *_, bad = sorted(capsys.readouterr().out.splitlines(), key=len)
    assert "cannot read train/cleaned/1.jpg of --data" in bad
    assert f"has torch 0.0.1, the driver {preflight.versions()['torch']}" in bad
    assert train.main([*SMALL, *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("cannot read train/cleaned/1.jpg") == 1
    assert not (tmp_path / "run").exists()


def test_a_node_of_other_versions_or_without_the_folder_is_refused(tmp_path):
    """The probe itself, as it runs on a node; only a real second machine has another disk."""
    from plates.sources import FolderSource

    mine = preflight.versions()
    probe = preflight.probe_node(
        "cpu", FolderSource(tmp_path), "train/a.jpg", tmp_path / "not here", None, {**mine, "torch": "1.0"}, False
    )
    assert len(probe.problems) == 3
    assert f"torch {mine['torch']}, the driver 1.0" in probe.problems[2]
