"""The only place that builds a TorchTrainer, ScalingConfig and RunConfig."""

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed import DistBackendError

from plates.balance import weigh_classes
from plates.cluster import Plan, find_room, plural
from plates.config import TrainConfig, UserError
from plates.dataset import Dataset
from plates.images import UnreadableImageError
from plates.model import Weights
from plates.ray_private import ray_train_error, require, trainer_class
from plates.storage import Place, cache_root, remove_tree
from plates.train_loop.group import LEFT_FILE, STATE_FOLDER, Worker
from plates.train_loop.task import Task
from plates.transforms import Preprocessing

ResultT = TypeVar("ResultT")
MAX_VAIN_RESTARTS = 3  # in a row, after lost workers, that find no less work to do than those before
SECONDS_TO_GROW = 60.0  # that a group works which is smaller than planned, before a larger one may take its place
# Ray sees a worker that is gone. One that is there may be slow, or wait for rank 0 to fit a long head.
COLLECTIVE_TIMEOUT_S = 7 * 24 * 3600


def make_task(
    config: TrainConfig, dataset: Dataset, weights: Weights, preprocessing: Preprocessing, precision: str, run: Place
) -> Task:
    """A task whose start-up is counted from here. Raises: UserError as `weigh_classes`."""
    class_weights = weigh_classes(config.class_weights, dataset)
    return Task(config, dataset, weights, preprocessing, precision, cache_root(), run, time.time(), class_weights)


def run_loop(loop: Callable[[Task, Worker], ResultT | None], task: Task, plan: Plan) -> ResultT:
    """Runs a loop by the plan, in this process or on Ray workers, and returns what rank 0 returns.

    Where workers are lost, the loop starts again on as many as the cluster still has, and on more when their room
    returns; it takes up what it stored.

    Raises: UserError where a worker cannot read an image that the driver could.
    """
    here = Worker(0, 1, torch.device(plan.device), False, (plan.cpus_per_worker,))
    try:
        result = run_on_ray(loop, task, plan) if plan.num_workers else loop(task, here)
    except UnreadableImageError as error:
        rule = "the data must be readable on every node"
        raise UserError(f"--data {task.config.data}: a worker cannot read an image ({error}); {rule}") from error
    assert result is not None, "rank 0 returns the result"
    return result


def run_on_ray(loop: Callable[[Task, Worker], ResultT | None], task: Task, plan: Plan) -> ResultT | None:
    """The loop on a group of Ray workers, and on a new one when some of them are lost, or a smaller one may grow.

    Ray Train's own elastic groups would do it, but reserve by what nodes have and not by what is free. Measured on
    2.60: where another job took the room that had come back, the group at work was ended all the same and none was
    placed until that job ended; after the loss of a node no worker was at work for 42 s; and an OSError of ours was
    tried again like a lost worker.
    """
    import ray
    from ray.exceptions import RayError

    require("ray.train", "ray.data")
    of_ray = (RayError, ray_train_error())
    work = ray.put((loop, task))  # weights and data set go through the object store, once a node
    least_left, num_vain, room = math.inf, 0, find_room(plan)
    while True:
        try:
            return fit(work, room, task.run, plan.num_workers - room.num_workers)
        except of_ray as error:
            by_worker = getattr(error, "worker_failures", None)  # none of Ray Train's controller, whose error it is
            is_growth = by_worker == {}  # the group ended, and no worker failed
            failures = [getattr(failure, "cause", failure) for failure in (by_worker or {0: error}).values()]
            left = read_left(task.run)
            num_vain = num_vain if is_growth else 1 if left < least_left else num_vain + 1
            least_left = min(left, least_left)
            os_errors = [failure for failure in failures if isinstance(failure, OSError)]  # an image, a full disk
            is_lost = is_growth or any(is_lost_worker(failure, of_ray) for failure in failures)
            if os_errors or not is_lost or num_vain > MAX_VAIN_RESTARTS:
                raise (os_errors or [error])[0] from error
        finally:
            remove_tree(task.run / STATE_FOLDER)
        room = find_room(plan, has_lost=True)
        why = "there is room for more workers" if is_growth else "a worker was lost"
        print(f"{why}; going on with {plural(room.num_workers, 'worker')}", flush=True)


def read_left(run: Place) -> float:
    """How much work the last group found to do; infinite where it was lost before it could tell."""
    file = run / STATE_FOLDER / LEFT_FILE
    return float(file.read_bytes()) if file.exists() else math.inf


def fit(work: Any, plan: Plan, run: Place, num_missing: int) -> Any:
    """One group of workers, until it ends or there is room for some of those missing; returns what rank 0 returns."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    def run_on_worker(config: dict[str, Any]) -> Any:
        """Shipped by value and importing for itself, so that the controller does not import all that workers need."""
        import torch
        from ray.train import get_context
        from ray.train.torch import get_device

        from plates.train_loop.group import Worker, all_gather

        context, node = get_context(), ray.get_runtime_context().get_node_id()
        num_threads = config["num_threads"]
        if num_threads is None:  # shares the CPUs of its node with the workers beside it
            num_cpus = next(int(found["Resources"]["CPU"]) for found in ray.nodes() if found["NodeID"] == node)
            num_threads = max(1, num_cpus // all_gather(node).count(node))
        device = get_device() if config["device"] == "cuda" else torch.device(config["device"])
        threads = tuple(all_gather(num_threads))
        worker = Worker(context.get_world_rank(), context.get_world_size(), device, True, threads)
        loop, task = ray.get(config["work"])
        return loop(task, worker)

    num_threads = None if plan.uses_whole_nodes else plan.cpus_per_worker
    trainer = trainer_class([plan.resources_per_worker] * num_missing, SECONDS_TO_GROW)(
        run_on_worker,
        train_loop_config={"work": work, "device": plan.device, "num_threads": num_threads},
        torch_config=TorchConfig(plan.backend, timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.resource == "GPU",
            resources_per_worker=plan.resources_per_worker,
            placement_strategy="PACK" if plan.resource else "SPREAD",
        ),
        run_config=RunConfig(
            name=STATE_FOLDER,
            storage_path=str(run),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    return trainer.fit().return_value


def is_lost_worker(failure: Exception, of_ray: tuple[type[Exception], ...]) -> bool:
    """Whether a process or node went away; the other workers see that as a broken connection."""
    is_broken_connection = "onnection" in str(failure) and type(failure) in (RuntimeError, DistBackendError)
    return isinstance(failure, of_ray) or is_broken_connection
