"""A cluster of GPUs rehearsed without one: another resource, or Ray's word for it, stands for each; gloo on CPUs."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pandas as pd
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from test_train import CONFIG, assert_same, train_on

from plates.cluster import Plan, list_nodes, plan_workers
from plates.config import UserError
from plates.dataset import load_dataset
from plates.preflight import probe_nodes

MEMORY = {"object_store_memory": 100_000_000}
SMALL = replace(CONFIG, data="synthetic:12")
StartCluster = Callable[..., Cluster]


@pytest.fixture
def start_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartCluster]:
    """Starts a head that runs nothing and a node for each of the arguments, and connects to it."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **MEMORY})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)

    def start(*nodes: dict) -> Cluster:
        for node in nodes:
            cluster.add_node(**node, **MEMORY)
        ray.init(address=cluster.address, logging_level="ERROR")
        return cluster

    yield start
    ray.shutdown()
    cluster.shutdown()


def gpu_node(count: int) -> dict:
    return {"num_cpus": count, "resources": {"MOCK_GPU": count}}


def rehearse(num_workers, resource: str) -> Plan:
    """The plan for GPUs, on what stands for them."""
    plan = plan_workers(num_workers, "cuda", list_nodes(resource))
    return replace(plan, device="cpu", backend="gloo", resource=resource, wait_for_nodes_s=60)


@pytest.mark.parametrize(
    ("resource", "nodes", "count"),
    [
        pytest.param("GPU", [{"num_cpus": 2, "num_gpus": 2}], 2, marks=pytest.mark.slow),
        ("MOCK_GPU", [gpu_node(1), gpu_node(2), {"num_cpus": 4}], 3),
    ],
)
def test_one_worker_a_gpu_trains_and_predicts(resource, nodes, count, start_cluster, tmp_path):
    """One group does both."""
    start_cluster(*nodes)
    with pytest.raises(UserError, match=f"--num-workers {count + 1}: the cluster has {count} GPUs"):
        rehearse(count + 1, resource)
    plan = rehearse("auto", resource)
    assert plan.num_workers == count
    dataset = load_dataset(SMALL.data, 0)
    assert [probe.problems for probe in probe_nodes(plan, dataset, tmp_path / "run")] == [()] * len(nodes)
    trained = train_on(plan, SMALL, tmp_path / "run")
    assert [row["rank"] for row in trained.timings] == list(range(count))
    on_nodes = pd.Series([row["node"] for row in trained.timings]).value_counts()
    assert sorted(on_nodes) == sorted(node.get("num_gpus") or node["resources"]["MOCK_GPU"]
                                      for node in nodes if set(node) != {"num_cpus"})  # fmt: skip
    here = train_on(0, SMALL, tmp_path / "here")
    assert_same(here, trained, tolerance=1e-4)
    assert torch.allclose(here.predicted.logits, trained.predicted.logits, atol=1e-3)


def test_nodes_of_different_sizes_share_by_their_threads(start_cluster, tmp_path):
    start_cluster({"num_cpus": 2}, {"num_cpus": 1})
    plan = plan_workers("auto", "cpu", list_nodes())
    config = replace(SMALL, data="synthetic:40", trainable="layer4", lr=1e-4)
    trained = train_on(plan, config, tmp_path / "run")
    assert len({row["node"] for row in trained.timings}) == 2
    counts = [row["num_train_images"] for row in trained.timings]
    num_train = len(load_dataset(config.data, 0).train)
    assert sum(counts) == config.epochs * num_train
    assert sorted(counts) == pytest.approx([sum(counts) / 3, sum(counts) * 2 / 3], abs=config.epochs * 2)
    assert_same(train_on(0, config, tmp_path / "here"), trained, tolerance=1e-4)


def wait_for(text: str, capfd: pytest.CaptureFixture, seen: list[str], limit_s: float = 120) -> None:
    deadline_s = time.monotonic() + limit_s
    while text not in "".join(seen):
        assert time.monotonic() < deadline_s, "".join(seen)
        time.sleep(0.2)
        seen += capfd.readouterr()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_gpu_node_is_gone_on_without_and_with_its_replacement(start_cluster, tmp_path, monkeypatch, capfd):
    """The smaller group works until there is room for the larger one, and ends with the model of one undisturbed."""
    monkeypatch.setattr("plates.trainer.SECONDS_TO_GROW", 15.0)
    cluster = start_cluster(gpu_node(1), gpu_node(1))
    config = replace(SMALL, trainable="layer4", epochs=500, lr=1e-5, step_size=1000)
    plan, results, seen = rehearse("auto", "MOCK_GPU"), [], []
    run = threading.Thread(target=lambda: results.append(train_on(plan, config, tmp_path / "run")))
    run.start()
    wait_for("training:", capfd, seen)
    time.sleep(12)  # a state is stored
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    wait_for("a worker was lost; going on with 1 worker", capfd, seen)
    cluster.add_node(**gpu_node(1), **MEMORY)
    wait_for("there is room for more workers; going on with 2 workers", capfd, seen)
    run.join(600)
    (trained,) = results
    assert len(trained.timings) == 2
    assert len(trained.history) == config.epochs
    assert torch.allclose(trained.val_logits, train_on(0, config, tmp_path / "here").val_logits, atol=0.05)
