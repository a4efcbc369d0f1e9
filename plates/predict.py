"""Predictions of the test split, from what the workers hand back: their table, their files, score and explanation."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from plates.checkpoint import Bundle, rebuild_model
from plates.dataset import Dataset, Samples, Skipped
from plates.explain import explain_image, why_no_map
from plates.metrics import score
from plates.report.explained import explain_answers
from plates.rundir import write_csv, write_parquet
from plates.storage import Place
from plates.train_loop.task import Predicted, Task

UNSURE = "unsure"  # the label of an image without an answer


@dataclass(frozen=True)
class Predictions:
    """`table`: path, id, label, p_CLASS…, and distance_quantile where the model has training images to compare with,
    one row an image that can be read, in path order; `answers`: of the same images, as `list_answers` has them;
    `figures`: test/ counts, and, where the true labels are known (drawn plates), loss and accuracy."""

    table: pd.DataFrame
    answers: pd.DataFrame
    skipped: list[Skipped]
    figures: dict[str, float | int]


def tabulate_predictions(predicted: Predicted, dataset: Dataset, abstain_below: float | None = None) -> Predictions:
    """abstain_below: the chance below which an image's label is `unsure` in the table."""
    is_read = [sample.path not in predicted.errors for sample in dataset.test]
    logits, samples = predicted.logits[torch.tensor(is_read, dtype=torch.bool)], dataset.test.where(is_read)
    answers = list_answers(samples, logits, dataset.classes)
    chances = pd.DataFrame(logits.softmax(1).numpy(), columns=pd.Index([f"p_{name}" for name in dataset.classes]))
    table = pd.concat([answers[["path", "id", "label"]], chances], axis=1)
    if predicted.compared is not None:
        table["distance_quantile"] = predicted.compared[torch.tensor(is_read, dtype=torch.bool), 0].numpy()
    figures: dict[str, float | int] = {"test/num_images": len(table), "test/num_unreadable": len(predicted.errors)}
    if len(samples) and not samples.table["label"].null_count:
        figures |= score(logits, samples.labels, dataset.classes, "test")
    if abstain_below is not None:
        is_unsure = ~(answers["chance"] >= abstain_below)  # nor is what is no number an answer
        table.loc[is_unsure, "label"] = UNSURE
        figures |= count_unsure(answers, is_unsure)
    skipped = [Skipped(path, "test", predicted.errors[path]) for path in sorted(predicted.errors)]
    return Predictions(table.sort_values("path", ignore_index=True), answers, skipped, figures)


def count_unsure(answers: pd.DataFrame, is_unsure: pd.Series) -> dict[str, float | int]:
    """Images without an answer; where all true classes are known, the fraction with one, and of these that right."""
    figures: dict[str, float | int] = {"test/num_unsure": int(is_unsure.sum())}
    if len(answers) and answers["true"].notna().all():
        is_right = answers["label"] == answers["true"]
        figures |= {
            "test/coverage": float((~is_unsure).mean()),
            "test/selective_accuracy": float(is_right[~is_unsure].mean()),
        }
    return figures


def list_answers(samples: Samples, logits: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    """path, id, the predicted label, its chance (NaN where a logit is not finite), and the true class where known.

    logits: (N, C) of the samples.
    """
    paths, names = samples.table["path"].to_pandas(), pd.Series(classes, dtype=str)
    return pd.DataFrame(
        {
            "path": paths,
            "id": image_ids(paths),
            "label": names.take(logits.argmax(1).tolist()).array,
            "chance": logits.softmax(1).amax(1).numpy(),
            "true": samples.table["label"].to_pandas().map(dict(enumerate(classes))),
        }
    )


def explain(task: Task, bundle: Bundle, answers: pd.DataFrame, folder: Place | None = None) -> dict[str, Any] | None:
    """What the report shows of what decided, of some of the answers; `folder` as `explain_answers` has it."""
    model, config, classes = rebuild_model(bundle), task.config, list(bundle.classes)
    if reason := why_no_map(model, bundle.preprocessing.image_size):
        return {"reason": reason}

    def look(path: str, label: str) -> tuple[np.ndarray, np.ndarray]:
        image = task.dataset.source.read(path)
        seen = (config.eval_views, task.drawing, bundle.preprocessing)
        values = explain_image(model, image, path, classes.index(label), *seen)
        return image.permute(1, 2, 0).numpy(), values.numpy()

    return explain_answers(answers, look, folder)


def image_ids(paths: Collection[str]) -> list[str]:
    """The stem of each path; where stems collide, the path without suffix; where those do, the path."""
    ids = pd.Series([PurePosixPath(path).stem for path in paths], dtype=object)
    texts = pd.Series([*paths], dtype=object)
    for longer in (lambda path: str(PurePosixPath(path).with_suffix("")), str):
        collide = ids.duplicated(keep=False)
        ids[collide] = texts[collide].map(longer)
    return ids.tolist()


def write_predictions(run: Place, predictions: Predictions) -> None:
    """predictions.csv and .parquet, and submission.csv, the competition's form, which knows no unsure."""
    write_csv(run / "predictions.csv", predictions.table)
    write_parquet(run / "predictions.parquet", predictions.table)
    write_csv(run / "submission.csv", predictions.answers.sort_values("path")[["id", "label"]])


def print_skipped(skipped: Sequence[Skipped]) -> None:
    """Names the images that were left out, on standard error."""
    for item in skipped:
        print(f"left out, cannot be read: {item.path} ({item.reason})", file=sys.stderr)
