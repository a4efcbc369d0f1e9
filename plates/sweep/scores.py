"""Folds, the table of trials, and what can be said of the winner."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedKFold

from plates.config import TuneConfig, UserError
from plates.dataset import Sample

STANDARD_ERRORS = 1.96

Fold = tuple[np.ndarray, np.ndarray]  # indices of training images, of held-out images


@dataclass(frozen=True)
class Folds:
    """Cross-validation over the labelled images: repeated folds, and outer folds each with its inner ones."""

    repeated: list[Fold]
    nested: list[tuple[Fold, list[Fold]]]


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
    num_folds = max(len(result["fold_log_losses"]) for result in results)
    complete = [result for result in results if len(result["fold_log_losses"]) == num_folds]
    best = min(complete, key=lambda result: result["log_loss"])
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
                "num_folds": len(result["fold_log_losses"]),
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
    if not results[0]["nested_inner"]:
        return figures
    losses, right = [], []
    for fold in range(len(results[0]["nested_inner"])):
        chosen = min(results, key=lambda result, fold=fold: result["nested_inner"][fold])
        fold_losses, fold_right = chosen["nested_outer"][fold]
        losses += fold_losses
        right += fold_right
    return figures | {"nested/log_loss": float(np.mean(losses)), "nested/accuracy": float(np.mean(right))}
