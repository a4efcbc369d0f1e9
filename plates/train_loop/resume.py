"""The state of end-to-end training, stored between epochs: a run that is cut off goes on from its last one."""

import json
import time
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import nn

from plates.rundir import STATE_FILE, write_whole
from plates.train_loop.group import Worker, broadcast
from plates.train_loop.task import Task, task_key

SECONDS_PER_STATE = 10.0  # of training that a run may lose
TOLD = "told"  # the JSON beside the tensors, as bytes


class SavedState:
    """Parameters, Adam's moments, the schedule, the loss scale and the history after an epoch, in one file.

    It is taken up only by a task of the same key.
    """

    def __init__(
        self,
        task: Task,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Adam,
        scheduler: torch.optim.lr_scheduler.StepLR,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.path = task.run / STATE_FILE
        self.key = task_key(task)
        self.parameters = parameters
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.history: list[dict[str, float]] = []
        self.num_skipped_steps = 0
        self.saved_at = time.monotonic()

    def num_taken_steps(self) -> int:
        """Steps that Adam has counted: not those that an overflow skipped."""
        return int(self.optimizer.state[self.parameters[0]].get("step", 0))

    def add_epoch(self, row: dict[str, float], num_skipped_steps: int) -> None:
        self.history.append(row)
        self.num_skipped_steps += num_skipped_steps

    def save(self, is_last: bool) -> None:
        """After an epoch, on rank 0: stores the state where enough was trained that could be lost."""
        if not is_last and time.monotonic() - self.saved_at < SECONDS_PER_STATE:
            return
        tensors = {f"parameter/{i}": p.detach().cpu().contiguous() for i, p in enumerate(self.parameters)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{name}/{i}": value.cpu().contiguous() for name, value in moments.items()}
        told = {
            "key": self.key,
            "history": self.history,
            "num_skipped_steps": self.num_skipped_steps,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        tensors[TOLD] = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        write_whole(self.path, lambda file: save_file(tensors, file))
        self.saved_at = time.monotonic()

    def restore(self, worker: Worker) -> None:
        """Takes up what rank 0 finds, on every worker; nothing where nothing is found."""
        found = broadcast(self.path.read_bytes() if worker.rank == 0 and self.path.exists() else None)
        if not found:
            return
        tensors = load(found)
        told = json.loads(tensors.pop(TOLD).numpy().tobytes())
        if told["key"] != self.key:
            return
        groups = self.optimizer.state_dict()["param_groups"]
        states: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            kind, _, index = name.partition("/")
            if kind == "parameter":
                with torch.no_grad():
                    self.parameters[int(index)].copy_(value)
            else:
                # As the parameter lies in memory: Adam's fused kernel pairs the values of both by their order there.
                alike = torch.empty_like(self.parameters[int(index)]).copy_(value) if value.dim() else value
                states.setdefault(int(index), {})[kind] = alike
        groups[0]["lr"] = told["scheduler"]["_last_lr"][0]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.scheduler.load_state_dict(told["scheduler"])
        self.scaler.load_state_dict(told["scaler"])
        self.history, self.num_skipped_steps = told["history"], told["num_skipped_steps"]
