"""Trials that train more than the head: each fold is a Ray Train run, and poor trials are stopped early."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
from torch.nn.functional import cross_entropy

from plates.cluster import Plan, list_nodes, share_cpus, start_ray
from plates.config import TuneConfig, UserError
from plates.sweep.scores import Folds
from plates.sweep.tuner import STATE_FOLDER, tune_all
from plates.train_loop import train
from plates.train_loop.group import labels_of
from plates.train_loop.task import Task
from plates.trainer import run_loop

DRIVER_MEMORY_BYTES = 1 << 20


def run_training_trials(
    task: Task, folds: Folds, schedules: list[dict[str, Any]], plan: Plan
) -> list[dict[str, Any]]:
    """All trials in trial order. A trial reports after each fold, and ASHA stops the poor ones after one repeat.

    A trial's own process takes no CPU and its workers take what the plan gives each, so as many trials run at a time
    as their workers find room for, and none waits for a CPU that another trial's driver holds.
    """
    start_ray()
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback
    from ray.tune.schedulers import ASHAScheduler

    config = cast(TuneConfig, task.config)
    plan, num_concurrent = pack_trials(plan)

    def drive_trial(point: dict[str, Any], task: Task, folds: Folds) -> None:
        for result in score_folds(task, folds, schedules[point["index"]], plan, point["index"]):
            tune.report({**result, "index": point["index"]})

    # Tune wants a trial to reserve something; a little memory leaves all CPUs to the workers.
    room = tune.PlacementGroupFactory([{"memory": DRIVER_MEMORY_BYTES}])
    trainable = tune.with_resources(tune.with_parameters(drive_trial, task=task, folds=folds), room)
    scheduler = ASHAScheduler(
        metric="log_loss", mode="min", max_t=len(folds.repeated), grace_period=config.folds, reduction_factor=2
    )
    callbacks = [
        JsonLoggerCallback(),
        TBXLoggerCallback(),
    ]  # a sweep of heads turns Tune's own choice off
    results = tune_all(trainable, len(schedules), task.run, callbacks=callbacks, scheduler=scheduler,
                       max_concurrent_trials=num_concurrent)  # fmt: skip
    for trial in (task.run / STATE_FOLDER).iterdir():
        for file in trial.iterdir() if trial.is_dir() else ():
            if file.name.startswith("events.out.tfevents"):
                target = task.run / "tensorboard" / trial.name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    return results


def pack_trials(plan: Plan) -> tuple[Plan, int]:
    """The plan of one trial, with at least one Ray worker, and how many trials fit at a time.

    On GPUs each trial takes its workers' GPUs and an equal part of the CPUs; CPU trials run one after another, since
    each already uses all cores.
    """
    nodes = list_nodes()
    num_workers = max(1, plan.num_workers)
    num_gpus = sum(node.num_gpus for node in nodes)
    num_concurrent = max(1, num_gpus // num_workers) if plan.device == "cuda" else 1
    cpus = share_cpus(num_workers * num_concurrent, plan.device, nodes)
    if cpus is None:
        raise UserError(f"--num-workers {num_workers}: the cluster has no room for the workers of one trial")
    return replace(plan, num_workers=num_workers, cpus_per_worker=cpus), num_concurrent


def score_folds(
    task: Task, folds: Folds, schedule: dict[str, Any], plan: Plan, index: int
) -> Iterator[dict[str, Any]]:
    """Trains fold by fold; after each yields the scores so far, as `score_schedule` does of all at once."""
    samples, num_folds = task.dataset.train, cast(TuneConfig, task.config).folds
    num_repeats = len(folds.repeated) // num_folds
    losses = np.full((num_repeats, len(samples)), np.nan)
    is_right = np.full((num_repeats, len(samples)), np.nan)
    fold_losses: list[float] = []
    for place, (kept, held) in enumerate(folds.repeated):
        dataset = replace(task.dataset, train=tuple(samples[i] for i in kept), val=tuple(samples[i] for i in held))
        folder = task.run / STATE_FOLDER / "folds" / f"{index}-{place}"
        fold = replace(task, config=replace(task.config, **schedule), dataset=dataset, run=folder)
        logits = run_loop(train, fold, plan).val_logits
        labels = labels_of(dataset.val)
        losses[place // num_folds, held] = cross_entropy(logits, labels, reduction="none").numpy()
        is_right[place // num_folds, held] = (logits.argmax(1) == labels).numpy()
        fold_losses.append(float(losses[place // num_folds, held].mean()))
        seen = slice(0, place // num_folds + 1)
        yield {
            "log_loss": float(np.nanmean(losses)),
            "accuracy": float(np.nanmean(is_right)),
            "fold_log_losses": list(fold_losses),
            "repeat_log_losses": np.nanmean(losses[seen], axis=1).tolist(),
            "image_log_losses": [
                float(np.nanmean(column)) if np.isfinite(column).any() else 0.0 for column in losses.T
            ],
            "nested_inner": [],
            "nested_outer": [],
        }
