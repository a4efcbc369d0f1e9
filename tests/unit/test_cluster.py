import os
import subprocess
import sys

import pytest

from plates import cluster
from plates.cluster import Node, Plan, plan_job, plan_workers
from plates.config import UserError

HEAD = Node(num_cpus=0, num_gpus=0)


@pytest.mark.parametrize(
    ("num_workers", "device", "nodes", "expected"),
    [
        ("auto", "auto", [Node(8, 0)], (1, "cpu", 8)),
        ("auto", "auto", [HEAD, Node(8, 0), Node(4, 0)], (2, "cpu", 4)),
        ("auto", "auto", [HEAD, Node(4, 1), Node(8, 4)], (5, "cuda", 2)),
        ("auto", "cpu", [Node(4, 1)], (1, "cpu", 4)),
        (3, "auto", [Node(8, 0)], (3, "cpu", 2)),
        (3, "auto", [Node(4, 0), Node(2, 0)], (3, "cpu", 2)),
        (2, "cuda", [Node(4, 1), Node(4, 1)], (2, "cuda", 4)),
    ],
)
def test_workers_share_what_there_is(num_workers, device, nodes, expected):
    plan = plan_workers(num_workers, device, nodes)
    assert (plan.num_workers, plan.device, plan.cpus_per_worker) == expected
    assert str(plan.num_workers) in plan.line


@pytest.mark.parametrize(
    ("num_workers", "device", "nodes", "message"),
    [
        (3, "auto", [Node(2, 0)], "--num-workers 3: the cluster has 2 CPUs on 1 nodes"),
        (3, "auto", [Node(8, 2)], "--num-workers 3: the cluster has 2 GPUs"),
        ("auto", "cuda", [Node(8, 0)], "--device cuda: the cluster has no GPU"),
        ("auto", "auto", [HEAD], "no GPU and no CPU now; give the number"),
    ],
)
def test_what_the_cluster_lacks_is_said(num_workers, device, nodes, message):
    with pytest.raises(UserError, match=message):
        plan_workers(num_workers, device, nodes)


def test_one_machine_runs_in_this_process():
    plan = plan_job("auto", "cpu")
    assert (plan.num_workers, plan.device) == (0, "cpu")
    assert plan.cpus_per_worker == cluster.num_usable_cpus()
    assert isinstance(plan, Plan)


@pytest.mark.skipif(cluster.torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        plan_job(0, "cuda")


def test_an_address_without_a_cluster_is_named():
    """In a process of its own: another test's Ray would answer here."""
    command = [sys.executable, "-m", "ray_jobs.train", "--data", "synthetic:4"]
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "RAY_ADDRESS 127.0.0.1:1: no Ray cluster answers" in ended.stderr
