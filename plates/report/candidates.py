"""The candidates of a search of all: in words, as a table, and what each choice would have lost."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd

from plates.report.plots import COLOURS, Plot, draw_plot
from plates.report.sweep import pick_best
from plates.report.text import format_loss, format_number, format_percent

# The choices of a search as the page names them, by column of trials.csv.
CHOICES = {"head": "head", "readout": "readout", "crop": "crop", "image_size": "size", "num_views": "trained on",
           "tta": "predicts by"}  # fmt: skip
HEADS = {"adam": "the recipe’s head", "logistic": "logistic regression"}
CROPS = {"none": "whole image", "foreground": "foreground"}
VIEWS = {"crop": "crops", "both": "turned crops", "dihedral": "symmetries"}
PARTS = {"last": "the last layer", "pre": "the last stage before a final convolution"}
POOLINGS = {"avg": "average", "max": "maximum", "token": "class token", "patches": "patch mean"}


def name_choices(trials: pd.DataFrame, config: dict[str, Any]) -> pd.DataFrame:
    """A row a candidate, a column a choice: its level, short."""
    of_recipe = config.get("requested", {}).get("augment", "crop")
    rows = []
    for row in trials.to_dict("records"):
        augment = of_recipe if row["head"] == "adam" else "dihedral"  # logistic regression's are the symmetries
        views = f"{row['num_views']} {VIEWS[augment]}"
        views = "image as it is" if views == "1 symmetries" else views
        predicts = "one view" if row["tta"] == 1 else f"mean of {row['tta']}"
        rows.append([row["head"], row["readout"], CROPS[row["crop"]], f"{row['image_size']} px", views, predicts])
    return pd.DataFrame(rows, columns=pd.Index(CHOICES.values()), index=trials.index)


def describe(row: Mapping[Any, Any]) -> str:
    """A candidate in a line."""
    views = f"{row['num_views']} view{'s' if row['num_views'] > 1 else ''} to train on, {row['tta']} to predict"
    return f"{HEADS[row['head']]} on {row['readout']}, {CROPS[row['crop']]}, {row['image_size']} px, {views}"


def spell_model(named: pd.DataFrame, trials: pd.DataFrame) -> str:
    """The winner in a sentence or two."""
    winner = int(trials["is_winner"].to_numpy().argmax())
    level, row = named.iloc[winner], trials.to_dict("records")[winner]
    readouts = []
    for readout in row["readout"].split("+"):
        part, _, pooling = readout.partition("/")
        readouts.append(f"the {POOLINGS[pooling]} of {PARTS.get(part, part.replace('stage', 'stage '))}")
    head = HEADS[row["head"]][0].upper() + HEADS[row["head"]][1:]
    seen = "the whole image" if row["crop"] == "none" else "the foreground’s box"
    trained = "the image as it is" if level["trained on"] == "image as it is" else f"{level['trained on']} of each"
    predicts = "from the image as it is" if row["tta"] == 1 else f"by the mean of {row['tta']} views"
    return (
        f"{head} ({spell_settings(row)}) on {' and '.join(readouts)} ({row['readout']}), of {seen} at "
        f"{level['size']}. It is trained on {trained} and predicts {predicts}."
    )


def spell_settings(row: Mapping[Any, Any]) -> str:
    if row["head"] == "logistic":
        return f"strength {row['strength']:.3g}"
    return f"lr {row['lr']:.2g}, step {row['step_size']:.0f}, gamma {row['gamma']:.2g}"


def list_candidates(trials: pd.DataFrame, named: pd.DataFrame) -> dict[str, Any]:
    """Header and rows of the ten best candidates, the winner and the baseline, by the choices that differ."""
    best, differing, rows = pick_best(trials), differ(named), []
    levels = named.loc[best.index, differing].to_numpy(dtype=str).tolist()
    for of_row, row in zip(levels, best.to_dict("records"), strict=True):
        low, high = (format_number(row[f"log_loss_{bound}"], 4) for bound in ("low", "high"))
        verdict = "baseline: " * bool(row["is_baseline"] and not row["is_winner"]) + tell_apart(row)
        rows.append([
            *of_row, spell_settings(row), str(row["trial"]),
            format_loss(row["log_loss"]), f"{low}–{high}", format_percent(row["accuracy"]), verdict,
        ])  # fmt: skip
    header = [*differing, "settings", "trial", "log-loss", "95% interval", "accuracy", "told apart"]
    return {"header": header, "rows": rows, "num_texts": len(differing) + 1}


def tell_apart(row: Mapping[Any, Any]) -> str:
    """Whether a candidate is worse than the winner by more than the noise between images."""
    return "winner" if row["is_winner"] else "yes" if row["is_distinguishable"] else "no"


def differ(named: pd.DataFrame) -> list[str]:
    """The choices of more than one level."""
    return [choice for choice in CHOICES.values() if named[choice].nunique() > 1]


def list_losses(trials: pd.DataFrame, named: pd.DataFrame) -> list[list[str]]:
    """For each level of each choice: how many candidates have it, the least log-loss of them, what that is above the
    winner's, and whether the noise between images tells the two apart."""
    own = float(trials.loc[trials["is_winner"], "log_loss"].iloc[0])
    rows = []
    for choice, level, chosen in levels_of(trials, named):
        best = chosen.sort_values("log_loss").to_dict("records")[0]
        lost = best["log_loss"] - own
        verdict = "winner" if chosen["is_winner"].any() else tell_apart(best)
        loss = format_loss(best["log_loss"])
        rows.append([choice, level, str(len(chosen)), loss, f"{lost:+.4f}" if isfinite(lost) else "–", verdict])
    return rows


def levels_of(trials: pd.DataFrame, named: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Choice, level and its candidates, in the order of the choices and of the levels' numbers."""
    found = []
    for column, choice in CHOICES.items():
        if choice in differ(named):
            order = trials.sort_values(column, kind="stable").index
            levels = named[choice].loc[order].unique()
            found += [(choice, level, trials[named[choice] == level]) for level in levels]
    return found


def draw_choices(trials: pd.DataFrame, named: pd.DataFrame) -> Plot | None:
    """Every candidate's log-loss by the level of each choice, to a little above the worst level's best."""
    levels = levels_of(trials, named)
    bests = [float(chosen["log_loss"].min()) for _, _, chosen in levels]
    if not np.isfinite(bests).any():
        return None
    limit = 1.15 * max(best for best in bests if isfinite(best))
    own = float(trials.loc[trials["is_winner"], "log_loss"].iloc[0])
    heights, before = [], levels[0][0]
    for choice, _, _ in levels:
        heights.append(heights[-1] + (1 if choice == before else 1.7) if heights else 0.0)
        before = choice
    num_hidden = int((trials["log_loss"] > limit).sum())
    label = f"log-loss ({num_hidden} above are not shown)" if num_hidden else "log-loss"
    with draw_plot("candidates by choice", label, 0.9 + 0.19 * heights[-1]) as drawn:
        axes, plot = drawn
        axes.axvline(own, color=COLOURS["accent"], linewidth=0.8, linestyle=":")
        for height, (_, _, chosen) in zip(heights, levels, strict=True):
            shown = chosen[chosen["log_loss"] <= limit]
            axes.plot(shown["log_loss"], [height] * len(shown), "o", color=COLOURS["muted"], markersize=3, alpha=0.5)
            if chosen["is_winner"].any():
                axes.plot([own], [height], "o", color=COLOURS["accent"], markersize=5)
        axes.set_yticks(heights, [level for _, level, _ in levels])
        axes.invert_yaxis()
        axes.set_xlim(right=limit)
    plot["alt"] = (
        f"log-loss of {len(trials)} candidates by level of {len(differ(named))} choices, as the table has it"
    )
    return plot
