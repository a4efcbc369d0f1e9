"""The sweep: search space, trials, cross-validation, choice of the winner."""

import time
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
from torch import Tensor

from plates.cluster import Plan, find_room
from plates.config import TuneConfig
from plates.dataset import Samples
from plates.head import HeadSettings
from plates.sweep.head_trials import HeadSweep, run_head_trials
from plates.sweep.scores import Folds, summarize, tabulate_trials
from plates.sweep.training_trials import run_training_trials
from plates.sweep.tuner import state_of
from plates.train_loop import build_model, compute_features, train
from plates.train_loop.task import Predicted, Task
from plates.trainer import run_loop

LR_RANGE, GAMMA_RANGE = (1e-4, 3e-2), (0.05, 1.0)


@dataclass(frozen=True)
class Swept:
    """The sweep's outcome: trials.csv, flat figures, and the winner retrained beside the baseline.

    In the timing rows of `predicted` rank 0 stands for the driver and its trials, with no count of images: in its
    seconds more was done than to compute them.
    """

    trials: pd.DataFrame
    figures: dict[str, float | int]
    state: dict[str, Tensor]
    history: pd.DataFrame
    baseline_history: pd.DataFrame
    predicted: Predicted  # by the winner


def run_sweep(task: Task, folds: Folds, plan: Plan) -> Swept:
    """All trials by Ray Tune, then winner and baseline on all labelled images.

    With a frozen trunk the plan's workers compute the features once and every trial fits heads on them; else a trial
    is a training run of its own. Its state stays in the run directory, for the same command to take up.
    """
    sweep = sweep_heads if task.config.trainable == "head" else sweep_training
    return sweep(task, folds, plan)


def sweep_heads(task: Task, folds: Folds, plan: Plan) -> Swept:
    config = cast(TuneConfig, task.config)
    features, model, schedules = run_loop(compute_features, task, plan), build_model(task), draw_schedules(config)
    initial, labels = (model.head.weight.detach(), model.head.bias.detach()), task.dataset.train.labels
    start_s = time.perf_counter()
    sweep = HeadSweep(features.train, features.val, labels, initial, folds, schedules, config)
    if plan.num_workers:  # Tune itself would wait for a CPU without a word and for ever
        find_room(replace(plan, num_workers=1, device="cpu", cpus_per_worker=1))
    results = run_head_trials(sweep, state_of(task))
    trials = tabulate_trials(results, schedules)
    figures = summarize(results, schedules, trials)
    winner = int(figures["winner/trial"])
    heads = sweep.fit([HeadSettings(**schedules[trial], indices=range(len(labels))) for trial in (winner, 0)])
    model.head.load_state_dict({"weight": heads.weight[0], "bias": heads.bias[0]})
    predicted = Predicted(heads.logits(features.test)[0], features.errors, features.timings)
    train_s = features.timings[0]["train_s"] + time.perf_counter() - start_s
    predicted.timings[0] |= {"train_s": train_s, "num_train_images": None}
    history, baseline = (pd.DataFrame(heads.history(head)) for head in (0, 1))
    return Swept(trials, figures, model.state_dict(), history, baseline, predicted)


def sweep_training(task: Task, folds: Folds, plan: Plan) -> Swept:
    schedules, state = draw_schedules(cast(TuneConfig, task.config)), state_of(task)
    start_s = time.perf_counter()
    results = run_training_trials(task, folds, schedules, plan, state)
    trials = tabulate_trials(results, schedules)
    figures = summarize(results, schedules, trials)
    winner = int(figures["winner/trial"])
    trials_s = time.perf_counter() - start_s
    retrained = {}
    for trial in {winner, 0}:
        test = task.dataset.test if trial == winner else Samples.of()
        changes = {
            "config": replace(task.config, **schedules[trial]),
            "dataset": replace(task.dataset, val=Samples.of(), test=test),
            "run": state / f"retrained-{trial}",
            "submitted_at": time.time(),
        }
        retrained[trial] = run_loop(train, replace(task, **changes), plan)
    best = retrained[winner]
    train_s = trials_s + sum(trained.timings[0]["train_s"] for trained in retrained.values())
    best.timings[0] |= {"train_s": train_s, "num_train_images": None}
    history, baseline = (pd.DataFrame(retrained[trial].history) for trial in (winner, 0))
    return Swept(trials, figures, best.state, history, baseline, best.predicted)


def draw_schedules(config: TuneConfig) -> list[dict[str, Any]]:
    """Trial 0, the baseline, is the settings' own; the others are random: log-uniform lr, the rest uniform."""
    draw = np.random.default_rng(config.seed)
    schedules: list[dict[str, Any]] = [{"lr": config.lr, "step_size": config.step_size, "gamma": config.gamma}]
    for _ in range(config.num_trials - 1):
        lr, step_size = np.exp(draw.uniform(*np.log(LR_RANGE))), draw.integers(1, config.epochs + 1)
        gamma = draw.uniform(*GAMMA_RANGE)
        schedules.append({"lr": float(lr), "step_size": int(step_size), "gamma": float(gamma)})
    return schedules
