"""A cluster of several raylets on this machine: workers spread over nodes, and nodes go away."""

from collections.abc import Iterator

import pandas as pd
import pytest
import ray
from ray.cluster_utils import Cluster

from ray_jobs import train

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
