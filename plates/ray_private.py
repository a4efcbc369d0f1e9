"""All of Ray that Ray does not promise: why each is used, and what happens without it.

Importing this imports no Ray. Where a package of Ray is imported first, `require` looks for all that is used of it.
"""

import json
import os
import pkgutil
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from plates.config import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.train.torch import TorchTrainer
    from ray.tune.schedulers import ASHAScheduler

NAMES = (
    "ray.autoscaler.v2.sdk:get_cluster_status",
    "ray.autoscaler.v2.utils:is_autoscaler_v2",
    "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator:get_or_create_autoscaling_coordinator",
    "ray.experimental.internal_kv:_internal_kv_get",
    "ray.experimental.tqdm_ray:tqdm",
    "ray.job_submission:JobSubmissionClient._do_request",
    "ray.train.torch:TorchTrainer._create_default_callbacks",
    "ray.train.torch:TorchTrainer._register_sigint_handler",
    "ray.train.v2._internal.callbacks.datasets:DatasetsCallback",
    "ray.train.v2._internal.exceptions:RayTrainError",
    "ray.train.v2._internal.execution.callback:ControllerCallback.before_controller_shutdown",
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback.after_worker_group_poll_status",
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback.after_worker_group_start",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.get_worker_group_state",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.has_started",
    "ray.train.v2._internal.execution.worker_group:WorkerGroupPollStatus.errors",
    "ray.train.v2._internal.execution.worker_group:WorkerGroupPollStatus.finished",
    "ray.train.v2._internal.execution.worker_group:WorkerGroupState.shutdown",
    "ray.tune.experiment:Trial.last_result",
    "ray.tune.schedulers:ASHAScheduler.on_trial_add",
    "ray.tune.schedulers:ASHAScheduler.on_trial_result",
)
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
AUTOSCALER_STATUS = "__autoscaling_status"
POLL_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # of nodes that will go, a process more


def require(*packages: str) -> None:
    """Looks for the names used of these packages: another Ray is told in one line, and not when a name is needed.

    Raises: UserError.
    """
    import ray

    for name in NAMES:
        if name.startswith(packages):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError) as error:
                rule = "install the release that pyproject.toml asks for, or mend plates/ray_private.py"
                raise UserError(f"ray {ray.__version__} has no {name}: {rule}") from error


def ask_alive(address: str, token: str | None, certificates: list[bytes] | None, timeout_s: float) -> Any:
    """The gRPC status with which a Ray head answers to being asked whether it is alive; OK where it lets us in.

    Asked in Ray's own words, since importing Ray settles whether it offers a token. Ray's command for this,
    `ray health-check`, is "NOT a public API". Without it: ray.init tries a wrong address for minutes, and a cluster
    that wants a token needs RAY_AUTH_MODE.
    """
    import grpc

    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    tls = grpc.ssl_channel_credentials(*certificates) if certificates else None
    with grpc.secure_channel(address, tls) if tls else grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(CHECK_ALIVE)(b"", timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            return cast(grpc.Call, error).code()
    return grpc.StatusCode.OK


def count_coming() -> int:
    """Nodes that the cluster's autoscaler has asked its provider for and that have not joined yet.

    Ray shows them in `ray status` alone (ray-project/ray#11439); autoscalers v1 and v2 keep them in two places.
    Without it: 0, and a job gives up after ten seconds what a node on its way would hold.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches)
    report = json.loads(_internal_kv_get(AUTOSCALER_STATUS) or b"{}").get("autoscaler_report") or {}
    return len(report.get("pending_nodes", [])) + sum(report.get("pending_launches", {}).values())


def progress_bar(description: str, total: int, unit: str) -> Any:
    """A bar of a worker, drawn by the driver. Experimental. Without it: none, since Ray doubles a worker's lines."""
    from ray.experimental import tqdm_ray

    return tqdm_ray.tqdm(desc=description, total=total, unit=unit)


def ray_train_error() -> type[Exception]:
    """What Ray Train says of a run or a worker that went away, the error of a lost health check among it.

    Its public errors name only runs. Without it: a killed worker ends the run.
    """
    from ray.train.v2._internal.exceptions import RayTrainError

    return RayTrainError


def trainer_class(missing: list[dict[str, float]], seconds_to_grow: float) -> "type[TorchTrainer]":
    """A TorchTrainer for a group that lacks workers of these resources: it may grow, leaves nothing behind when it is
    lost, is polled every 0.2 s, can be interrupted, and starts as few processes as it can.

    Without POLL_INTERVAL: the end of a group is seen up to 2 s later. Without the next two, a group starts 2 s later
    on 2 cores: Ray Data's coordinator, which the controller waits for, starts beside it; Ray Data's manager, for data
    sets that we do not have, does not start.

    The callbacks come before Ray's, one of which fails where a worker is lost; those of RunConfig, and that is for
    the public UserCallback, come after them. They are shipped to the controller by value, which then imports nothing
    of ours.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.train import WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.util import placement_group, remove_placement_group

    os.environ.setdefault(POLL_INTERVAL, "0.2")
    get_or_create_autoscaling_coordinator()

    class ReleaseRoom(ControllerCallback, WorkerGroupCallback):
        """Gives back the placement group of workers that died between their start and their first line of training.

        Ray 2.60 forgets such a group, and the cleaner of ray-project/ray#58515 is not told of it before the callback
        that fails. Without it: its CPUs or GPUs are held until the job ends, and no group of the job is placed again.
        """

        group: Any = None

        def after_worker_group_start(self, worker_group: Any) -> None:
            self.group = worker_group

        async def before_controller_shutdown(self) -> None:
            """By now a group that Ray knows of is shut down."""
            if self.group is not None and self.group.has_started():
                self.group.get_worker_group_state().shutdown()

    class AskForMore(ControllerCallback, WorkerGroupCallback):
        """Asks for the room of the missing workers, which brings an autoscaler to replace their nodes; ends the group
        when some of it is there. What its workers stored is taken up, and at most ten seconds are lost.

        Ray's own elastic groups do not look for free room: see `run_on_ray`. Without it: a group stays small.
        """

        asked: Sequence[Any] = ()

        def after_worker_group_start(self, worker_group: Any) -> None:
            self.began_s = time.monotonic()
            self.asked = [placement_group([bundle]) for bundle in missing]

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            is_time = time.monotonic() - self.began_s > seconds_to_grow
            is_at_work = not worker_group_status.finished and not worker_group_status.errors
            if is_time and is_at_work and any(group.wait(0) for group in self.asked):
                raise WorkerGroupError("there is room for more workers", {})  # of a kind that reaches the driver

        async def before_controller_shutdown(self) -> None:
            for group in self.asked:
                remove_placement_group(group)

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            """Ours, and Ray's but for the one of Ray Data, which starts a process beside the workers."""
            of_ray = [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]
            return [ReleaseRoom(), AskForMore(), *of_ray]

        def _register_sigint_handler(self, controller: Any) -> None:
            """Without this: Ray's handler (ray-project/ray#53600) stays after the run and swallows every Ctrl-C."""

    return Trainer


def lasting_asha(**options: Any) -> "ASHAScheduler":
    """ASHA that knows again what trials scored before a sweep was cut off.

    Ray restores a sweep's trials, not its scheduler (ray-project/ray#30838). The last report of each trial therefore
    holds the scores of all its reports. Without it: a trial is compared with none that ended before, and fewer are
    stopped early. The hooks are of Ray's developer API.
    """
    from ray.tune.schedulers import ASHAScheduler

    class LastingASHA(ASHAScheduler):
        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, trial)
            for iteration, score in enumerate((trial.last_result or {}).get("scores", []), 1):
                self.on_trial_result(tune_controller, trial, {"training_iteration": iteration, "score": score})

    return LastingASHA(**options)


def limit_requests(client: "JobSubmissionClient", timeout_s: float) -> None:
    """A time limit for each request to the dashboard. Without it: one that answers no more is followed for ever."""
    client._do_request = partial(client._do_request, timeout=timeout_s)


def ray_version_of(client: "JobSubmissionClient") -> str:
    """The cluster's Ray. Its client's public `get_version` is that of the jobs' API, and a request of our own would
    lack the token. Without it: a job that another Ray cannot run is sent all the same."""
    return client._do_request("GET", "/api/version").json()["ray_version"]
