"""The sweep: search space, trials, cross-validation, choice of the winner."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedKFold
from torch import Tensor
from torch.nn.functional import cross_entropy

from plates.cluster import Plan, start_ray
from plates.config import TuneConfig, UserError
from plates.dataset import Sample
from plates.head import HeadSettings, fit_heads
from plates.model import build_classifier
from plates.train_loop import compute_features
from plates.train_loop.frozen import history_of
from plates.train_loop.group import labels_of
from plates.train_loop.task import Task
from plates.trainer import run_loop

STATE_FOLDER = ".ray_tune"  # Tune's own bookkeeping inside the run directory, gone when the sweep is done
LR_RANGE, GAMMA_RANGE = (1e-4, 3e-2), (0.05, 1.0)
PUBLISHED = {"lr": 1e-3, "step_size": 7, "gamma": 0.1}
STANDARD_ERRORS = 1.96

Fold = tuple[np.ndarray, np.ndarray]  # indices of training images, of held-out images


@dataclass(frozen=True)
class Folds:
    """Cross-validation over the labelled images: repeated folds, and outer folds each with its inner ones."""

    repeated: list[Fold]
    nested: list[tuple[Fold, list[Fold]]]


@dataclass(frozen=True)
class Swept:
    """The sweep's outcome: trials.csv, flat figures, and the winner retrained beside the baseline."""

    trials: pd.DataFrame
    figures: dict[str, float | int]
    state: dict[str, Tensor]
    history: pd.DataFrame
    baseline_history: pd.DataFrame
    timings: list[dict[str, Any]]
    precision: str


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


def run_sweep(task: Task, folds: Folds, plan: Plan, run: Path) -> Swept:
    """All trials by Ray Tune on one set of stored features, then winner and baseline on all labelled images.

    The features are computed once by the plan's workers; every trial fits heads on them.
    """
    config = cast(TuneConfig, task.config)
    features, timings, precision = run_loop(compute_features, task, plan, run)
    weights = task.weights
    model = build_classifier(weights.backbone, weights.state, len(task.dataset.classes), config.seed)
    initial = (model.head.weight.detach(), model.head.bias.detach())
    labels = labels_of(task.dataset.train)
    schedules = draw_schedules(config)
    start_s = time.perf_counter()
    sweep = HeadSweep(features.train, features.val, labels, initial, folds, schedules, config)
    results = run_head_trials(sweep, run)
    trials = tabulate_trials(results, schedules)
    winner = int(trials["is_winner"].to_numpy().argmax())
    heads = fit_heads(
        features.train,
        labels,
        [HeadSettings(**schedules[trial], indices=range(len(labels))) for trial in (winner, 0)],
        initial,
        epochs=config.epochs,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
    )
    model.head.load_state_dict({"weight": heads.weight[0], "bias": heads.bias[0]})
    figures = summarize(results, schedules, trials)
    histories = [pd.DataFrame(history_of(heads, head)) for head in (0, 1)]
    figures |= {key: float(histories[0][key].iloc[-1]) for key in ("train/loss", "train/accuracy")}
    timings[0]["train_s"] += time.perf_counter() - start_s  # rank 0 stands for the driver and its trials
    shutil.rmtree(run / STATE_FOLDER, ignore_errors=True)
    return Swept(trials, figures, model.state_dict(), histories[0], histories[1], timings, precision)


def draw_schedules(config: TuneConfig) -> list[dict[str, Any]]:
    """Trial 0 is the published schedule; the others are random: log-uniform lr, integer step_size, uniform gamma."""
    draw = np.random.default_rng(config.seed)
    schedules = [dict(PUBLISHED)]
    for _ in range(config.num_trials - 1):
        schedules.append(
            {
                "lr": float(np.exp(draw.uniform(*np.log(LR_RANGE)))),
                "step_size": int(draw.integers(1, config.epochs + 1)),
                "gamma": float(draw.uniform(*GAMMA_RANGE)),
            }
        )
    return schedules


def make_folds(samples: Sequence[Sample], config: TuneConfig) -> Folds:
    """Repeated stratified folds over the images (all views of an image are on one side), and nested ones.

    Raises: UserError where a class has fewer images than folds, or than the inner folds need.
    """
    labels = np.array([sample.label for sample in samples])
    smallest = int(np.bincount(labels).min())
    most = smallest - -(-smallest // config.folds)  # the inner folds see all but one outer fold
    if config.folds > most:
        raise UserError(f"--folds {config.folds}: the smallest class has {smallest} images; lower it, or add images")
    blank = np.zeros(len(labels))
    repeated = RepeatedStratifiedKFold(n_splits=config.folds, n_repeats=config.cv_repeats, random_state=config.seed)
    outer = StratifiedKFold(config.folds, shuffle=True, random_state=config.seed + 1)
    inner = StratifiedKFold(config.folds, shuffle=True, random_state=config.seed + 2)
    nested = [
        ((rest, held), [(rest[a], rest[b]) for a, b in inner.split(blank[rest], labels[rest])])
        for rest, held in outer.split(blank, labels)
    ]
    return Folds(list(repeated.split(blank, labels)), nested)


def score_schedule(data: HeadSweep, schedule: dict[str, Any]) -> dict[str, Any]:
    """All folds of one schedule, and those of nested cross-validation, fitted at once.

    Returns: mean log_loss and accuracy; log_loss by fold and by repeat; log-loss and correctness by image, averaged
        over repeats; and for each outer fold of the nested ones the inner log-loss and the outer image losses.
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
    losses = cross_entropy(logits.mT, data.labels.expand(len(every), -1), reduction="none")  # (H, N)
    is_right = (logits.argmax(2) == data.labels).float()
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
        "image_accuracies": image_right.mean(0).tolist(),
        "nested_inner": nested_inner,
        "nested_outer": nested_outer,
    }


def run_head_trials(data: HeadSweep, run: Path) -> list[dict[str, Any]]:
    """All trials of a head sweep by Ray Tune, in trial order; a sweep that was cut off goes on.

    A class Trainable with reused actors costs milliseconds a trial; the features go through the object store once.
    """
    # A trial costs milliseconds: one small file each is what resuming needs, trials.csv has the rest.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    start_ray()
    from ray import tune

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
    results = tune_all(trainable, {"index": tune.grid_search(list(range(len(data.schedules))))}, run)
    return sorted(results, key=lambda result: result["index"])


def tune_all(trainable: Any, space: dict[str, Any], run: Path) -> list[dict[str, Any]]:
    """Runs or resumes a Tuner under the run directory. Raises: RuntimeError naming the first failed trial's error."""
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    folder = run / STATE_FOLDER
    if tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(str(folder), trainable, restart_errored=True, param_space=space)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                name=STATE_FOLDER,
                storage_path=str(run),
                callbacks=[JsonLoggerCallback()],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
    grid = tuner.fit()
    if grid.errors:
        raise RuntimeError(f"a trial of the sweep failed: {grid.errors[0]}")
    return [result.metrics or {} for result in grid]


def paired_difference(image_losses: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference (other minus one) over images, and its 95% interval by the normal approximation."""
    differences = np.asarray(other) - np.asarray(image_losses)
    error = STANDARD_ERRORS * differences.std(ddof=1) / np.sqrt(len(differences))
    mean = float(differences.mean())
    return mean, mean - float(error), mean + float(error)


def tabulate_trials(results: list[dict[str, Any]], schedules: list[dict[str, Any]]) -> pd.DataFrame:
    """trials.csv, in trial order: schedule, mean log-loss with its interval over repeats, accuracy, each fold's loss.

    `is_distinguishable` is False where the loss differs from the winner's by less than the noise between images.
    """
    best = min(results, key=lambda result: result["log_loss"])
    rows = []
    for trial, (result, schedule) in enumerate(zip(results, schedules, strict=True)):
        repeats = np.asarray(result["repeat_log_losses"])
        error = STANDARD_ERRORS * repeats.std(ddof=1) / np.sqrt(len(repeats)) if len(repeats) > 1 else np.nan
        _, low, _ = paired_difference(best["image_log_losses"], result["image_log_losses"])
        rows.append(
            {
                "trial": trial,
                **schedule,
                "log_loss": result["log_loss"],
                "log_loss_low": result["log_loss"] - error,
                "log_loss_high": result["log_loss"] + error,
                "accuracy": result["accuracy"],
                "is_baseline": trial == 0,
                "is_winner": result is best,
                "is_distinguishable": low > 0,
                **{f"fold_{index}": value for index, value in enumerate(result["fold_log_losses"])},
            }
        )
    return pd.DataFrame(rows)


def summarize(
    results: list[dict[str, Any]], schedules: list[dict[str, Any]], trials: pd.DataFrame
) -> dict[str, float | int]:
    """Flat figures: winner, baseline, gain with its interval, and the estimate from nested cross-validation."""
    winner = int(trials["is_winner"].to_numpy().argmax())
    figures: dict[str, float | int] = {
        "num_trials": len(results),
        "num_not_distinguishable": int((~trials["is_distinguishable"]).sum()) - 1,
    }
    for name, trial in (("winner", winner), ("baseline", 0)):
        figures[f"{name}/trial"] = trial
        figures |= {f"{name}/{key}": value for key, value in schedules[trial].items()}
        figures |= {f"{name}/{key}": results[trial][key] for key in ("log_loss", "accuracy")}
    gain = paired_difference(results[winner]["image_log_losses"], results[0]["image_log_losses"])
    figures |= dict(zip(("gain/log_loss", "gain/log_loss_low", "gain/log_loss_high"), gain, strict=True))
    losses, right = [], []
    for fold in range(len(results[0]["nested_inner"])):
        chosen = min(results, key=lambda result, fold=fold: result["nested_inner"][fold])
        fold_losses, fold_right = chosen["nested_outer"][fold]
        losses += fold_losses
        right += fold_right
    return figures | {"nested/log_loss": float(np.mean(losses)), "nested/accuracy": float(np.mean(right))}
