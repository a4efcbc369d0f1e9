"""Trials of a frozen trunk: all folds of a schedule are heads fitted at once."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plates.cluster import start_ray
from plates.config import TuneConfig
from plates.head import HeadSettings, fit_heads
from plates.storage import Place
from plates.sweep.scores import Folds, score_images
from plates.sweep.tuner import tune_all


@dataclass(frozen=True)
class HeadSweep:
    """What all trials of a head sweep read: (V, N, F) views and (N, F) eval features of all labelled images."""

    train: Tensor
    val: Tensor
    labels: Tensor
    initial: tuple[Tensor, Tensor]
    folds: Folds
    schedules: list[dict[str, Any]]
    config: TuneConfig


def score_schedule(data: HeadSweep, schedule: dict[str, Any]) -> dict[str, Any]:
    """All folds of one schedule, and those of nested cross-validation, fitted at once.

    Returns: mean log_loss and accuracy; log_loss by fold, by repeat, and by image averaged over repeats;
        and for each outer fold of the nested ones the inner log-loss and the outer image losses.
    """
    every = [*data.folds.repeated]
    for outer, inner in data.folds.nested:
        every += [outer, *inner]
    heads = fit_heads(
        data.train,
        data.labels,
        [HeadSettings(**schedule, indices=train.tolist()) for train, _ in every],
        data.initial,
        epochs=data.config.epochs,
        global_batch_size=data.config.global_batch_size,
        seed=data.config.seed,
    )
    logits = heads.logits(data.val)  # (H, N, C)
    losses, is_right = score_images(logits, data.labels)  # (H, N)
    places = [torch.tensor(held) for _, held in every]
    held_out = [(losses[h, held], is_right[h, held]) for h, held in enumerate(places)]
    num_folds, num_repeats = data.config.folds, data.config.cv_repeats
    image_losses = torch.zeros(num_repeats, len(data.labels))
    image_right = torch.zeros(num_repeats, len(data.labels))
    for h, held in enumerate(places[: len(data.folds.repeated)]):
        image_losses[h // num_folds, held], image_right[h // num_folds, held] = held_out[h]
    nested_inner, nested_outer = [], []
    place = len(data.folds.repeated)
    for _, inner in data.folds.nested:
        nested_outer.append([values.tolist() for values in held_out[place]])
        inner_losses = torch.cat([loss for loss, _ in held_out[place + 1 : place + 1 + len(inner)]])
        nested_inner.append(float(inner_losses.mean()))
        place += 1 + len(inner)
    return {
        "log_loss": float(image_losses.mean()),
        "accuracy": float(image_right.mean()),
        "fold_log_losses": [float(loss.mean()) for loss, _ in held_out[: len(data.folds.repeated)]],
        "repeat_log_losses": image_losses.mean(1).tolist(),
        "image_log_losses": image_losses.mean(0).tolist(),
        "nested_inner": nested_inner,
        "nested_outer": nested_outer,
    }


def run_head_trials(data: HeadSweep, state: Place) -> list[dict[str, Any]]:
    """All trials of a head sweep by Ray Tune, in trial order; a sweep that was cut off goes on from `state`.

    A class Trainable with reused actors costs milliseconds a trial; the features go through the object store once.
    """
    # A trial costs milliseconds: one small file each is what resuming needs, trials.csv has the rest.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    start_ray()
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    class HeadTrial(tune.Trainable):
        def setup(self, config: dict[str, Any], data: HeadSweep) -> None:
            torch.set_num_threads(1)
            self.data = data
            self.index = config["index"]

        def step(self) -> dict[str, Any]:
            return {**score_schedule(self.data, self.data.schedules[self.index]), "index": self.index, "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.index = new_config["index"]
            return True

    trainable = tune.with_parameters(HeadTrial, data=data)
    return tune_all(trainable, len(data.schedules), state, callbacks=[JsonLoggerCallback()], reuse_actors=True)
