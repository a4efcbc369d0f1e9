"""The section of a recipe's sweep: what won, by how much, and how sure that is; and what a search shares with it."""

from typing import Any

import numpy as np
import pandas as pd

from plates.report.plots import COLOURS, Plot, draw_lines, draw_plot
from plates.report.text import format_loss, format_number, format_percent
from plates.rundir import read_csv
from plates.storage import Place

NUM_LISTED = 10
LISTED = ["trial", "lr", "step_size", "gamma", "log_loss", "log_loss_low", "log_loss_high", "accuracy", "remark"]


def show_sweep(run: Place, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """None where the run is no sweep, or a search of all."""
    trials = read_trials(run)
    if trials is None or is_search(metrics):
        return None
    losses = trials["log_loss"].replace(np.inf, np.nan).to_numpy()
    by_trial = [("trial", "muted", ":", losses), ("best so far", "accent", "-", np.fmin.accumulate(losses))]
    plots = [
        draw_map(trials),
        draw_lines(trials["trial"].to_numpy(), by_trial, "cross-validated log-loss", "trial", 2.6),
        draw_training(run),
    ]
    return {
        "metrics": metrics,
        "caveat": doubt_winner(metrics),
        "num_stopped": int((trials["num_folds"] < trials["num_folds"].max()).sum()),
        "plots": [plot for plot in plots if plot],
        "header": [column.replace("_", " ") for column in LISTED],
        "rows": list_best(trials),
    }


def read_trials(run: Place) -> pd.DataFrame | None:
    """None where the run is no sweep."""
    return read_csv(run / "trials.csv") if (run / "trials.csv").exists() else None


def is_search(metrics: dict[str, Any]) -> bool:
    """Whether a sweep searched more than the recipe."""
    return "winner/head" in metrics


def draw_training(run: Place) -> Plot | None:
    """Training losses by epoch of a winner that was trained by epochs, as the baseline always is."""
    winner, baseline = (read_csv(run / name) for name in ("history.csv", "history_baseline.csv"))
    lines = [
        ("winner", "accent", "-", winner["train/loss"].to_numpy()),
        ("baseline", "train", "--", baseline["train/loss"].to_numpy()),
    ]
    return draw_lines(winner["epoch"].to_numpy(), lines, "training loss on all labelled images", "epoch", 2.6)


def tell_winner(metrics: dict[str, float]) -> str:
    """The sweep's outcome in one line of text for the terminal."""
    winner, baseline = (format_loss(metrics[f"{who}/log_loss"]) for who in ("winner", "baseline"))
    trial = f"trial {metrics['winner/trial']} of {metrics['num_trials']}"
    return f"The sweep's winner is {trial}: log-loss {winner}, the baseline's {baseline}. {doubt_winner(metrics)}"


def doubt_winner(metrics: dict[str, float]) -> str:
    """How far the winner's own figures can be believed, and what nested cross-validation says where there is one."""
    doubt = f"As the best of {metrics['num_trials']} noisy scores the winner's own figures are optimistic"
    if "nested/log_loss" not in metrics:
        return (
            f"{doubt}, and there is no nested estimate beside them: each trial trains the trunk, so that nested "
            "cross-validation would cost the sweep once a fold."
        )
    loss, accuracy = format_loss(metrics["nested/log_loss"]), format_percent(metrics["nested/accuracy"])
    gain = ""
    if metrics["nested/gain"] is not None:
        mean, low, high = (format_number(metrics[f"nested/gain{bound}"], 4) for bound in ("", "_low", "_high"))
        gain = f" and a gain over the baseline of {mean} (95% interval {low} to {high}: the noise between images)"
    return (
        f"{doubt}; nested cross-validation, which chooses inside and scores outside, estimates what such a choice "
        f"gives: a log-loss of {loss}, an accuracy of {accuracy}{gain}."
    )


def list_best(trials: pd.DataFrame) -> list[list[str]]:
    """The ten best trials, and the baseline where it is not among them."""
    rows = []
    for row in pick_best(trials).to_dict("records"):
        remarks = [name for name in ("winner", "baseline") if row[f"is_{name}"]]
        if not row["is_distinguishable"] and not row["is_winner"]:
            remarks.append("not distinguishable from the winner")
        if row["num_folds"] < trials["num_folds"].max():
            remarks.append(f"stopped after {row['num_folds']} folds")
        settings = [str(row["trial"]), f"{row['lr']:.2e}", f"{row['step_size']:.0f}", f"{row['gamma']:.2f}"]
        interval = [format_number(row[f"log_loss_{bound}"], 4) for bound in ("low", "high")]
        rows.append(
            [*settings, format_loss(row["log_loss"]), *interval, f"{row['accuracy']:.1%}", ", ".join(remarks)]
        )
    return rows


def pick_best(trials: pd.DataFrame) -> pd.DataFrame:
    """The rows of the ten best trials, best first, and of the winner and the baseline; their index is kept."""
    ranked = trials.sort_values("log_loss", kind="stable")
    return ranked[(np.arange(len(ranked)) < NUM_LISTED) | ranked["is_baseline"] | ranked["is_winner"]]


def draw_map(trials: pd.DataFrame) -> Plot:
    """Log-loss over lr and step_size: the larger the dot, the lower the loss; the winner is filled."""
    with draw_plot("log-loss by lr and step_size (large: low)", "lr", 2.6) as (axes, plot):
        colours = trials["is_baseline"].map({True: COLOURS["train"], False: COLOURS["accent"]})
        sizes = 6 + 90 * (1 - trials["log_loss"].rank() / len(trials)) ** 3
        faces = colours.where(trials["is_winner"], "none")
        axes.scatter(trials["lr"], trials["step_size"], s=sizes, edgecolors=colours, facecolors=faces)
        axes.set_xscale("log")
        axes.set_ylabel("step_size", color=COLOURS["muted"])
    best = trials[trials["is_winner"]].iloc[0]
    where = f"lr {best['lr']:.3g}, step_size {best['step_size']:.0f}"
    plot["alt"] = f"map of {len(trials)} trials; the winner has {where}"
    return plot
