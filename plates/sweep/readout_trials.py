"""Trials of a search: all readouts and strengths of one pass of the trunk, by logistic regression."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plates.logistic import STRENGTHS, logits_of_folds, mask_folds, temperature
from plates.sweep.scores import LARGE, Folds, Schedule, TrialResult, score_images, score_trial


@dataclass(frozen=True)
class Pass:
    """What the trunk gave for all labelled images at one size and crop: (V, N, F) features of the first V symmetries
    of each image, and by readout the columns of its features."""

    settings: Schedule
    features: Tensor
    columns: dict[str, slice]


def numbers_of_views(features: Tensor) -> list[int]:
    """That a pass of (V, N, F) features is tried with."""
    return sorted({1, len(features)})


def score_readouts(
    found: Pass, num_views: int, labels: Tensor, class_weights: Sequence[float], folds: Folds, most_tta: int
) -> list[tuple[Schedule, TrialResult]]:
    """Of each readout a candidate that predicts by one view and one by `most_tta`, each with its best strength."""
    in_turn, num_classes = folds.in_turn(), len(class_weights)
    kept, ttas = mask_folds([train for train, _ in in_turn], len(labels)), sorted({1, min(most_tta, num_views)})
    candidates, strengths = [], strengths_to_try(len(labels))
    for readout, columns in found.columns.items():
        features = found.features[:num_views, :, columns]
        evaluation = torch.cat([features[:tta].mean(0) for tta in ttas])
        # (K, S, T * N, C)
        logits = logits_of_folds(features, labels, num_classes, kept, strengths, evaluation, class_weights)
        for tta, of_views in zip(ttas, logits.split(len(labels), 2), strict=True):
            settings = {"head": "logistic", **found.settings, "num_views": num_views, "readout": readout, "tta": tta}
            candidates.append(best_strength(of_views.movedim(1, 0), labels, folds, settings, strengths))
    return candidates


def strengths_to_try(num_images: int) -> Sequence[float]:
    return STRENGTHS if num_images < LARGE else STRENGTHS[::2]


def time_trials(
    columns: Sequence[slice], labels: Tensor, class_weights: Sequence[float], folds: Folds, features: Tensor
) -> dict[int, float]:
    """How long the trials of a pass's (V, N, F) features take on a thread, in s, by their number of views: as many
    times as long as one of their folds as they have folds."""
    kept, seconds = mask_folds([folds.repeated[0][0]], len(labels)), {}
    for num_views in numbers_of_views(features):
        start_s = time.perf_counter()
        for one in columns:
            views = features[:num_views, :, one]
            logits_of_folds(
                views, labels, len(class_weights), kept, strengths_to_try(len(labels)), views[0], class_weights
            )
        seconds[num_views] = (time.perf_counter() - start_s) * len(folds.in_turn())
    return seconds


def best_strength(
    logits: Tensor, labels: Tensor, folds: Folds, settings: Schedule, strengths: Sequence[float]
) -> tuple[Schedule, TrialResult]:
    """The strength of the least cross-validated log-loss.

    In nested cross-validation that of each outer fold's inner ones; its held-out images are scored at the temperature
    of theirs.

    logits: (S, K, N, C) of S strengths and K folds in turn.
    """
    held = [torch.tensor(images) for _, images in folds.in_turn()]
    scores = score_images(logits, labels)  # (2, S, K, N)
    by_fold = [scores[:, :, fold, images] for fold, images in enumerate(held)]  # (2, S, n) each

    def best_of(chosen: Sequence[int]) -> int:
        return int(np.concatenate([by_fold[fold][0] for fold in chosen], axis=1).mean(1).argmin())

    best = best_of(range(len(folds.repeated)))
    held_out = [by_fold[fold][:, best] for fold in range(len(folds.repeated))]
    for _, inner in folds.nested:
        outer = len(held_out)
        within = range(outer + 1, outer + 1 + len(inner))
        strength = best_of(within)
        inner_logits = torch.cat([logits[strength, fold, held[fold]] for fold in within])
        heat = temperature(inner_logits, torch.cat([labels[held[fold]] for fold in within]))
        held_out.append(score_images(logits[strength, outer, held[outer]] / heat, labels[held[outer]]))
        held_out += [by_fold[fold][:, strength] for fold in within]
    return {**settings, "strength": strengths[best]}, score_trial(folds, held_out)
