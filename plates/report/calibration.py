"""The section of calibration: how often a model is right that is so sure, by the images it was not trained on."""

import io
from typing import Any

import numpy as np
import pandas as pd

from plates.metrics import wilson_interval
from plates.report.plots import COLOURS, Plot, draw_plot
from plates.report.text import format_percent
from plates.storage import Place

MAX_BINS, MIN_IN_BIN = 10, 8
ROWS_PER_PIECE = 500
NUM_DRAWS = 200
HEADER = ["confidence", "images", "mean confidence", "correct", "95% interval"]


def show_calibration(path: Place) -> dict[str, Any] | None:
    """Of the held-out images of out_of_fold.csv; None where that is absent or has no finite probability.

    Bins of equally many images, at most 10, of 8 and more. The expected calibration error is the mean over images of
    their bin's distance between mean confidence and fraction correct (C. Guo et al., On Calibration of Modern Neural
    Networks, 2017); `chance_error` is its mean where each image is right with just its confidence.
    """
    confidence, is_right = read_confidence(path) if path.exists() else (np.empty(0), np.empty(0))
    if not len(confidence):
        return None
    order = np.argsort(confidence, kind="stable")
    confidence, is_right = confidence[order], is_right[order]
    bins = np.array_split(np.arange(len(order)), max(1, min(MAX_BINS, len(order) // MIN_IN_BIN)))
    draw = np.random.default_rng(0)
    by_chance = [bin_error(confidence, draw.random(len(order)) < confidence, bins) for _ in range(NUM_DRAWS)]
    rows = [describe_bin(confidence[held], is_right[held]) for held in bins]
    return {
        "num_images": len(order),
        "error": bin_error(confidence, is_right, bins),
        "chance_error": float(np.mean(by_chance)),
        "plots": [draw_reliability(rows)],
        "header": HEADER,
        "rows": [tabulate_bin(row) for row in rows],
    }


def read_confidence(path: Place) -> tuple[np.ndarray, np.ndarray]:
    """(N,) probability of the most probable class, and (N,) whether that is the label; without those not finite.

    A piece at a time, since the probabilities of very many classes would fill the memory.
    """
    parts, data = [np.empty((2, 0))], io.BytesIO(path.read_bytes())
    texts = dict.fromkeys(("path", "label"), str)
    for piece in pd.read_csv(data, dtype=texts, keep_default_na=False, na_values=[""], chunksize=ROWS_PER_PIECE):
        columns = [column for column in piece.columns if column.startswith("p_")]
        chances = piece[columns].to_numpy(dtype=float)  # (n, C)
        guesses = np.array([column[2:] for column in columns], dtype=object)[chances.argmax(1)]
        is_right = guesses == piece["label"].to_numpy(dtype=object)
        parts.append(np.stack([chances.max(1), is_right.astype(float)])[:, np.isfinite(chances).all(1)])
    confidence, is_right = np.concatenate(parts, axis=1)
    return confidence, is_right


def bin_error(confidence: np.ndarray, is_right: np.ndarray, bins: list[np.ndarray]) -> float:
    gaps = [abs(float((is_right[held] - confidence[held]).sum())) for held in bins]
    return sum(gaps) / len(confidence)


def describe_bin(confidence: np.ndarray, is_right: np.ndarray) -> dict[str, Any]:
    interval = wilson_interval(int(is_right.sum()), len(is_right))
    return {
        "num_images": len(is_right), "lowest": confidence.min(), "highest": confidence.max(),
        "confidence": confidence.mean(), "accuracy": is_right.mean(), "interval": interval,
    }  # fmt: skip


def tabulate_bin(row: dict[str, Any]) -> list[str]:
    spans = [
        f"{format_percent(low)} to {format_percent(high)}"
        for low, high in ((row["lowest"], row["highest"]), row["interval"])
    ]
    means = [format_percent(row[name]) for name in ("confidence", "accuracy")]
    return [spans[0], str(row["num_images"]), *means, spans[1]]


def draw_reliability(rows: list[dict[str, Any]]) -> Plot:
    """Fraction correct over mean confidence, with Wilson's intervals and the numbers of images."""
    with draw_plot("correct, by confidence (diagonal: as stated)", "mean confidence", 3.0) as (axes, plot):
        x, y = (np.array([row[name] for row in rows]) for name in ("confidence", "accuracy"))
        low, high = np.array([row["interval"] for row in rows]).T
        least = min(0.5, x.min())
        axes.plot([least, 1], [least, 1], ":", color=COLOURS["muted"], linewidth=1.2)
        axes.vlines(x, low, high, color=COLOURS["line"], linewidth=2.5)
        axes.plot(x, y, "o-", color=COLOURS["accent"], linewidth=1.6, markersize=4)
        axes.set_ylim(-0.03, 1.03)
    points = [f"{row['num_images']} images at {row['confidence']:.3g}: {row['accuracy']:.3g}" for row in rows]
    plot["alt"] = f"fraction correct by mean confidence: {'; '.join(points)}"
    return plot
