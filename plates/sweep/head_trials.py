"""Trials of a frozen trunk: all folds of a schedule are heads fitted at once."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from plates.cluster import start_ray
from plates.config import TuneConfig
from plates.head import Heads, HeadSettings, fit_heads
from plates.storage import Place
from plates.sweep.scores import Folds, Schedule, TrialResult, score_images, score_trial
from plates.sweep.tuner import tune_all


@dataclass(frozen=True)
class HeadSweep:
    """What all trials of a head sweep read: (V, N, F) views and (N, F) eval features of all labelled images."""

    train: Tensor
    val: Tensor
    labels: Tensor
    initial: tuple[Tensor, Tensor]
    folds: Folds
    schedules: list[Schedule]
    config: TuneConfig

    def fit(self, settings: list[HeadSettings]) -> Heads:
        epochs, global_batch_size, seed = self.config.epochs, self.config.global_batch_size, self.config.seed
        return fit_heads(self.train, self.labels, settings, self.initial, epochs=epochs,
                         global_batch_size=global_batch_size, seed=seed)  # fmt: skip


def score_schedule(data: HeadSweep, schedule: Schedule) -> TrialResult:
    """All folds of one schedule, and those of nested cross-validation, fitted at once."""
    folds = data.folds.in_turn()
    heads = data.fit([HeadSettings(**schedule, indices=train.tolist()) for train, _ in folds])
    scores = score_images(heads.logits(data.val), data.labels)  # (2, H, N)
    return score_trial(data.folds, [scores[:, head, held] for head, (_, held) in enumerate(folds)])


def run_head_trials(data: HeadSweep, state: Place) -> list[TrialResult]:
    """All trials of a head sweep by Ray Tune, in trial order; a sweep that was cut off goes on from `state`.

    A class Trainable with reused actors costs milliseconds a trial; the features go through the object store once.
    """
    # One small file a trial is what resuming needs, trials.csv has the rest.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    start_ray()
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    class HeadTrial(tune.Trainable):
        def setup(self, config: dict[str, Any], data: HeadSweep) -> None:
            torch.set_num_threads(1)
            self.data, self.index = data, config["index"]

        def step(self) -> dict[str, Any]:
            result = score_schedule(self.data, self.data.schedules[self.index])
            return {**asdict(result), "index": self.index, "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.index = new_config["index"]
            return True

    trainable = tune.with_parameters(HeadTrial, data=data)
    return tune_all(trainable, len(data.schedules), state, callbacks=[JsonLoggerCallback()], reuse_actors=True)
