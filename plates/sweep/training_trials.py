"""Trials that train more than the head: each fold is a Ray Train run, and poor trials are stopped early."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any, cast

import numpy as np

from plates.address import start_ray
from plates.cluster import Node, Plan, list_nodes, plural, share_cpus
from plates.config import TuneConfig, UserError
from plates.ray_private import lasting_asha, require
from plates.rundir import write_json
from plates.samples import Samples
from plates.storage import Place, remove_tree
from plates.sweep.scores import Folds, Schedule, TrialResult, score_images, score_trial
from plates.sweep.tuner import tune_all
from plates.train_loop import train
from plates.train_loop.task import Task
from plates.trainer import run_loop

DRIVER_MEMORY_BYTES = 1 << 20
WORST_SCORE = 1e30  # for ASHA, whose quantiles cannot be told with infinities among the scores
# Of a worker, where several trials run on CPUs. With 8 images at 224 px (ResNet18, bf16) 2 cores trained 1.5 to 1.65
# times as fast as 1 (best of 2 to 4 runs on a shared AMD EPYC). By Amdahl's law, extrapolated, 4 would 2.3 and 8 2.9
# times: from two on, cores give more to another trial.
MIN_CPUS_PER_WORKER = 2


def run_training_trials(
    task: Task, folds: Folds, schedules: list[Schedule], plan: Plan, state: Place
) -> list[TrialResult]:
    """All trials in trial order. A trial reports after each fold, and ASHA stops the poor ones after one repeat.

    A trial's own process takes no CPU and its workers take what the plan gives each, so as many trials run at a time
    as their workers find room for, and none waits for a CPU that another trial's driver holds.
    """
    start_ray()
    require("ray.tune")
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback

    config = cast(TuneConfig, task.config)
    plan, num_concurrent = pack_trials(plan, config, list_nodes())
    each = f"{plural(plan.num_workers, 'Ray worker')} of {plural(plan.cpus_per_worker, 'CPU')}"
    print(f"{plural(num_concurrent, 'trial')} at a time, each on {each}", flush=True)

    def drive_trial(point: dict[str, Any], task: Task, folds: Folds) -> None:
        index, scores = point["index"], []
        for result in score_folds(task, folds, schedules[index], plan, state / "folds" / str(index)):
            scores.append(min(result.log_loss, WORST_SCORE))
            tune.report({**asdict(result), "index": index, "score": scores[-1], "scores": [*scores]})

    # Tune wants a trial to reserve something; a little memory leaves all CPUs to the workers.
    room = tune.PlacementGroupFactory([{"memory": DRIVER_MEMORY_BYTES}])
    trainable = tune.with_resources(tune.with_parameters(drive_trial, task=task, folds=folds), room)
    scheduler = lasting_asha(
        metric="score", mode="min", max_t=len(folds.repeated), grace_period=config.folds, reduction_factor=2
    )
    callbacks = [JsonLoggerCallback(), TBXLoggerCallback()]  # a sweep of heads turns Tune's own choice off
    reports = tune_all(trainable, len(schedules), state, callbacks=callbacks, scheduler=scheduler,
                       max_concurrent_trials=num_concurrent)  # fmt: skip
    for trial in state.iterdir() if config.log_to == "tensorboard" else ():
        for file in trial.iterdir() if trial.is_dir() else ():
            if file.name.startswith("events.out.tfevents"):
                target = task.run / "tensorboard" / trial.name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    return [TrialResult(**{field.name: report[field.name] for field in fields(TrialResult)}) for report in reports]


def pack_trials(plan: Plan, config: TuneConfig, nodes: list[Node]) -> tuple[Plan, int]:
    """The plan of one trial, and how many trials run at a time: as many as there is room for.

    A trial is one Ray worker, or the workers of a `--num-workers` that was given. Each has its GPU, and the CPUs that
    were asked for, else an equal share: on CPUs at least two, unless not even one trial could have them.

    Raises: UserError where not even one trial fits.
    """
    num_workers = 1 if config.num_workers == "auto" else max(1, plan.num_workers)
    num_units = sum(node.num_gpus if plan.device == "cuda" else node.num_cpus for node in nodes)
    alone = config.cpus_per_worker or 1
    beside = config.cpus_per_worker or (1 if plan.device == "cuda" else MIN_CPUS_PER_WORKER)
    for num_concurrent in range(max(1, min(config.num_trials, num_units // num_workers)), 0, -1):
        cpus = share_cpus(num_workers * num_concurrent, plan.device, nodes)
        if cpus and cpus >= (beside if num_concurrent > 1 else alone):
            cpus = config.cpus_per_worker or cpus
            room = replace(plan, num_workers=num_workers, cpus_per_worker=cpus, uses_whole_nodes=False)
            return room, num_concurrent
    asked = f", --cpus-per-worker {config.cpus_per_worker}" if config.cpus_per_worker else ""
    raise UserError(f"--num-workers {num_workers}{asked}: the cluster has no room for the workers of one trial")


def score_folds(task: Task, folds: Folds, schedule: Schedule, plan: Plan, folder: Place) -> Iterator[TrialResult]:
    """Trains fold by fold; after each yields the scores so far.

    A fold's scores are kept in `folder`, its training state, which is large, only until they are there.
    """
    samples = task.dataset.train
    held_out = []
    for index, (kept, held) in enumerate(folds.repeated):
        file = folder / f"{index}.json"
        if not file.exists():
            dataset = replace(task.dataset, train=samples.take(kept), val=samples.take(held), test=Samples.of())
            fold = replace(task, config=replace(task.config, **schedule), dataset=dataset, run=folder / f"{index}")
            logits = run_loop(partial(train, has_reference=False), fold, plan).val_logits
            write_json(file, score_images(logits, dataset.val.labels).tolist())
            remove_tree(fold.run)
        scores = np.array(json.loads(file.read_text()), dtype=float)  # (2, n), null where infinite
        held_out.append(np.where(np.isnan(scores), np.inf, scores))
        yield score_trial(folds, held_out)
