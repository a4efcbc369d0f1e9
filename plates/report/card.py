"""The model card, README.md beside the model: what it is, its data and figures, and how to use it."""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2

from plates.report.scores import score_split
from plates.report.text import format_loss, format_percent, format_setting, is_number
from plates.rundir import write_atomically
from plates.storage import Place


def write_card(run: Place) -> None:
    """Writes `run/checkpoint/README.md` from the run's files alone, with the front matter of a Hugging Face card."""
    config, metrics, model = (
        json.loads((run / name).read_text("utf-8"))
        for name in ("config.json", "metrics.json", "checkpoint/model.json")
    )
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"cell": spell_cell, "setting": format_setting}
    card = pages.get_template("card.md.j2").render(
        run=spell_cell(run.name),
        config=config,
        seen=model["preprocessing"],
        source=PurePosixPath(config["data"]).name,  # the rest of a path is nobody else's business
        counts={split: config.get(f"num_{split}_by_class") for split in ("train", "val")},
        rows=list_figures(metrics, config),
        is_tested="test/accuracy" in metrics,
    )
    write_atomically(run / "checkpoint" / "README.md", lambda file: file.write_text(card + "\n", encoding="utf-8"))


def spell_cell(text: str) -> str:
    """In a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def list_figures(metrics: dict[str, Any], config: dict[str, Any]) -> list[list[str]]:
    """Who judged; accuracy and log-loss, each with its interval, by images that were not trained on."""
    rows = []
    if is_number(metrics.get("nested/log_loss")):
        shown = {"nested/accuracy": format_percent, "nested/log_loss": format_loss}
        cells = [cell for key, show in shown.items() for cell in spell_estimate(metrics, key, show)]
        rows.append(["nested cross-validation", *cells])
    for split, name in (("val", "validation split"), ("test", "test split")):
        score = score_split(metrics, config, split)
        if score["judged"]:
            judged = f"{name}, {score['correct']} of {score['judged']} right"
            interval = " to ".join(map(format_percent, score["interval"]))
            rows.append([judged, format_percent(score["accuracy"]), interval, format_loss(score["loss"]), "–"])
    return rows


def spell_estimate(metrics: dict[str, Any], key: str, show: Callable[[Any], str]) -> list[str]:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return [show(metrics[key]), f"{show(low)} to {show(high)}" if is_number(low) and is_number(high) else "–"]
