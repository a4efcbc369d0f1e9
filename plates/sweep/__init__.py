"""The sweep: search space, trials, cross-validation, choice of the winner."""

import time
from dataclasses import replace
from functools import partial
from typing import cast

import pandas as pd

from plates.cluster import Plan
from plates.config import TuneConfig
from plates.head import HeadSettings
from plates.samples import Samples
from plates.sweep.head_trials import HeadSweep, run_head_trials
from plates.sweep.scores import Folds, Swept, draw_schedules, summarize, tabulate_trials
from plates.sweep.search import search_all
from plates.sweep.training_trials import run_training_trials
from plates.sweep.tuner import state_of
from plates.train_loop import build_model, compute_features, train
from plates.train_loop.task import Task
from plates.trainer import run_loop


def run_sweep(task: Task, folds: Folds, plan: Plan) -> Swept:
    """All trials by Ray Tune, then winner and baseline on all labelled images.

    With a frozen trunk the plan's workers compute the features once and every trial fits heads on them; else a trial
    is a training run of its own. Its state stays in the run directory, for the same command to take up.
    """
    if task.config.trainable != "head":
        return sweep_training(task, folds, plan)
    return (search_all if cast(TuneConfig, task.config).search == "all" else sweep_heads)(task, folds, plan)


def sweep_heads(task: Task, folds: Folds, plan: Plan) -> Swept:
    config = cast(TuneConfig, task.config)
    features, model, schedules = run_loop(compute_features, task, plan), build_model(task), draw_schedules(config)
    initial, labels = (model.head.weight.detach(), model.head.bias.detach()), task.dataset.train.labels
    start_s = time.perf_counter()
    sweep = HeadSweep(features.train, features.val, labels, initial, folds, schedules, config, task.class_weights)
    results = [result for ((_, result),) in run_head_trials(sweep, task, plan)]
    trials = tabulate_trials(results, schedules)
    figures = summarize(results, schedules, trials)
    winner = int(figures["winner/trial"])
    heads = sweep.fit([HeadSettings(**schedules[trial], indices=range(len(labels))) for trial in (winner, 0)])
    model.head.load_state_dict({"weight": heads.weight[0], "bias": heads.bias[0]})
    predicted = replace(features.test, logits=heads.logits(features.test.logits)[0])
    train_s = predicted.timings[0]["train_s"] + time.perf_counter() - start_s
    predicted.timings[0] |= {"train_s": train_s, "num_train_images": None}
    history, baseline = (pd.DataFrame(heads.history(head)) for head in (0, 1))
    return Swept(trials, figures, model.state_dict(), history, baseline, predicted, task)


def sweep_training(task: Task, folds: Folds, plan: Plan) -> Swept:
    config = cast(TuneConfig, task.config)
    schedules, state = draw_schedules(config), state_of(task, config.num_trials)
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
        loop = partial(train, has_reference=trial == winner)
        retrained[trial] = run_loop(loop, replace(task, **changes), plan)
    best = retrained[winner]
    train_s = trials_s + sum(trained.timings[0]["train_s"] for trained in retrained.values())
    best.timings[0] |= {"train_s": train_s, "num_train_images": None}
    history, baseline = (pd.DataFrame(retrained[trial].history) for trial in (winner, 0))
    return Swept(trials, figures, best.state, history, baseline, best.predicted, task)
