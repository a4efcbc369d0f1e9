"""A cluster that is busy: a job says so, waits for its room, and takes no other job's work for a lost worker."""

import os
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import ray
import torch.distributed as dist
from ray.train import TrainingFailedError
from test_train import CONFIG, train_on

from plates import sweep
from plates.cluster import Plan, find_room
from plates.config import UserError
from plates.train_loop.group import tell_left
from plates.trainer import MAX_VAIN_RESTARTS, run_loop
from ray_jobs import tune

TWO = Plan(2, "cpu", 1, "test")


@pytest.fixture
def hold_cpus(local_ray):
    """Takes CPUs as another job would, for some seconds."""
    holders, timers = [], []

    @ray.remote
    class Holder:
        def hold(self) -> None: ...

    def hold(time_s: float, num_cpus: int = 2) -> None:
        holders.append(Holder.options(num_cpus=num_cpus).remote())
        ray.get(holders[0].hold.remote())
        timers.append(threading.Timer(time_s, ray.kill, holders))
        timers[0].start()

    yield hold
    for timer in timers:  # one that outlives Ray would start it again
        timer.cancel()
    for holder in holders:
        ray.kill(holder)


def test_a_busy_cluster_is_said_and_waited_for(hold_cpus, folder, tmp_path, monkeypatch, capsys):
    """For longer than Ray Train waits for a group's start, after which the group counted as lost, eight times."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    hold_cpus(8)
    trained = train_on(2, replace(CONFIG, data=str(folder), epochs=1), tmp_path)
    assert len(trained.timings) == 2
    said = capsys.readouterr().out
    assert "a worker was lost" not in said
    assert said.count("the cluster is busy") == 1


def test_trials_of_heads_wait_for_room_too(hold_cpus, tmp_path, monkeypatch, capsys):
    """The cluster is taken by another job once the features are there."""
    run_loop = sweep.run_loop

    def run_and_lose_room(*arguments: Any) -> Any:
        result = run_loop(*arguments)
        hold_cpus(8)
        return result

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_loop", run_and_lose_room)
    monkeypatch.setattr("plates.job.tabulate_predictions", end)
    flags = ["--data", "synthetic:12", "--backbone", "resnet18", "--weights", "none", "--image-size", "32"]
    flags += ["--epochs", "1", "--folds", "2", "--cv-repeats", "1", "--num-trials", "2", "--num-workers", "1"]
    flags += ["--search", "recipe"]
    assert tune.main([*flags, "--out", str(tmp_path / "run")]) == 1
    assert (tmp_path / "run" / "checkpoint").is_dir()  # the trials were run
    assert "the cluster is busy: waiting up to 1200 s for room for 1 worker of 1 CPU" in capsys.readouterr().out


def test_waiting_for_room_ends(hold_cpus):
    hold_cpus(20)
    began_s = time.monotonic()
    with pytest.raises(UserError, match="there was no room for 2 workers of 1 CPU"):
        find_room(replace(TWO, wait_for_nodes_s=1))
    assert time.monotonic() - began_s < 15


def test_what_no_node_can_hold_is_not_waited_for(local_ray, monkeypatch):
    monkeypatch.setattr("plates.cluster.AUTOSCALER_ANSWERS_S", 0.0)
    with pytest.raises(UserError, match="no node has room for 1 worker of 4 CPUs, and none is on its way"):
        find_room(replace(TWO, cpus_per_worker=4))
    assert find_room(replace(TWO, num_workers=3)).num_workers == 2


def test_what_has_lost_workers_goes_on_with_the_room_that_is_free(hold_cpus):
    hold_cpus(60, num_cpus=1)
    began_s = time.monotonic()
    assert find_room(TWO, has_lost=True).num_workers == 1
    assert time.monotonic() - began_s < 10


@pytest.mark.slow
@pytest.mark.parametrize("brings", ["progress", "nothing"])
def test_a_run_is_given_up_only_where_its_losses_bring_nothing(brings, local_ray, tmp_path):
    deaths, num_deaths = tmp_path / "deaths", 6 if brings == "progress" else 100

    def die(task, worker):
        done = len(deaths.read_text()) if deaths.exists() else 0
        tell_left(task.run, 100 - done if brings == "progress" else 100, worker)
        if done < num_deaths:
            deaths.write_text("x" * (done + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    class Task:
        run = tmp_path
        config = CONFIG

    one = replace(TWO, num_workers=1)
    if brings == "progress":
        assert run_loop(die, Task(), one) == "alive"
    else:
        with pytest.raises(TrainingFailedError):
            run_loop(die, Task(), one)
        assert len(deaths.read_text()) == 1 + MAX_VAIN_RESTARTS


def test_no_worker_gives_up_on_another_that_works_longer(local_ray, tmp_path):
    """Torch's own limit is 30 minutes; Ray sees a worker that is gone, and a slow one is waited for."""

    def tell(task, worker):
        return dist.group.WORLD._get_backend(worker.device).options._timeout.total_seconds()

    class Task:
        run = tmp_path
        config = CONFIG

    assert run_loop(tell, Task(), TWO) > 24 * 3600
