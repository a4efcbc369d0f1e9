"""The room of Ray Train's groups: given back where one is lost while it starts, asked for where one is too small."""

import time

from ray.train import WorkerGroupError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup


class ReleaseRoom(ControllerCallback, WorkerGroupCallback):
    """Gives back the placement group of workers that died between their start and their first line of training.

    Ray 2.60 forgets such a group without removing its placement group, which holds its CPUs or GPUs until the job
    ends, so that no group of the job is placed again. Ray Train finds this class by RAY_TRAIN_CALLBACKS, and calls
    callbacks named there before its own, of which one fails.
    """

    def __init__(self) -> None:
        self.group: WorkerGroup | None = None

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self.group = worker_group

    async def before_controller_shutdown(self) -> None:
        """By now a group that Ray knows of is shut down."""
        if self.group is not None and self.group.has_started():
            self.group.get_worker_group_state().shutdown()


class RoomForMoreError(WorkerGroupError):
    """Ends a group: there is room for a larger one. Of a kind that Ray hands on to the driver."""


class AskForMore(ControllerCallback, WorkerGroupCallback):
    """Asks for the room of the workers that a smaller group lacks, which brings an autoscaler to replace their nodes;
    ends the group when some of it is there. What its workers stored is taken up, and at most ten seconds are lost."""

    def __init__(self) -> None:
        self.asked: list[PlacementGroup] = []

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        self.config = train_run_context.train_loop_config or {}

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self.began_s = time.monotonic()
        self.asked = [placement_group([bundle]) for bundle in self.config["missing"]]

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        is_time = time.monotonic() - self.began_s > self.config["seconds_to_grow"]
        is_at_work = not worker_group_status.finished and not worker_group_status.errors
        if is_time and is_at_work and any(group.wait(0) for group in self.asked):
            raise RoomForMoreError("there is room for more workers", {})

    async def before_controller_shutdown(self) -> None:
        for group in self.asked:
            remove_placement_group(group)
