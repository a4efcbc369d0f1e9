"""The state of end-to-end training, stored between epochs: a run that is cut off goes on from its last one."""

import io
import time

import torch
from torch import nn

from plates.head import make_optimizer
from plates.rundir import STATE_FILE, write_atomically
from plates.train_loop.group import Worker, broadcast
from plates.train_loop.task import Task, task_key

SECONDS_PER_STATE = 10.0  # of training that a run may lose
# At the start; with torch's 65536 drawn plates lost one of their first 5 steps, which matter most.
LOSS_SCALE = 1024.0


class SavedState:
    """Parameters, Adam's moments, the schedule, the loss scale and the history after an epoch, in one file.

    It is taken up only by a task of the same key.
    """

    def __init__(self, task: Task, parameters: list[nn.Parameter], device: torch.device) -> None:
        config = task.config
        self.path = task.run / STATE_FILE
        self.key = task_key(task)
        self.parameters = parameters
        self.optimizer, self.scheduler = make_optimizer(parameters, config.lr, config.step_size, config.gamma)
        self.scaler = torch.amp.GradScaler(device.type, LOSS_SCALE, enabled=task.precision == "fp16")
        self.history: list[dict[str, float]] = []
        self.saved_at = time.monotonic()

    def num_taken_steps(self) -> int:
        """Steps that Adam has counted: not those that an overflow skipped."""
        return int(self.optimizer.state[self.parameters[0]].get("step", 0))

    def save(self, is_last: bool) -> None:
        """After an epoch, on rank 0: stores the state where enough was trained that could be lost."""
        if not is_last and time.monotonic() - self.saved_at < SECONDS_PER_STATE:
            return
        buffer = io.BytesIO()  # torch.save to a disk does not say that it is full
        state = {
            "key": self.key,
            "history": self.history,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        torch.save(state, buffer)
        write_atomically(self.path, lambda file: file.write_bytes(buffer.getbuffer()))
        self.saved_at = time.monotonic()

    def restore(self, worker: Worker) -> None:
        """Takes up what rank 0 finds, on every worker; nothing where nothing is found."""
        stored = broadcast(self.path.read_bytes() if worker.rank == 0 and self.path.exists() else None)
        state = stored and torch.load(io.BytesIO(stored), "cpu", weights_only=True)
        if not state or state["key"] != self.key:
            return
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]
