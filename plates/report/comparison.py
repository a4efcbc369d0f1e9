"""Runs side by side: what of their settings differs, their figures, times and curves, and where they disagree."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from plates.config import UserError
from plates.dataset import Dataset, load_test_split
from plates.report import read_json, read_table, read_times, to_numbers
from plates.report.plots import Plot, draw_lines
from plates.report.predictions import encode_thumbnail, read_predictions
from plates.report.scores import score_split
from plates.report.search import spell
from plates.report.text import format_number, format_probability, format_setting
from plates.rules import is_drawn
from plates.storage import Place, place_of

JOBS = ("train", "tune", "predict")
NO_SETTINGS = {"status", "requested", "notes", "timing", "versions", "data_check"}  # of config.json
CURVES = ("train/loss", "val/loss", "val/accuracy")
LOOKS = [(colour, dash) for dash in ("-", "--", ":", "-.") for colour in ("accent", "train", "muted")]
NUM_PICTURES = 24
HELD_OUT = "Labelled images, each judged while it was held out"
MCNEMAR = ["runs", "images", "first right", "second right", "only first", "only second", "p"]


@dataclass(frozen=True)
class FinishedRun:
    """`figures`: by the names of metrics.json and timing.csv, with NAME_low and NAME_high of the 95% intervals."""

    number: str  # counted from 1: names may be alike
    place: Place
    config: dict[str, Any]
    figures: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.number} {self.place.name}"

    @property
    def settings(self) -> dict[str, Any]:
        versions = {f"versions/{name}": value for name, value in self.config.get("versions", {}).items()}
        return {name: value for name, value in self.config.items() if name not in NO_SETTINGS} | versions


def find_runs(named: Sequence[str]) -> list[FinishedRun]:
    """Raises: UserError for what is no finished run of train, tune or predict, or is named twice."""
    runs: list[FinishedRun] = []
    for text in named:
        place = place_of("RUN", text)
        place = place.resolve() if isinstance(place, Path) else place
        if any(place == run.place for run in runs):
            raise UserError(f"RUN {text}: is given twice; give different runs")
        try:
            config = json.loads((place / "config.json").read_text("utf-8"))
            job, status = config["job"], config["status"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"RUN {text}: holds no run; give a run directory of {', '.join(JOBS)}") from None
        if job not in JOBS or status != "finished":
            raise UserError(f"RUN {text}: is a run of {job}, {status}; give finished ones of {', '.join(JOBS)}")
        runs.append(FinishedRun(str(len(runs) + 1), place, config, collect_figures(place, config)))
    return runs


def collect_figures(run: Place, config: dict[str, Any]) -> dict[str, Any]:
    metrics = read_json(run / "metrics.json")
    figures = {name: value for name, value in metrics.items() if name.startswith("nested/")}
    for split in ("val", "test"):
        score = score_split(metrics, config, split)
        if score["judged"]:
            figures |= {f"{split}/{name}": score[name] for name in ("accuracy", "loss", "judged")}
            figures |= dict(zip((f"{split}/accuracy_low", f"{split}/accuracy_high"), score["interval"], strict=True))
    return figures | read_times(read_table(run / "timing.csv"))


def list_settings(runs: list[FinishedRun]) -> tuple[list[list[str]], int, int]:
    """A row of each setting that differs between the runs that have it; how many are alike in all; how many are of
    some runs alone."""
    rows, num_alike, num_partial = [], 0, 0
    settings = [run.settings for run in runs]
    for name in dict.fromkeys(chain(*settings)):
        values = [one[name] for one in settings if name in one]
        if any(value != values[0] for value in values):
            rows.append([name, *(format_setting(one.get(name)) for one in settings)])
        elif len(values) == len(runs):
            num_alike += 1
        else:
            num_partial += 1
    return rows, num_alike, num_partial


def list_figures(runs: list[FinishedRun]) -> list[list[str]]:
    """A row of each figure that a run has, an interval beside its value."""
    known = dict.fromkeys(chain(*(run.figures for run in runs)))
    shown = [name for name in known if not name.endswith(("_low", "_high"))]
    names = sorted(shown, key=lambda name: "/" not in name)  # the times last
    rows = [[name, *(show_figure(run.figures, name) for run in runs)] for name in names]
    return [row for row in rows if {*row[1:]} != {"–"}]


def show_figure(figures: dict[str, Any], name: str) -> str:
    value = figures.get(name)
    if isinstance(value, int) or name not in figures:
        return str(figures.get(name, "–"))
    return format_number(value, 1) if name.endswith(("_s", "_per_sec")) else spell(figures, name)


def tabulate_runs(runs: list[FinishedRun]) -> pd.DataFrame:
    """compare.csv: a row a run, with the settings that differ and all figures."""
    differing = [name for name, *_ in list_settings(runs)[0]]
    rows = []
    for run in runs:
        settings = {name: format_setting(run.settings.get(name)) for name in differing}
        rows.append({"run": str(run.place), "job": run.config["job"], **settings, **run.figures})
    return pd.DataFrame(rows)


def draw_curves(runs: list[FinishedRun]) -> list[Plot]:
    """A line a run, of two or more that were trained by epochs, over the epochs of the longest."""
    histories = {run.number: to_numbers(read_table(run.place / "history.csv")) for run in runs}
    tables = {n: t.set_index("epoch") for n, t in histories.items() if len(t) and t["lr"].notna().any()}
    plots = []
    for column in CURVES if len(tables) > 1 else ():
        curves = pd.DataFrame({number: table[column] for number, table in tables.items()})
        looks = [LOOKS[(int(number) - 1) % len(LOOKS)] for number in tables]
        lines = [(f"run {n}", *look, curves[n].to_numpy()) for n, look in zip(tables, looks, strict=True)]
        plots.append(draw_lines(curves.index.to_numpy(), lines, column, "epoch", 2.2))
    return [plot for plot in plots if plot]


def why_apart(runs: list[FinishedRun]) -> str:
    """Why the runs' images cannot be compared; empty where they can."""
    if any(run.config["classes"] != runs[0].config["classes"] for run in runs):
        return "The runs have different classes: their predictions are not compared."
    data = {(run.config["data"], run.config.get("seed")) for run in runs}
    if any(is_drawn(name) and (len(data) > 1 or seed is None) for name, seed in data):
        return "The runs’ plates were not all drawn by the same --data and --seed: predictions are not compared."
    return ""


def find_pictures(runs: list[FinishedRun]) -> tuple[dict[str, Dataset], dict[str, str]]:
    """By path of an image, the data set that it can still be read from; and its true label, where that knows it."""
    sources: dict[str, Dataset] = {}
    labels: dict[str, str] = {}
    for data, seed in dict.fromkeys((run.config["data"], run.config.get("seed", 0)) for run in runs):
        with suppress(UserError):  # gone, or on another machine
            dataset = load_test_split(data, seed)
            for sample in chain(dataset.train, dataset.val, dataset.test):
                sources.setdefault(sample.path, dataset)
                if sample.label is not None:
                    labels.setdefault(sample.path, dataset.classes[sample.label])
    return sources, labels


def read_guesses(runs: list[FinishedRun], file: str) -> dict[str, pd.DataFrame]:
    """By run's number, where there are images in the file: guess, chance and label by path."""
    found = {}
    for run in runs:
        table = read_predictions(run.place / file) if (run.place / file).exists() else pd.DataFrame()
        if len(table):
            is_other = table["chance_1"] > table["chance_0"]  # held out, where the label is the true one
            guess = table["name_0"].mask(is_other, table["name_1"])
            table = table.assign(guess=guess, chance=table[["chance_0", "chance_1"]].max(axis=1))
            found[run.number] = table.set_index("path")[["guess", "chance", "label"]]
    return found


def labels_by_path(paths: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """What the folders of test/CLASS/… say; {} unless all images lie in folders of classes."""
    parts = {path: PurePosixPath(path).parts for path in paths}
    are_known = all(len(part) > 2 and part[1] in classes for part in parts.values())
    return {path: part[1] for path, part in parts.items()} if are_known else {}


def compare_predictions(runs: list[FinishedRun]) -> dict[str, dict[str, Any]]:
    """Sections of the test images, and of the labelled ones that searches held out, where two runs have any."""
    sources, known = find_pictures(runs)
    tested, held_out = (read_guesses(runs, file) for file in ("predictions.csv", "out_of_fold.csv"))
    by_path = labels_by_path([*chain(*(table.index for table in tested.values()))], runs[0].config["classes"])
    given = {path: label for table in held_out.values() for path, label in table["label"].items()}
    sections = {"Test images": (tested, by_path or known), HELD_OUT: (held_out, given)}

    def read_image(path: str) -> np.ndarray:
        if path not in sources:
            raise FileNotFoundError(path)
        return sources[path].read_picture(path)

    return {
        title: compare_images(tables, labels, read_image)
        for title, (tables, labels) in sections.items()
        if len(tables) > 1
    }


def compare_images(
    tables: dict[str, pd.DataFrame], labels: dict[str, str], read_image: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    """Where runs disagree, and whether one is right more often.

    tables: as `read_guesses` returns them. labels: the true ones by path, as far as they are known.
    """
    guesses, chances = (pd.DataFrame({n: t[name] for n, t in tables.items()}) for name in ("guess", "chance"))
    first = guesses.bfill(axis=1).iloc[:, 0]
    differ = (guesses.notna() & guesses.ne(first, axis=0)).any(axis=1)
    pairs = [mcnemar(pair, tables, labels) for pair in combinations(tables, 2)]
    return {
        "num_shared": int((guesses.count(axis=1) > 1).sum()),
        "num_disagreed": int(differ.sum()),
        "pairs": [pair for pair in pairs if pair],
        "pictures": show_disagreements(guesses[differ], chances[differ], labels, read_image),
    }


def show_disagreements(
    guesses: pd.DataFrame, chances: pd.DataFrame, labels: dict[str, str], read_image: Callable[[str], np.ndarray]
) -> list[dict[str, Any]]:
    """Each run's guess, the most confident disagreements first: by the second most confident class."""

    def confidence(path: str) -> float:
        said = pd.Series(chances.loc[path].fillna(0).to_numpy(), index=guesses.loc[path].to_numpy())
        return float(said.groupby(level=0).max().nlargest(2).iloc[-1])

    pictures = []
    for path in sorted(guesses.index, key=lambda path: (-confidence(path), path))[:NUM_PICTURES]:
        said = guesses.loc[path].dropna()
        try:
            thumbnail = encode_thumbnail(read_image(path))
        except OSError:
            thumbnail = ""
        truth = f": {labels[path]}" if path in labels else ""
        bars = [(f"{number} {guess}", chances.at[path, number]) for number, guess in said.items()]
        pictures.append({"uri": thumbnail, "alt": path, "title": PurePosixPath(path).stem + truth, "bars": bars})
    return pictures


def mcnemar(pair: tuple[str, str], tables: dict[str, pd.DataFrame], labels: dict[str, str]) -> list[str]:
    """McNemar's exact test as a row: of the images that only one of two runs has right, has each run half?
    (Psychometrika 12, 1947; by the binomial distribution.) [] where no image with a known label is shared."""
    from scipy.stats import binomtest

    one, other = (tables[number] for number in pair)
    shared = [path for path in one.index.intersection(other.index) if path in labels]
    truth = pd.Series(labels, dtype=object)[shared]
    first, second = ((t["guess"][shared].eq(truth) & t["chance"][shared].notna()).to_numpy() for t in (one, other))
    alone = [int((first & ~second).sum()), int((second & ~first).sum())]
    p = float(binomtest(alone[0], sum(alone)).pvalue) if sum(alone) else 1.0
    counts = [len(shared), int(first.sum()), int(second.sum()), *alone]
    return [" and ".join(pair), *map(str, counts), format_probability(p)] if shared else []
