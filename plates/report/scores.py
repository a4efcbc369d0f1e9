"""The scores of a split, and its confusion matrix."""

from collections import Counter
from typing import Any

from plates.metrics import wilson_interval
from plates.report.text import format_percent, is_number

MAX_MATRIX = 20  # classes of a confusion matrix that can still be read


def score_split(metrics: dict[str, Any], config: dict[str, Any], split: str) -> dict[str, Any]:
    """Return a split's figures: `cells` has the number of images by (true class, predicted class), zeros left out."""
    prefix = f"{split}/confusion/"
    pairs = {key.removeprefix(prefix): int(count) for key, count in metrics.items() if key.startswith(prefix)}
    cells = {(true, guess): count for pair, count in pairs.items() for true, _, guess in [pair.partition("/")]}
    accuracy, loss = (metrics.get(f"{split}/{name}") for name in ("accuracy", "loss"))
    images = metrics.get(f"{split}/num_images", config.get("num_images", {}).get(split))
    # Only some test images may have a true label, so the confusion counts say of how many the accuracy is.
    judged = sum(cells.values()) or int(images or 0) * is_number(accuracy)
    hits = sum(count for (true, guess), count in cells.items() if true == guess)
    correct = hits if cells else round((accuracy or 0) * judged)
    score = {"split": split, "accuracy": accuracy, "loss": loss, "images": images, "judged": judged, "cells": cells}
    return score | {"correct": correct, "interval": wilson_interval(correct, judged)}


def show_scores(metrics: dict[str, Any], config: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each split that has true labels."""
    scores = [score for split in ("val", "test") if (score := score_split(metrics, config, split))["judged"]]
    for score in scores:
        names = config.get("classes") or sorted({name for pair in score["cells"] for name in pair})
        score["matrix"] = tabulate_confusion(score["cells"], names)
        score["by_class"] = tabulate_classes(metrics, score["split"], score["matrix"]["names"])
    return scores


def tabulate_confusion(cells: dict[tuple[str, str], int], classes: list[str]) -> dict[str, Any]:
    """A row a class, in the classes' order: the images predicted as each shown class, as another one, and all.

    Of many classes those with the most mistaken images are shown.
    """
    totals, mistaken = Counter[str](), Counter[str]()
    for (true, guess), count in cells.items():
        totals[true] += count
        mistaken[true] += count * (true != guess)
    worst = set(sorted(classes, key=lambda name: -mistaken[name])[:MAX_MATRIX])
    names = [name for name in classes if name in worst]
    rows = []
    for true in names:
        counts = [cells.get((true, guess), 0) for guess in names]
        correct = cells.get((true, true), 0) / totals[true] if totals[true] else None
        rows.append({"name": true, "counts": counts, "all": totals[true], "correct": correct})
    return {"names": names, "rows": rows if cells else [], "num_classes": len(classes)}


def tabulate_classes(metrics: dict[str, Any], split: str, names: list[str]) -> list[list[str]]:
    """A row a class, of those that were measured: its name, precision, recall and F1."""
    keys = {name: [f"{split}/{figure}/{name}" for figure in ("precision", "recall", "f1")] for name in names}
    measured = {name: of_class for name, of_class in keys.items() if of_class[0] in metrics}
    return [[name, *(format_percent(metrics[key]) for key in of_class)] for name, of_class in measured.items()]
