"""The only place that builds a TorchTrainer, ScalingConfig and RunConfig."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from plates.cluster import Plan
from plates.config import TrainConfig, UserError
from plates.dataset import Dataset, UnreadableImageError
from plates.features import cache_root
from plates.model import Weights
from plates.train_loop import Task, Trained, Worker, train, train_loop_per_worker
from plates.transforms import Preprocessing

STATE_FOLDER = ".ray_train"  # Ray Train's own bookkeeping inside the run directory, gone when the run is done


def fit(
    config: TrainConfig,
    dataset: Dataset,
    digests: dict[str, str],
    weights: Weights,
    preprocessing: Preprocessing,
    plan: Plan,
    run: Path,
) -> Trained:
    """Trains by the plan, in this process or on Ray workers; both run the same loop.

    Raises: UserError where a worker cannot read an image that the driver could.
    """
    task = Task(config, dataset, weights, preprocessing, digests, cache_root(), time.time())
    try:
        if plan.num_workers == 0:
            torch.set_num_threads(plan.cpus_per_worker)
            trained = train(task, Worker(0, 1, torch.device(plan.device), is_ray=False))
        else:
            trained = fit_on_ray(task, plan, run)
    except UnreadableImageError as error:
        raise UserError(
            f"--data {config.data}: a worker cannot read an image ({error}); the data must be readable on every node"
        ) from error
    assert trained is not None, "rank 0 returns the result"
    return trained


def fit_on_ray(task: Task, plan: Plan, run: Path) -> Trained | None:
    """Runs the loop on a group of Ray workers. Weights and data set go through the object store, once a node."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    resources = {"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.device == "cuda" else {})
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"task": ray.put(task)},
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers, use_gpu=plan.device == "cuda", resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=STATE_FOLDER,
            storage_path=str(run),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        raise next(unreadable_in(error), error) from error
    finally:
        shutil.rmtree(run / STATE_FOLDER, ignore_errors=True)


def unreadable_in(error: Exception) -> Iterator[UnreadableImageError]:
    """The workers' unreadable images inside a failure of Ray Train."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, UnreadableImageError):
            yield cause
