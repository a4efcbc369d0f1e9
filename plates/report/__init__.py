"""Tables, plots and the HTML page, from a run's files alone."""

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from plates.report.benchmark import show_benchmark
from plates.report.plots import draw_lines
from plates.report.predictions import encode_thumbnail, show_predictions
from plates.report.scores import score_split, show_scores
from plates.report.sweep import show_sweep, tell_winner
from plates.report.text import (
    align_columns,
    format_loss,
    format_number,
    format_percent,
    format_probability,
    format_setting,
)
from plates.rundir import read_csv, write_whole
from plates.storage import Place


@dataclass
class RunFiles:
    """What a run directory holds; an absent file is an empty mapping or a table without rows."""

    path: Place
    config: dict[str, Any]
    metrics: dict[str, float]
    history: pd.DataFrame
    timing: pd.DataFrame
    skipped: pd.DataFrame


def write_report(
    run: Place, *, train_views: Sequence[tuple[np.ndarray, str]], read_image: Callable[[str], np.ndarray]
) -> Place:
    """Write `run/report.html`, one page that needs no other file, and return its path.

    train_views: uint8 pictures (H, W, 3) as the model sees them in training, each with its label's text.
    read_image: the uint8 picture (H, W, 3) at a `path` of predictions.csv; where it raises OSError the page
    leaves that picture out and says so.
    """
    files = read_run(run)
    # A later job adds a function here, and a macro of the section's name to the template.
    sections = [
        show_timing(files),
        show_sweep(run, files.metrics),
        show_benchmark(run),
        show_curves(files),
        show_scores(files.metrics, files.config),
        show_predictions(run / "predictions.csv", read_image),
        show_views(train_views),
        show_skipped(files),
        {"name": "settings"} if files.config else None,
    ]
    page = render_page(files, [section for section in sections if section])
    write_whole(run / "report.html", lambda file: file.write_text(page, encoding="utf-8"))
    return run / "report.html"


def summary_table(run: Place) -> str:
    """Return the run's times (seconds, images per second) and scores as plain text, at most 100 columns."""
    files, blocks = read_run(run), []
    if len(files.timing):
        header, rows = tabulate_timing(files.timing)
        blocks.append(align_columns([header, *rows], text_columns=3))
        blocks.append("Times in seconds; train/s and infer/s in images per second.\n")
    rows = [["", "images", "accuracy", "loss"]]
    for split in ("train", "val", "test"):
        s = score_split(files.metrics, files.config, split)
        cells = [format_number(s["images"], 0), format_percent(s["accuracy"]), format_number(s["loss"], 4)]
        rows += [[split, *cells]] if set(cells) != {"–"} else []
    if len(rows) > 1:
        blocks.append(align_columns(rows, text_columns=1))
    if "winner/log_loss" in files.metrics:
        blocks.append("\n" + textwrap.fill(tell_winner(files.metrics), 100))
    return "\n".join(blocks)


def read_run(run: Place) -> RunFiles:
    """Read the small files of a run directory that the page or the terminal's table may show."""
    texts = [p.read_text("utf-8") if p.exists() else "{}" for p in (run / "config.json", run / "metrics.json")]
    tables = [read_table(run / f"{name}.csv") for name in ("history", "timing", "skipped")]
    return RunFiles(run, *map(json.loads, texts), *tables)


def read_table(path: Place) -> pd.DataFrame:
    # Cells stay text, so that an id such as 0001 or a class named NA keeps its spelling.
    try:
        return read_csv(path, dtype=str, keep_default_na=False)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return pd.DataFrame()


def read_numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """Return a column as float64 (N,), NaN where a cell is empty or the column is absent."""
    if column not in table:
        return np.full(len(table), np.nan)
    return np.asarray(pd.to_numeric(table[column], errors="coerce"), dtype=float)


def tabulate_timing(timing: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of timing.csv, the whole run first and then a row a worker."""
    columns = {"startup_s": "startup", "data_s": "data", "train_s": "train", "inference_s": "infer"}
    columns |= {"total_s": "total", "train_images_per_sec": "train/s", "inference_images_per_sec": "infer/s"}
    texts = timing[["rank", "node", "device_name", "device"]].to_numpy(dtype=str).tolist()
    numbers = np.stack([read_numbers(timing, column) for column in columns], axis=1)
    rows = []
    for (rank, node, name, device), values in zip(texts, numbers, strict=True):
        who = f"worker {rank}" if rank else "whole run"
        rows.append([who, node or "–", name or device or "–", *(format_number(float(v), 1) for v in values)])
    return ["", "node", "device", *columns.values()], rows


def show_timing(files: RunFiles) -> dict[str, Any] | None:
    header, rows = tabulate_timing(files.timing) if len(files.timing) else ([], [])
    return {"name": "timing", "header": header, "rows": rows} if rows or files.config else None


def show_curves(files: RunFiles) -> dict[str, Any] | None:
    history = files.history
    drawn = [draw_curves(history, name, [f"train/{name}", f"val/{name}"], 2.2) for name in ("loss", "accuracy")]
    drawn.append(draw_curves(history, "learning rate", ["lr"], 1.25))
    plots = [plot for plot in drawn if plot]
    cells = {"header": history.columns.tolist(), "rows": history.to_numpy(dtype=str).tolist()}
    return {"name": "curves", "plots": plots, **cells} if plots else None


def draw_curves(history: pd.DataFrame, title: str, columns: list[str], height: float) -> dict[str, str]:
    """Draw columns over the epochs, 3.5 x `height` inches, as inline SVG with its alt text; {} if all NaN."""
    styles = {"train": ("train", "--"), "val": ("accent", "-"), "lr": ("muted", "-")}
    epochs = read_numbers(history, "epoch")
    lines = [
        (column.split("/")[0], *styles[column.split("/")[0]], read_numbers(history, column)) for column in columns
    ]
    return draw_lines(epochs, lines, title, "epoch", height)


def show_views(views: Sequence[tuple[np.ndarray, str]], *, limit: int = 24) -> dict[str, Any] | None:
    pictures = []
    for picture, label in views[:limit]:
        alt = f"training view, label {label}"
        pictures.append({"uri": encode_thumbnail(picture), "alt": alt, "title": label, "bars": []})
    return {"name": "views", "pictures": pictures} if pictures else None


def show_skipped(files: RunFiles, *, limit: int = 200) -> dict[str, Any] | None:
    table = files.skipped.head(limit)
    cells = {"header": table.columns.tolist(), "rows": table.to_numpy(dtype=str).tolist()}
    return {"name": "skipped", "images": len(files.skipped), **cells} if len(table) else None


def render_page(files: RunFiles, sections: list[dict[str, Any]]) -> str:
    """Return the page's HTML: key figures and notes, then the sections, each by the macro of its name."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"number": format_number, "percent": format_percent, "loss": format_loss}
    page.filters |= {"probability": format_probability, "setting": format_setting}
    seconds, rates = (read_numbers(files.timing, name) for name in ("total_s", "inference_images_per_sec"))
    return page.get_template("report.html.j2").render(
        run=files.path.name,
        config=files.config,
        scores=[score_split(files.metrics, files.config, split) for split in ("val", "test", "train")],
        unreadable=files.metrics.get("test/num_unreadable", 0),
        seconds=next(map(float, seconds), math.nan),
        rate=next(map(float, rates), math.nan),
        sections=sections,
    )
