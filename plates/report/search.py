"""The section of a search of all: which model, how good, how sure, what it gains and what it cost."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from plates.config import TrainConfig
from plates.report.candidates import describe, draw_choices, list_candidates, list_losses, name_choices, spell_model
from plates.report.sweep import draw_training, is_search, read_trials
from plates.report.text import format_loss, format_number, format_percent, is_number
from plates.storage import Place

RECIPE = ("epochs", "lr", "step_size", "gamma", "global_batch_size", "image_size", "num_views", "readout", "crop",
          "resize", "augment", "tta", "head")  # fmt: skip


def show_search(
    run: Place, metrics: dict[str, Any], config: dict[str, Any], times: dict[str, float]
) -> dict[str, Any] | None:
    """None where the run is no search of all.

    times: of the whole run, by column of timing.csv.
    """
    trials = read_trials(run)
    if trials is None or not is_search(metrics):
        return None
    named = name_choices(trials, config)
    plots = [draw_choices(trials, named), draw_training(run) if metrics["winner/head"] == "adam" else None]
    answers = {
        "Which model": spell_model(named, trials),
        "How good": tell_how_good(metrics, len(trials)),
        "How sure": tell_how_sure(trials, config),
        "What it gains": tell_gain(metrics, config),
        "What it cost": f"{spell_times(times).capitalize()}. {tell_left_out(config)}",
    }
    return {
        "answers": answers,
        "plots": [plot for plot in plots if plot],
        "losses": list_losses(trials, named),
        "candidates": list_candidates(trials, named),
        "shared": [f"{name}: {texts.iloc[0]}" for name, texts in named.items() if texts.nunique() == 1],
    }


def tell_search(
    run: Place, metrics: dict[str, Any], config: dict[str, Any], times: dict[str, float]
) -> list[list[str]]:
    """The same answers for the terminal, a line each."""
    trials = read_trials(run)
    if trials is None:
        return []
    alike, _, cheapest = find_alike(trials)
    sure = f"{len(alike)} of {len(trials) - 1} others not distinguishable"
    if cheapest:
        sure += f", cheapest {cheapest['image_size']} px" + f", {cheapest['tta']} views" * (cheapest["tta"] > 1)
    gain = "diverged, as a fold of it or of the baseline did"
    if is_number(metrics.get("nested/gain")):
        gain = f"{spell(metrics, 'nested/gain')} of nested log-loss over {name_baseline(config)}"
        gain += "" if is_proven(metrics) else ", not proven"
    loss, accuracy = (spell(metrics, f"nested/{name}") for name in ("log_loss", "accuracy"))
    num_notes = len(config.get("notes", []))
    notes = f"; {num_notes} note{'s' if num_notes > 1 else ''} in the report" if num_notes else ""
    return [
        ["Model", describe(trials[trials["is_winner"]].to_dict("records")[0])],
        ["Estimate", f"nested log-loss {loss.replace('(', '(95%: ')}, accuracy {accuracy}"],
        ["How sure", f"own {format_number(metrics['winner/log_loss'], 3)} is optimistic; {sure}"],
        ["Gain", gain],
        ["Cost", spell_times(times) + notes],
    ]


def list_estimates(metrics: dict[str, Any]) -> list[Sequence[str]]:
    """Name, value and remark of a search's figures for the head of the page; [] of other runs."""
    if not is_search(metrics) or not is_number(metrics.get("nested/log_loss")):
        return []
    estimates: list[Sequence[str]] = []
    for name, title in (("accuracy", "Estimated accuracy"), ("log_loss", "Estimated log-loss")):
        value, _, interval = spell(metrics, f"nested/{name}").partition(" ")
        estimates.append((title, value, f"95% interval {interval.strip('()')}" if interval else ""))
    return estimates


def tell_how_good(metrics: dict[str, Any], num_trials: int) -> str:
    loss, accuracy = format_loss(metrics["winner/log_loss"]), format_percent(metrics["winner/accuracy"])
    return (
        "Nested cross-validation, which repeats the whole search without the images that it scores, estimates for "
        f"new images, with 95% intervals: log-loss {spell(metrics, 'nested/log_loss')}, accuracy "
        f"{spell(metrics, 'nested/accuracy')}. The winner’s own cross-validated figures are optimistic, since it is "
        f"the best of {num_trials} noisy scores: log-loss {loss}, accuracy {accuracy}."
    )


def tell_how_sure(trials: pd.DataFrame, config: dict[str, Any]) -> str:
    alike, share, cheapest = find_alike(trials)
    if alike.empty:
        return f"All other {len(trials) - 1} candidates are worse by more than the noise between images."
    known = f", {name_baseline(config)} among them" if alike["is_baseline"].any() else ""
    sure = (
        f"{len(alike)} of the other {len(trials) - 1} candidates are not distinguishable from it{known}: their "
        "losses are above it by less than the noise between images. With a confidence of 95% the truly best one is "
        "the winner or one of these."
    )
    if cheapest is None:
        return f"{sure} None of them is cheaper to predict with."
    return (
        f"{sure} The cheapest of them to predict with, at {share:.0%} of the winner’s pixels: {describe(cheapest)}; "
        f"log-loss {format_loss(cheapest['log_loss'])}."
    )


def find_alike(trials: pd.DataFrame) -> tuple[pd.DataFrame, float, dict[Any, Any] | None]:
    """The candidates that the noise cannot tell from the winner; the least of their costs over the winner's, in
    pixels that the trunk sees of an image to predict, and the best one of that cost, None where it is not below."""
    costs = trials["image_size"] ** 2 * trials["tta"]
    shares = costs / costs[trials["is_winner"]].iloc[0]
    alike = trials[~trials["is_distinguishable"] & ~trials["is_winner"]]
    least = float(shares[alike.index].min()) if len(alike) else 1.0
    if least >= 1:
        return alike, 1.0, None
    cheapest = alike[shares[alike.index] == least].sort_values("log_loss")
    return alike, least, cheapest.to_dict("records")[0]


def tell_gain(metrics: dict[str, Any], config: dict[str, Any]) -> str:
    recipe = name_baseline(config)
    loss, accuracy = format_loss(metrics["baseline/log_loss"]), format_percent(metrics["baseline/accuracy"])
    gain = f"Over {recipe} (log-loss {loss}, accuracy {accuracy})"
    if not is_number(metrics["gain/log_loss"]) or not is_number(metrics.get("nested/gain")):
        return f"{gain}: no figure, as training diverged in a fold."
    nested, own = spell(metrics, "nested/gain"), spell(metrics, "gain/log_loss")
    doubt = "" if is_proven(metrics) else "; an interval with 0 in it does not prove a gain"
    return (
        f"{gain}, in log-loss and with 95% intervals: {nested} by nested cross-validation{doubt}. The winner’s own "
        f"gain is optimistic: {own}, an interval that holds for all candidates at once."
    )


def is_proven(metrics: dict[str, Any]) -> bool:
    return is_number(low := metrics.get("nested/gain_low", 0)) and low > 0


def tell_left_out(config: dict[str, Any]) -> str:
    if not config.get("notes"):
        return "Nothing was left out."
    return "What was left out is named at the head of this page."


def spell_times(times: dict[str, float]) -> str:
    named = {"train_s": "search", "inference_s": "prediction", "total_s": "whole run"}
    return ", ".join(f"{name} {format_number(times.get(column), 1)} s" for column, name in named.items())


def spell(metrics: dict[str, Any], key: str) -> str:
    """A mean and its interval, where it has one."""
    show = format_percent if key.endswith("accuracy") else format_loss
    mean, low, high = (metrics.get(f"{key}{bound}") for bound in ("", "_low", "_high"))
    return f"{show(mean)} ({show(low)} to {show(high)})" if is_number(low) and is_number(high) else show(mean)


def name_baseline(config: dict[str, Any]) -> str:
    """What the flags asked for, which is the published recipe by default."""
    requested, published = config.get("requested", {}), TrainConfig()
    is_published = all(name in requested and requested[name] == getattr(published, name) for name in RECIPE)
    return "the published recipe" if is_published else "the baseline"
