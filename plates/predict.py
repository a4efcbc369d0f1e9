"""Predictions of the test split, from what the workers hand back: their table, their files and their score."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pandas as pd
import torch

from plates.dataset import Dataset, Skipped
from plates.metrics import score
from plates.rundir import write_csv, write_parquet
from plates.storage import Place
from plates.train_loop.task import Predicted


@dataclass(frozen=True)
class Predictions:
    """`table`: path, id, label, p_CLASS…, one row an image that can be read, in path order; `figures`: test/ counts,
    and, where the true labels are known (drawn plates), loss and accuracy."""

    table: pd.DataFrame
    skipped: list[Skipped]
    figures: dict[str, float | int]


def tabulate_predictions(predicted: Predicted, dataset: Dataset) -> Predictions:
    is_read = [sample.path not in predicted.errors for sample in dataset.test]
    logits, samples = predicted.logits[torch.tensor(is_read, dtype=torch.bool)], dataset.test.where(is_read)
    paths = samples.table["path"].to_pandas()
    labels = pd.Series(dataset.classes, dtype=str).take(logits.argmax(1).tolist()).array
    chances = pd.DataFrame(logits.softmax(1).numpy(), columns=pd.Index([f"p_{name}" for name in dataset.classes]))
    table = pd.concat([pd.DataFrame({"path": paths, "id": image_ids(paths), "label": labels}), chances], axis=1)
    figures: dict[str, float | int] = {"test/num_images": len(table), "test/num_unreadable": len(predicted.errors)}
    if len(samples) and not samples.table["label"].null_count:
        figures |= score(logits, samples.labels, dataset.classes, "test")
    skipped = [Skipped(path, "test", predicted.errors[path]) for path in sorted(predicted.errors)]
    return Predictions(table.sort_values("path", ignore_index=True), skipped, figures)


def image_ids(paths: Collection[str]) -> list[str]:
    """The stem of each path; where stems collide, the path without suffix; where those do, the path."""
    ids = pd.Series([PurePosixPath(path).stem for path in paths], dtype=object)
    texts = pd.Series([*paths], dtype=object)
    for longer in (lambda path: str(PurePosixPath(path).with_suffix("")), str):
        collide = ids.duplicated(keep=False)
        ids[collide] = texts[collide].map(longer)
    return ids.tolist()


def write_predictions(run: Place, predictions: Predictions) -> None:
    """predictions.csv and .parquet, and submission.csv, the competition's form."""
    write_csv(run / "predictions.csv", predictions.table)
    write_parquet(run / "predictions.parquet", predictions.table)
    write_csv(run / "submission.csv", predictions.table[["id", "label"]])


def print_skipped(skipped: Sequence[Skipped]) -> None:
    """Names the images that were left out, on standard error."""
    for item in skipped:
        print(f"left out, cannot be read: {item.path} ({item.reason})", file=sys.stderr)
