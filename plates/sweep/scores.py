"""Folds, the table of trials, and what can be said of the winner."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedKFold
from torch import Tensor
from torch.nn.functional import cross_entropy

from plates.config import TuneConfig, UserError
from plates.metrics import wilson_interval
from plates.samples import Samples
from plates.train_loop.task import Predicted, Task

CONFIDENCE = 0.95
NUM_SEEDS = 2**32  # that scikit-learn takes
LARGE = 1000  # images from which a search of all shrinks
LR_RANGE, GAMMA_RANGE = (1e-4, 3e-2), (0.05, 1.0)
TOLERANCE = 0.005  # of log-loss, within which the cheaper candidate wins
BOUNDS = ("", "_low", "_high")  # ends of the names of a mean and its interval

Fold = tuple[np.ndarray, np.ndarray]  # indices of training images, of held-out images
Schedule = dict[str, Any]  # lr, step_size, gamma; in a search of all what else makes a candidate, as in trials.csv


@dataclass(frozen=True)
class Folds:
    """Cross-validation over the labelled images: repeated folds, and outer folds each with its inner ones."""

    repeated: list[Fold]
    nested: list[tuple[Fold, list[Fold]]]

    def in_turn(self) -> list[Fold]:
        """The repeated ones, then each outer one before its inner ones."""
        return [*self.repeated, *(fold for outer, inner in self.nested for fold in (outer, *inner))]


@dataclass(frozen=True)
class TrialResult:
    """What held-out images say of a schedule, after all folds or the first of them. Tune stores its fields as JSON.

    `log_loss` and `accuracy` are means over images and repeats; then losses by fold done (K,), by repeat begun (R,)
    and by image (N,), NaN of one not held out yet. Of nested cross-validation, empty where there is none: by outer
    fold the mean loss of its inner ones (O,), and the losses of its n held-out images and whether each is right,
    O times (2, n).
    """

    log_loss: float
    accuracy: float
    fold_log_losses: list[float]
    repeat_log_losses: list[float]
    image_log_losses: list[float]
    nested_inner: list[float]
    nested_outer: list[list[list[float]]]


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
    task: Task  # of the winner
    described: dict[str, Any] = field(default_factory=dict)  # for model.json and config.json
    notes: list[str] = field(default_factory=list)  # what was not searched, and why
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)  # of this kind of sweep alone, by file name


def draw_schedules(config: TuneConfig) -> list[dict[str, Any]]:
    """Trial 0, the baseline, is the settings' own; the others are random: log-uniform lr, the rest uniform."""
    draw = np.random.default_rng(config.seed)
    schedules: list[dict[str, Any]] = [{"lr": config.lr, "step_size": config.step_size, "gamma": config.gamma}]
    for _ in range(config.num_trials - 1):
        lr, step_size = np.exp(draw.uniform(*np.log(LR_RANGE))), draw.integers(1, config.epochs + 1)
        gamma = draw.uniform(*GAMMA_RANGE)
        schedules.append({"lr": float(lr), "step_size": int(step_size), "gamma": float(gamma)})
    return schedules


def make_folds(samples: Samples, config: TuneConfig) -> Folds:
    """Repeated stratified folds over the images (all views of an image are on one side), and nested ones.

    A search of all repeats them less from 251 images on, and from 1,000 on has two inner folds.

    Raises: UserError where a class has fewer images than folds, or than the inner folds need.
    """
    num_repeats, num_inner = config.cv_repeats, config.folds
    if config.search == "all":
        num_repeats = min(num_repeats, max(1, LARGE // len(samples)))
        num_inner = 2 if len(samples) >= LARGE else num_inner
    labels = samples.labels.numpy()
    smallest = int(np.bincount(labels).min())
    most = smallest - -(-smallest // config.folds)  # the inner folds see all but one outer fold
    if config.folds > most:
        raise UserError(f"--folds {config.folds}: the smallest class has {smallest} images; lower it, or add images")
    repeated = RepeatedStratifiedKFold(n_splits=config.folds, n_repeats=num_repeats, random_state=config.seed)
    outer, inner = (
        StratifiedKFold(num_folds, shuffle=True, random_state=(config.seed + offset) % NUM_SEEDS)
        for offset, num_folds in ((1, config.folds), (2, num_inner))
    )
    nested = [
        ((rest, held), [(rest[a], rest[b]) for a, b in inner.split(rest, labels[rest])])
        for rest, held in outer.split(labels, labels)
    ]
    return Folds(list(repeated.split(labels, labels)), nested)


def score_images(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Cross-entropy of each image, and whether it is right: (..., N, C) to (2, ..., N) float64.

    What is not finite is infinitely bad, and not right: a diverged model must not pass for one that was not scored.
    """
    targets = labels.expand(logits.shape[:-1])
    losses = cross_entropy(logits.movedim(-1, 1), targets, reduction="none").nan_to_num(nan=inf, posinf=inf)
    is_right = (logits.argmax(-1) == targets) & losses.isfinite()
    return np.stack([losses.double().numpy(), is_right.double().numpy()])


def score_trial(folds: Folds, held_out: Sequence[np.ndarray]) -> TrialResult:
    """Of the folds done, in turn: for each what `score_images` says of its held-out images, (2, n)."""
    num_folds, num_images = len(folds.nested), sum(map(len, folds.repeated[0]))
    num_repeated = min(len(held_out), len(folds.repeated))
    scores = np.full((2, -(-num_repeated // num_folds), num_images), np.nan)
    for index, (_, held) in enumerate(folds.repeated[:num_repeated]):
        scores[:, index // num_folds, held] = held_out[index]
    losses = pd.DataFrame(scores[0])  # its means are of the images that were held out
    num_in_group = 1 + len(folds.nested[0][1])
    groups = [held_out[at : at + num_in_group] for at in range(num_repeated, len(held_out), num_in_group)]
    return TrialResult(
        log_loss=float(np.nanmean(scores[0])),
        accuracy=float(np.nanmean(scores[1])),
        fold_log_losses=[float(fold[0].mean()) for fold in held_out[:num_repeated]],
        repeat_log_losses=losses.mean(axis=1).tolist(),
        image_log_losses=losses.mean().tolist(),
        nested_inner=[float(np.concatenate(inner, axis=1)[0].mean()) for _, *inner in groups],
        nested_outer=[outer.tolist() for outer, *_ in groups],
    )


def paired_difference(
    image_losses: Sequence[float], other: Sequence[float], num_comparisons: int = 1
) -> tuple[float, float, float]:
    """Mean difference (other minus one) over images, and its 95% interval by Student's t.

    It covers the noise between images. Of `num_comparisons` such intervals all hold at once (Bonferroni), so that one
    of them still holds after it was selected.
    """
    ones, others = np.asarray(image_losses), np.asarray(other)
    with np.errstate(invalid="ignore"):
        differences = np.where(ones == others, 0.0, others - ones)  # two diverged ones do not differ
    mean = float(differences.mean())
    error = half_width(differences, num_comparisons) if np.isfinite(mean) else 0.0
    return mean, mean - error, mean + error


def half_width(values: np.ndarray, num_comparisons: int = 1) -> float:
    """Of the 95% interval of a mean, by Student's t; not a number for a single value."""
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / (2 * num_comparisons), len(values) - 1)
    return float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


def choose(losses: Sequence[float], schedules: Sequence[Schedule]) -> int:
    """The one rule of who wins: of those within 0.005 of the least loss the cheapest, and of these the best.

    The cost is the pixels that the trunk sees of an image to predict; equal where no setting changes them.
    """
    costs = [schedule.get("image_size", 1) ** 2 * schedule.get("tta", 1) for schedule in schedules]
    near = [index for index, loss in enumerate(losses) if loss <= min(losses) + TOLERANCE]
    return min(near, key=lambda index: (costs[index], losses[index]))


def tabulate_trials(results: list[TrialResult], schedules: list[Schedule]) -> pd.DataFrame:
    """trials.csv, a row a candidate: settings, mean log-loss, accuracy, each fold's loss; infinite if one diverged.

    `log_loss_low` and `log_loss_high` are a 95% interval over the repeats: it covers the noise of drawing the folds,
    not that of which images there are. `is_distinguishable` is whether the loss is above the winner's by more than
    the noise between images, the winner's selection among all trials included.
    """
    num_folds = max(len(result.fold_log_losses) for result in results)
    losses = [result.log_loss if len(result.fold_log_losses) == num_folds else inf for result in results]
    best = results[choose(losses, schedules)]
    rows = []
    for trial, (result, schedule) in enumerate(zip(results, schedules, strict=True)):
        error = half_width(np.asarray(result.repeat_log_losses))
        _, low, _ = paired_difference(best.image_log_losses, result.image_log_losses, max(1, len(results) - 1))
        row = {"trial": trial, **schedule, "log_loss": result.log_loss}
        row |= {"log_loss_low": result.log_loss - error, "log_loss_high": result.log_loss + error}
        row |= {"accuracy": result.accuracy, "num_folds": len(result.fold_log_losses)}
        row |= {"is_baseline": trial == 0, "is_winner": result is best, "is_distinguishable": low > 0}
        rows.append(row | {f"fold_{index}": loss for index, loss in enumerate(result.fold_log_losses)})
    return pd.DataFrame(rows)


def summarize(results: list[TrialResult], schedules: list[Schedule], trials: pd.DataFrame) -> dict[str, Any]:
    """Flat figures: winner, baseline, the gain, and what nested cross-validation estimates of both.

    The interval of `gain/` holds for all trials at once, so that it covers the winner's selection. The figures of
    `nested/` are of images that took no part in choosing: the losses of the trial chosen without them, and by how
    much they are below the baseline's, with 95% intervals by Student's t over the images, of the accuracy Wilson's.
    """
    winner = int(trials["is_winner"].to_numpy().argmax())
    num_alike = int((~trials["is_distinguishable"]).sum()) - 1
    figures: dict[str, Any] = {"num_trials": len(results), "num_not_distinguishable": num_alike}
    for name, trial in (("winner", winner), ("baseline", 0)):
        figures[f"{name}/trial"] = trial
        figures |= {f"{name}/{key}": value for key, value in schedules[trial].items()}
        figures |= {f"{name}/log_loss": results[trial].log_loss, f"{name}/accuracy": results[trial].accuracy}
    best, baseline = results[winner], results[0]
    gain = paired_difference(best.image_log_losses, baseline.image_log_losses, max(1, len(results) - 1))
    figures |= {f"gain/log_loss{bound}": value for bound, value in zip(BOUNDS, gain, strict=True)}
    if not baseline.nested_inner:
        return figures
    nested: list[tuple[float, ...]] = []  # of each image: loss, is right, the baseline's loss
    for fold, (base_losses, _) in enumerate(baseline.nested_outer):
        chosen = results[choose([result.nested_inner[fold] for result in results], schedules)]
        nested += zip(*chosen.nested_outer[fold], base_losses, strict=True)
    outer, right, base = np.array(nested).T
    loss, error = float(outer.mean()), half_width(outer)
    means = {
        "log_loss": (loss, float(np.maximum(0.0, loss - error)), loss + error),  # no log-loss is below 0
        "accuracy": (float(right.mean()), *wilson_interval(int(right.sum()), len(right))),
        "gain": paired_difference(outer, base),
    }
    for name, bounds in means.items():
        figures |= {f"nested/{name}{bound}": value for bound, value in zip(BOUNDS, bounds, strict=True)}
    return figures
