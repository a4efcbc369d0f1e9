"""Tables, plots and the HTML page, from a run's files alone."""

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from plates.report.benchmark import show_benchmark
from plates.report.boxes import show_boxes
from plates.report.calibration import show_calibration
from plates.report.data import show_data
from plates.report.plots import draw_lines
from plates.report.predictions import encode_thumbnail, show_predictions
from plates.report.scores import score_split, show_scores
from plates.report.search import list_estimates, show_search, tell_search
from plates.report.sweep import is_search, show_sweep, tell_winner
from plates.report.text import (
    align_columns,
    format_loss,
    format_number,
    format_percent,
    format_probability,
    format_setting,
    is_number,
)
from plates.rundir import read_csv, write_atomically
from plates.storage import Place

MAX_VIEWS, MAX_SKIPPED = 24, 200  # that the page shows
TIMES = {"startup_s": "startup", "data_s": "data", "train_s": "train", "inference_s": "infer", "total_s": "total"}
RATES = {"train_images_per_sec": "train/s", "inference_images_per_sec": "infer/s"}
CURVES = [("loss", ["train", "val"], 2.2), ("accuracy", ["train", "val"], 2.2), ("learning rate", ["lr"], 1.25)]
LINES = {"train": ("train", "--"), "val": ("accent", "-"), "lr": ("muted", "-")}  # colours and dashes


def write_report(
    run: Place,
    *,
    train_views: Sequence[tuple[np.ndarray, str]],
    read_image: Callable[[str], np.ndarray],
    explained: dict[str, Any] | None = None,
) -> Place:
    """Write `run/report.html`, one page that needs no other file, and return its path.

    train_views: uint8 pictures (H, W, 3) as the model sees them in training, each with its label's text.
    read_image: the uint8 picture (H, W, 3) at a `path` of predictions.csv; where it raises OSError the page
    leaves that picture out and says so.
    explained: what `explain_answers` gives, or the reason why nothing is explained.
    """
    config, metrics = (read_json(run / name) for name in ("config.json", "metrics.json"))
    timing = read_table(run / "timing.csv")
    times = read_times(timing)
    # A later job adds a section here, and a macro of its name to the template. An empty one is left out.
    sections = {
        "search": show_search(run, metrics, config, times),
        "calibration": show_calibration(run / "out_of_fold.csv"),
        "timing": {"rows": tabulate_timing(timing)} if "backbone" in config or len(timing) else None,
        "sweep": show_sweep(run, metrics),
        "benchmark": show_benchmark(run),
        "curves": show_curves(read_table(run / "history.csv")),
        "scores": show_scores(metrics, config),
        "boxes": show_boxes(run, config, read_image),
        "explained": explained,
        "predictions": show_predictions(run / "predictions.csv", read_image),
        "views": [
            {"uri": encode_thumbnail(picture), "alt": f"training view, label {label}", "title": label}
            for picture, label in train_views[:MAX_VIEWS]
        ],
        "data": show_data(run / "data_issues.csv", config.get("data_check")),
        "skipped": show_skipped(read_table(run / "skipped.csv")),
        "settings": config,
    }
    return write_page(
        run / "report.html",
        run=run.name,
        config=config,
        key_figures=list_key_figures(metrics, config, times),
        sections={name: section for name, section in sections.items() if section},
    )


def write_page(path: Place, **values: Any) -> Place:
    """Writes what the template of the file's name makes of the values, and returns its path."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"number": format_number, "percent": format_percent, "loss": format_loss}
    pages.filters |= {"probability": format_probability, "setting": format_setting}
    page = pages.get_template(f"{path.name}.j2").render(values)
    write_atomically(path, lambda file: file.write_text(page, encoding="utf-8"))
    return path


def summary_table(run: Place) -> str:
    """Return the run's times (seconds, images per second) and scores as plain text, at most 100 columns."""
    config, metrics = (read_json(run / name) for name in ("config.json", "metrics.json"))
    timing, blocks = read_table(run / "timing.csv"), []
    if rows := tabulate_timing(timing):
        blocks.append(align_columns(rows, text_columns=3))
        blocks.append("Times in seconds; train/s and infer/s in images per second.\n")
    rows = [["", "images", "accuracy", "loss"]]
    for split in ("train", "val", "test"):
        s = score_split(metrics, config, split)
        cells = [format_number(s["images"], 0), format_percent(s["accuracy"]), format_number(s["loss"], 4)]
        rows += [[split, *cells]] if set(cells) != {"–"} else []
    if len(rows) > 1:
        blocks.append(align_columns(rows, text_columns=1))
    if is_search(metrics):
        blocks.append("\n" + align_columns(tell_search(run, metrics, config, read_times(timing)), text_columns=2))
    elif "winner/log_loss" in metrics:
        blocks.append("\n" + textwrap.fill(tell_winner(metrics), 100))
    return "\n".join(blocks)


def read_json(path: Place) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def read_table(path: Place) -> pd.DataFrame:
    """A small table as the text of its cells, to be shown as they are; without rows where the file is absent."""
    return read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame()


def to_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of a table of text as float64, NaN where a cell is no number."""
    return table.apply(pd.to_numeric, errors="coerce").astype(float)


def read_times(timing: pd.DataFrame) -> dict[str, float]:
    """Seconds and rates of the whole run by column of timing.csv, NaN where unknown; {} without rows."""
    columns = [column for column in (*TIMES, *RATES) if column in timing]
    return {column: float(to_numbers(timing)[column].iloc[0]) for column in columns} if len(timing) else {}


def tabulate_timing(timing: pd.DataFrame) -> list[list[str]]:
    """Return a header and the cells of timing.csv, the whole run first and then a row a worker; [] without rows."""
    columns = TIMES | RATES
    rows = []
    for texts, numbers in zip(timing.to_dict("records"), to_numbers(timing).to_dict("records"), strict=True):
        who = f"worker {texts['rank']}" if texts["rank"] else "whole run"
        device = texts["device_name"] or texts["device"] or "–"
        rows.append([who, texts["node"] or "–", device, *(format_number(numbers[column], 1) for column in columns)])
    return [["", "node", "device", *columns.values()], *rows] if rows else []


def list_key_figures(metrics: dict[str, Any], config: dict[str, Any], times: dict[str, float]) -> list[Sequence[str]]:
    """Name, value and remark of each figure at the head of the page."""
    figures = list_estimates(metrics)
    splits = [("val", "Validation"), ("test", "Test"), ("train", "Training")]
    # How well a search's winner knows the images that it was chosen by would stand beside an estimate of new ones.
    for split, name in splits[:2] if figures else splits:
        s = score_split(metrics, config, split)
        if is_number(s["accuracy"]):
            judged = f"{s['correct']} of {s['judged']}, " if s["judged"] and split != "train" else ""
            remark = f"{judged}loss {format_number(s['loss'], 4)}"
            figures.append((f"{name} accuracy", format_percent(s["accuracy"]), remark))
    images, num_unreadable = score_split(metrics, config, "test")["images"], metrics.get("test/num_unreadable")
    if images is not None:
        figures.append(("Test images", str(images), f"{num_unreadable} unreadable" if num_unreadable else ""))
    if is_number(num_unsure := metrics.get("test/num_unsure")):
        accuracy = metrics.get("test/selective_accuracy")
        remark = f"accuracy of the others {format_percent(accuracy)}" if is_number(accuracy) else ""
        figures.append(("Unsure", str(num_unsure), remark))
    if times:
        total_s, rate = times["total_s"], times["inference_images_per_sec"]
        remark = f"inference {rate:.1f} images/s" if is_number(rate) else ""
        figures.append(("Total time", f"{total_s:.1f} s", remark))
    return figures


def show_curves(history: pd.DataFrame) -> dict[str, Any] | None:
    """None where nothing was trained, or a head without epochs, whose one row has no learning rate."""
    numbers, plots = to_numbers(history), []
    if history.empty or ("lr" in numbers and numbers["lr"].isna().all()):
        return None
    for title, labels, height in CURVES:
        columns = [(label, label if label == "lr" else f"{label}/{title}") for label in labels]
        lines = [(label, *LINES[label], numbers[column].to_numpy()) for label, column in columns if column in numbers]
        plots.append(draw_lines(numbers["epoch"].to_numpy(), lines, title, "epoch", height))
    rows = history.to_numpy(dtype=str).tolist()
    return {"plots": [plot for plot in plots if plot], "header": [*history], "rows": rows}


def show_skipped(table: pd.DataFrame) -> dict[str, Any] | None:
    rows = table.head(MAX_SKIPPED).to_numpy(dtype=str).tolist()
    return {"images": len(table), "header": [*table], "rows": rows} if rows else None
