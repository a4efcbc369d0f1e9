"""Trials of a frozen trunk: all folds of a candidate are heads fitted at once."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from plates.address import start_ray
from plates.cluster import Plan, find_room
from plates.config import TuneConfig
from plates.head import Heads, HeadSettings, fit_heads
from plates.sweep.readout_trials import Pass, numbers_of_views, score_readouts
from plates.sweep.scores import Folds, Schedule, TrialResult, score_images, score_trial
from plates.sweep.tuner import state_of, tune_all
from plates.train_loop.task import Task

Scored = tuple[Schedule, TrialResult]


@dataclass(frozen=True)
class HeadSweep:
    """What all trials of a sweep of heads read.

    (V, N, F) views and (N, F) eval features of all labelled images, and how much each class counts in training, in
    all folds alike; of a search of all also its passes, each of which is tried with one view and with all of them,
    the seconds that are likely for a trial, by its number of views, and the time by which all but the first must end.
    """

    train: Tensor
    val: Tensor
    labels: Tensor
    initial: tuple[Tensor, Tensor]
    folds: Folds
    schedules: list[Schedule]
    config: TuneConfig
    class_weights: Sequence[float]
    passes: Sequence[Pass] = ()
    trial_s: dict[int, float] = field(default_factory=dict)
    deadline: float = inf

    @property
    def trials(self) -> list[int | tuple[Pass, int]]:
        """The baseline's schedule; each pass and number of views; the other schedules by their index."""
        of_passes = [(found, num_views) for found in self.passes for num_views in numbers_of_views(found.features)]
        return [0, *of_passes, *range(1, len(self.schedules))]

    def fit(self, settings: list[HeadSettings]) -> Heads:
        epochs, global_batch_size, seed = self.config.epochs, self.config.global_batch_size, self.config.seed
        return fit_heads(self.train, self.labels, settings, self.initial, class_weights=self.class_weights,
                         epochs=epochs, global_batch_size=global_batch_size, seed=seed)  # fmt: skip


def score_schedule(data: HeadSweep, schedule: Schedule) -> TrialResult:
    """All folds of one schedule, and those of nested cross-validation, fitted at once."""
    folds, lr, step_size, gamma = data.folds.in_turn(), schedule["lr"], schedule["step_size"], schedule["gamma"]
    heads = data.fit(
        [HeadSettings(lr=lr, step_size=step_size, gamma=gamma, indices=train.tolist()) for train, _ in folds]
    )
    scores = score_images(heads.logits(data.val), data.labels)  # (2, H, N)
    return score_trial(data.folds, [scores[:, head, held] for head, (_, held) in enumerate(folds)])


def score_trial_of(data: HeadSweep, index: int, seconds: dict[int, float]) -> list[Scored]:
    """The candidates of a trial; none where it would end too late.

    seconds: by number of views how long the last such trial took in this process, where this one is put down; 0 views
        are a schedule's.
    """
    trial, start_s = data.trials[index], time.time()
    num_views = 0 if isinstance(trial, int) else trial[1]
    if index and start_s + seconds.get(num_views, data.trial_s.get(num_views, 0.0)) > data.deadline:
        return []
    if isinstance(trial, int):
        scored = [(data.schedules[trial], score_schedule(data, data.schedules[trial]))]
    else:
        scored = score_readouts(*trial, data.labels, data.class_weights, data.folds, data.config.tta)
    seconds[num_views] = time.time() - start_s
    return scored


def run_head_trials(data: HeadSweep, task: Task, plan: Plan) -> list[list[Scored]]:
    """All trials of a head sweep by Ray Tune, in trial order; a sweep that was cut off goes on.

    A class Trainable with reused actors costs milliseconds a trial; the features go through the object store once.
    """
    # One small file a trial is what resuming needs, trials.csv has the rest.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    if plan.num_workers:  # Tune itself would wait for a CPU without a word and for ever
        find_room(replace(plan, num_workers=1, device="cpu", cpus_per_worker=1))
    start_ray()
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    class HeadTrial(tune.Trainable):
        def setup(self, config: dict[str, Any], data: HeadSweep) -> None:
            torch.set_num_threads(1)
            self.data, self.index, self.seconds = data, config["index"], {}

        def step(self) -> dict[str, Any]:
            scored = score_trial_of(self.data, self.index, self.seconds)
            return {"scored": [(settings, asdict(result)) for settings, result in scored],
                    "index": self.index, "done": True}  # fmt: skip

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.index = new_config["index"]
            return True

    num_trials, trainable = len(data.trials), tune.with_parameters(HeadTrial, data=data)
    reports = tune_all(
        trainable, num_trials, state_of(task, num_trials), callbacks=[JsonLoggerCallback()], reuse_actors=True
    )
    return [[(settings, TrialResult(**result)) for settings, result in report["scored"]] for report in reports]
