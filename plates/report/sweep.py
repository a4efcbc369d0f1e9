"""The sweep's section: what won, by how much, and how sure that is."""

from typing import Any

import numpy as np
import pandas as pd

from plates.report.plots import COLOURS, draw_lines, themed_axes
from plates.report.text import format_loss, format_number, format_percent
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
        "caveat": doubt_winner(metrics),
        "num_stopped": int((trials["num_folds"] < trials["num_folds"].max()).sum()),
        "plots": [plot for plot in (draw_map(trials), draw_scores(trials), draw_winner(*histories)) if plot],
        "header": [column.replace("_", " ") for column in LISTED],
        "rows": list_best(trials),
    }


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
    estimate = f"a log-loss of {loss}, an accuracy of {accuracy}"
    if metrics["nested/gain"] is not None:
        gain, low, high = (format_number(metrics[f"nested/gain{bound}"], 4) for bound in ("", "_low", "_high"))
        estimate += (
            f" and a gain over the baseline of {gain} (95% interval {low} to {high}: the noise between images)"
        )
    return (
        f"{doubt}; nested cross-validation, which chooses inside and scores outside, estimates what such a choice "
        f"gives: {estimate}."
    )


def list_best(trials: pd.DataFrame) -> list[list[str]]:
    """The ten best trials, and the baseline where it is not among them."""
    ranked = trials.sort_values("log_loss", ignore_index=True)
    shown = ranked[(np.arange(len(ranked)) < NUM_LISTED) | ranked["is_baseline"]]
    rows = []
    for row in shown.to_dict("records"):
        remarks = [name for name in ("winner", "baseline") if row[f"is_{name}"]]
        if not row["is_distinguishable"] and not row["is_winner"]:
            remarks.append("not distinguishable from the winner")
        if row["num_folds"] < trials["num_folds"].max():
            remarks.append(f"stopped after {row['num_folds']} folds")
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
    best = trials.iloc[int(trials["is_winner"].to_numpy().argmax())]
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
