"""The sweep's section: what won, by how much, and how sure that is."""

from typing import Any

import numpy as np
import pandas as pd

from plates.report.plots import COLOURS, draw_lines, themed_axes
from plates.report.text import format_loss, format_number
from plates.rundir import read_csv
from plates.storage import Place

NUM_LISTED = 10
LISTED = ["trial", "lr", "step_size", "gamma", "log_loss", "log_loss_low", "log_loss_high", "accuracy", "remark"]


def show_sweep(run: Place, metrics: dict[str, float]) -> dict[str, Any] | None:
    """None where the run is no sweep."""
    if not (run / "trials.csv").exists():
        return None
    trials = read_csv(run / "trials.csv")
    histories = [read_csv(run / name) for name in ("history.csv", "history_baseline.csv")]
    return {
        "name": "sweep",
        "metrics": metrics,
        "plots": [plot for plot in (draw_map(trials), draw_scores(trials), draw_winner(*histories)) if plot],
        "header": [column.replace("_", " ") for column in LISTED],
        "rows": list_best(trials),
    }


def list_best(trials: pd.DataFrame) -> list[list[str]]:
    """The ten best trials, and the baseline where it is not among them."""
    ranked = trials.sort_values("log_loss", ignore_index=True)
    shown = ranked[(np.arange(len(ranked)) < NUM_LISTED) | ranked["is_baseline"]]
    rows = []
    for row in shown.to_dict("records"):
        remarks = [name for name in ("winner", "baseline") if row[f"is_{name}"]]
        if not row["is_distinguishable"] and not row["is_winner"]:
            remarks.append("not distinguishable from the winner")
        numbers = [f"{row['lr']:.2e}", f"{row['step_size']:.0f}", f"{row['gamma']:.2f}"]
        interval = [format_number(row[f"log_loss_{bound}"], 4) for bound in ("low", "high")]
        scores = [format_loss(row["log_loss"]), *interval, f"{row['accuracy']:.1%}"]
        rows.append([str(row["trial"]), *numbers, *scores, ", ".join(remarks)])
    return rows


def draw_map(trials: pd.DataFrame) -> dict[str, str]:
    """Log-loss over lr and step_size: the larger the dot, the lower the loss; the winner is filled."""
    drawn: dict[str, str] = {}
    ranks = trials["log_loss"].rank().to_numpy() / len(trials)
    with themed_axes("log-loss by lr and step_size (large: low)", "lr", 2.6, drawn) as axes:
        colours = [COLOURS["train" if base else "accent"] for base in trials["is_baseline"]]
        sizes = 6 + 90 * (1 - ranks) ** 3
        faces = [colour if won else "none" for colour, won in zip(colours, trials["is_winner"], strict=True)]
        axes.scatter(trials["lr"], trials["step_size"], s=sizes, edgecolors=colours, facecolors=faces)
        axes.set_xscale("log")
        axes.set_ylabel("step_size", color=COLOURS["muted"])
    best = trials.iloc[int(trials["log_loss"].to_numpy().argmin())]
    where = f"lr {best['lr']:.3g}, step_size {best['step_size']:.0f}"
    return {**drawn, "alt": f"map of {len(trials)} trials; the winner has {where}"}


def draw_scores(trials: pd.DataFrame) -> dict[str, str]:
    """Each trial's log-loss, none where it diverged, and the best so far."""
    losses = trials["log_loss"].replace(np.inf, np.nan).to_numpy()
    lines = [("trial", "muted", ":", losses), ("best so far", "accent", "-", np.fmin.accumulate(losses))]
    return draw_lines(trials["trial"].to_numpy(), lines, "cross-validated log-loss", "trial", 2.6)


def draw_winner(history: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, str]:
    """Training loss of winner and baseline, both on all labelled images."""
    lines = [
        ("winner", "accent", "-", history["train/loss"].to_numpy()),
        ("baseline", "train", "--", baseline["train/loss"].to_numpy()),
    ]
    return draw_lines(history["epoch"].to_numpy(), lines, "training loss on all labelled images", "epoch", 2.6)
