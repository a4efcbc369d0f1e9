"""The only place that builds a TorchTrainer, ScalingConfig and RunConfig."""

import itertools
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from plates.cluster import Plan, find_room, plural
from plates.config import TrainConfig, UserError
from plates.dataset import Dataset, UnreadableImageError
from plates.features import cache_root
from plates.model import Weights
from plates.rundir import versions
from plates.storage import Place, remove_tree
from plates.train_loop.group import Worker
from plates.train_loop.task import Task
from plates.transforms import Preprocessing

ResultT = TypeVar("ResultT")
STATE_FOLDER = ".ray_train"  # Ray Train's own bookkeeping inside the run directory, gone when the run is done
MAX_RESTARTS = 8  # after lost workers, before a run gives up
# Ray sees a worker that is gone. One that is there may be slow, or wait for rank 0 to fit a long head.
COLLECTIVE_TIMEOUT_S = 7 * 24 * 3600


def make_task(
    config: TrainConfig,
    dataset: Dataset,
    digests: dict[str, str],
    weights: Weights,
    preprocessing: Preprocessing,
    precision: str,
    run: Place,
) -> Task:
    """What the workers are told; start-up is counted from here."""
    return Task(config, dataset, weights, preprocessing, precision, digests, cache_root(), run, time.time())


def describe(task: Task, plan: Plan) -> dict[str, Any]:
    """What a run resolved its settings to: for config.json, the checkpoint and the report."""
    config, dataset = task.config, task.dataset
    return {
        "backbone": task.weights.backbone,
        "backbone_reason": task.weights.reason,
        "weights_source": task.weights.source,
        "seed": config.seed,
        "num_views": config.num_views or config.epochs,
        "num_workers": plan.num_workers,
        "device": plan.device,
        "precision": task.precision,
        "threads_per_worker": plan.cpus_per_worker,
        "plan": plan.line,
        "classes": list(dataset.classes),
        "num_images": {"train": len(dataset.train), "val": len(dataset.val), "test": len(dataset.test)},
        "versions": versions(),
        "notes": [] if dataset.test else ["The data set has no test split: nothing was predicted."],
    }


def run_loop(loop: Callable[[Task, Worker], ResultT | None], task: Task, plan: Plan) -> ResultT:
    """Runs a loop by the plan, in this process or on Ray workers, and returns what rank 0 returns.

    Where workers are lost, the loop starts again on as many as the cluster still has; it takes up what it stored.

    Raises: UserError where a worker cannot read an image that the driver could.
    """
    try:
        if plan.num_workers == 0:
            result = loop(task, Worker(0, 1, torch.device(plan.device), False, plan.cpus_per_worker))
        else:
            result = run_on_ray(loop, task, plan)
    except UnreadableImageError as error:
        raise UserError(
            f"--data {task.config.data}: a worker cannot read an image ({error}); "
            "the data must be readable on every node"
        ) from error
    assert result is not None, "rank 0 returns the result"
    return result


def run_on_ray(loop: Callable[[Task, Worker], ResultT | None], task: Task, plan: Plan) -> ResultT | None:
    """The loop on a group of Ray workers, and on a new group when some of them are lost."""
    import ray
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    what = ray.put((loop, task))  # weights and data set go through the object store, once a node
    for num_lost in itertools.count(1):
        room = find_room(plan)
        if num_lost > 1:
            print(f"a worker was lost; going on with {plural(room.num_workers, 'worker')}", flush=True)
        try:
            return fit(what, room, task.run)
        except (TrainingFailedError, RayError) as error:  # the latter of Ray Train's own controller
            failures = failures_of(error)
            told = [failure for failure in failures if isinstance(failure, OSError)]  # an image, a full disk
            if told or num_lost > MAX_RESTARTS or not any(map(is_lost_worker, failures)):
                raise (told or [error])[0] from error
        finally:
            remove_tree(task.run / STATE_FOLDER)
    raise AssertionError("the loop above returns or raises")


def fit(what: Any, plan: Plan, run: Place) -> Any:
    """One group of workers from start to end; returns what rank 0 returns."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ctrl-C interrupts the driver, as everywhere; Ray's handler would swallow it until the process ends."""

    def run_on_worker(config: dict[str, Any]) -> Any:
        """Shipped by value and importing for itself, so that the controller does not import all that workers need."""
        import torch
        from ray.train import get_context
        from ray.train.torch import get_device

        from plates.train_loop.group import Worker

        context = get_context()
        worker = Worker(
            context.get_world_rank(), context.get_world_size(), get_device(), True, torch.get_num_threads()
        )
        loop, task = ray.get(config["what"])
        return loop(task, worker)

    callbacks = ["plates.placement.ReleaseRoom", *os.environ.get("RAY_TRAIN_CALLBACKS", "").split(",")]
    os.environ["RAY_TRAIN_CALLBACKS"] = ",".join(filter(None, dict.fromkeys(callbacks)))
    trainer = Trainer(
        run_on_worker,
        train_loop_config={"what": what},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.device == "cuda",
            resources_per_worker=plan.resources_per_worker,
        ),
        run_config=RunConfig(
            name=STATE_FOLDER,
            storage_path=str(run),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    return trainer.fit().return_value


def failures_of(error: Exception) -> list[Exception]:
    """What went wrong on the workers; the error itself where Ray Train's controller failed."""
    failures = [*getattr(error, "worker_failures", {}).values()] or [error]
    return [getattr(failure, "cause", failure) for failure in failures]


def is_lost_worker(failure: Exception) -> bool:
    """Whether a process or node went away, in work or while the group was started; the other workers see that as a
    broken connection."""
    from ray.exceptions import RayError
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
    from torch.distributed import DistBackendError

    is_broken_connection = "onnection" in str(failure) and type(failure) in (RuntimeError, DistBackendError)
    lost = RayError | ControllerError | WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError
    return isinstance(failure, lost) or is_broken_connection
