"""Counts summed over images and workers, then divided: exact whatever the number of workers."""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy sum, number correct and number of images of a batch.

    Args:
        logits: (B, C) float; B may be 0.
        labels: (B,) int64.

    Returns: (3,) float64 on the logits' device, to be added over batches and workers.
    """
    loss_sum = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    num_correct = (logits.argmax(1) == labels).sum()
    num_images = torch.full_like(num_correct, len(labels))
    return torch.stack([loss_sum.detach().double(), num_correct.double(), num_images.double()])


def divide(sums: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy (0-1) from summed `batch_sums`; not a number where there were no images."""
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    return loss, accuracy


def score(logits: Tensor, labels: Tensor, classes: tuple[str, ...], split: str) -> dict[str, float | int]:
    """Flat figures of a split: SPLIT/loss, /accuracy, /num_images, /confusion/TRUE/PREDICTED counts above 0, and of
    each class /precision/CLASS, /recall/CLASS and /f1/CLASS, not a number where there is nothing to divide by.

    Args:
        logits: (N, C) float, or log-probabilities; N >= 1.
        labels: (N,) int64.
    """
    loss, accuracy = divide(batch_sums(logits, labels))
    figures = {f"{split}/loss": loss, f"{split}/accuracy": accuracy, f"{split}/num_images": len(labels)}
    pairs, counts = torch.stack([labels, logits.argmax(1)], dim=1).unique(dim=0, return_counts=True)
    for (true, predicted), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        figures[f"{split}/confusion/{classes[true]}/{classes[predicted]}"] = count
    # Takes a second, which the driver of a run has when its models are trained.
    from sklearn.metrics import precision_recall_fscore_support

    by_class: Any = precision_recall_fscore_support(
        labels.numpy(), logits.argmax(1).numpy(), labels=range(len(classes)), zero_division=cast(Any, np.nan)
    )
    for figure, values in zip(("precision", "recall", "f1"), by_class, strict=False):  # the last is their support
        figures |= {f"{split}/{figure}/{name}": float(value) for name, value in zip(classes, values, strict=True)}
    return figures


def wilson_interval(num_correct: int, num_images: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a fraction; 0 to 1 without images."""
    from scipy.stats import binomtest  # takes a second, which the driver of a run has while it writes its report

    if not num_images:
        return 0.0, 1.0
    low, high = binomtest(num_correct, num_images).proportion_ci(method="wilson")
    return float(low), float(high)
