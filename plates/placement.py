"""The room of a Ray Train group that is lost while it starts, given back to the group that comes after it."""

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup


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
