"""The benchmark's section: two tables, three plots, and the model of the scaling."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from plates.config import NUM_PUBLISHED_EPOCHS, PUBLISHED_LIMIT_S
from plates.report.plots import COLOURS, Plot, draw_plot
from plates.report.text import format_number, format_percent
from plates.storage import Place
from plates.timing import NUM_WARM_UP_IMAGES

PHASES = ["data", "train", "inference", "teardown"]
# How the plot of phases shows each.
SHADES = {"startup": "line", "data": "muted", "train": "accent", "inference": "train", "teardown": "muted"}
STARTUP_PARTS = {"process and Ray": "startup_process_s", "group": "startup_group_s"}
COUNTS = {"nodes": "num_nodes", "threads": "threads_per_worker", "global batch": "global_batch_size"}
RATES = {
    "train/s": "train_images_per_sec",
    "a worker": "train_images_per_sec_per_worker",
    "steady/s": "steady_images_per_sec",
    "infer/s": "inference_images_per_sec",
}
QUOTED = (
    "Quoted from the course project, not measured here: 454.933 s on a 2.2 GHz Xeon and 141.777 s on a Tesla T4, for "
    "training alone: 100 epochs of 34 of the 40 labelled photos, the head of ResNet18."
)


def show_benchmark(run: Place) -> dict[str, Any] | None:
    """None where the run is no benchmark."""
    if not (run / "benchmark.json").exists():
        return None
    found = json.loads((run / "benchmark.json").read_text())
    done = [row for row in found["rows"] if "reason" not in row]
    seconds, rates = map(break_cells, (tabulate_seconds(found["rows"]), tabulate_rates(found["rows"])))
    return {
        "num_repeats": found["repeats"],
        "is_weak": found["scaling"] == "weak",
        "tables": [("Seconds", seconds[0], seconds[1:], 1), ("What ran, and how fast", rates[0], rates[1:], 3)],
        "reasons": [f"{row['row']} could not run: {row['reason']}" for row in found["rows"] if "reason" in row],
        "base": done[0]["row"] if done else None,
        "num_warm_up": NUM_WARM_UP_IMAGES,
        "num_published": NUM_PUBLISHED_EPOCHS,
        "limit_s": PUBLISHED_LIMIT_S,
        "quoted": QUOTED,
        "plots": [draw_phases(done), draw_speedup(done), draw_rates(done)] if done else [],
        "model": say_model(found["model"]),
    }


def break_cells(table: list[list[str]]) -> list[list[str]]:
    """Cells of two lines where they hold a range or a remark, so that the page is wide enough."""
    cut = re.compile(r" (?=\(\d|after|batch|worker$|accuracy)")
    return [[row[0], *(cut.sub("\n", cell) for cell in row[1:])] for row in table]


def tabulate(header: list[str], rows: list[dict[str, Any]], cells_of: Callable[..., list[str]]) -> list[list[str]]:
    """Header and cells, as on the page and in the terminal; – in a row that could not run."""
    table = [header]
    for row in rows:
        name = row["row"] + " (extrapolated)" * row.get("is_extrapolated", False)
        table.append([name, *(["–"] * (len(header) - 1) if "reason" in row else cells_of(row))])
    return table


def tabulate_seconds(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Where each row's time went."""

    def cells_of(row: dict[str, Any]) -> list[str]:
        return [
            spread(row.get("startup_s")),
            *(format_number(row.get(part, {}).get("median"), 1) for part in STARTUP_PARTS.values()),
            *(spread(row.get(f"{phase}_s")) for phase in (*PHASES, "total")),
            format_number(row.get("total_speedup"), 2),
            format_number(row["device_seconds"], 0),
        ]

    return tabulate(["row", "start-up", *STARTUP_PARTS, *PHASES, "total", "speed-up", "device-s"], rows, cells_of)


def tabulate_rates(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What each row ran on, its images per second, and what the model is worth."""

    def cells_of(row: dict[str, Any]) -> list[str]:
        return [
            row["device_name"],
            row["precision"],
            *(format_number(row[key], 0) for key in COUNTS.values()),
            *(format_number(row[key], 1) for key in RATES.values()),
            format_number(row.get("efficiency"), 2),
            format_percent(row["val/accuracy"]) + f" after {row['num_epochs']} epochs" * row["is_extrapolated"],
        ]

    return tabulate(["row", "device", "precision", *COUNTS, *RATES, "efficiency", "val accuracy"], rows, cells_of)


def spread(values: dict[str, float] | None) -> str:
    if values is None:
        return "–"
    extent = f" ({values['min']:.1f}–{values['max']:.1f})" if values["min"] != values["max"] else ""
    return f"{values['median']:.1f}{extent}"


def say_model(model: dict[str, Any]) -> str:
    """The fit in one sentence, or why there is none."""
    if "reason" in model:
        return f"No model of the scaling: {model['reason']}."
    predicted = ", ".join(f"{time_s:.1f} s on {count}" for count, time_s in model["predicted_total_s"].items())
    residuals = ", ".join(f"{value:+.1f}" for value in model["residuals_s"])
    enough = model["workers_past_which_doubling_saves_under_10_percent"]
    return (
        f"A model, not a measurement: {model['startup_s']:.1f} s start-up + {model['serial_s']:.1f} s serial + "
        f"{model['parallel_s']:.1f} s / workers (residuals {residuals} s) predicts {predicted} workers; "
        f"past {enough} workers a doubling saves less than 10%."
    )


def draw_phases(done: list[dict[str, Any]]) -> Plot:
    """Median seconds of each phase, stacked, a bar a row; extrapolated rows would dwarf the others."""
    done = [row for row in done if not row["is_extrapolated"]]
    names, left = [row["row"] for row in done], np.zeros(len(done))
    with draw_plot("seconds by phase", "seconds", 2.6) as (axes, plot):
        for phase, shade in SHADES.items():
            width = np.array([row.get(f"{phase}_s", {"median": 0.0})["median"] for row in done])
            look = {"color": COLOURS[shade], "alpha": 0.4 if phase == "teardown" else 1, "height": 0.7}
            axes.barh(names, width, left=left, label=phase, **look)
            left += width
        axes.invert_yaxis()
        legend = {"frameon": False, "labelcolor": COLOURS["muted"], "fontsize": 7}
        axes.figure.legend(loc="outside lower center", ncols=5, handlelength=1, columnspacing=1, **legend)
    plot["alt"] = "; ".join(f"{name} {total:.0f} s" for name, total in zip(names, left, strict=True))
    return plot


def draw_speedup(done: list[dict[str, Any]]) -> Plot:
    """Training images/s over that of the smallest number of workers, against the ideal line."""
    spoken = []
    with draw_plot("training speed-up against ideal", "Ray workers", 2.6) as (axes, plot):
        for device, colour in (("cpu", "accent"), ("cuda", "train")):
            rows = [row for row in done if row["device"] == device and "scaling" in row]
            counts = [row["num_workers"] for row in rows]
            if rows:
                ideal = [count / min(counts) for count in counts]
                axes.plot(counts, ideal, ":", color=COLOURS["muted"], label="ideal")
                axes.plot(counts, [row["scaling"] for row in rows], "o-", color=COLOURS[colour], label=device)
                spoken.append(f"{device}: " + ", ".join(f"{r['scaling']:.2f} on {r['num_workers']}" for r in rows))
        axes.locator_params(axis="x", integer=True)
        if spoken:
            axes.legend(frameon=False, labelcolor="linecolor")
    plot["alt"] = "; ".join(spoken) or "no row on Ray workers"
    return plot


def draw_rates(done: list[dict[str, Any]]) -> Plot:
    """Training images per second, a bar a row."""
    names, rates = [row["row"] for row in done], [row["train_images_per_sec"] for row in done]
    with draw_plot("training images/s", "images/s", 2.6) as (axes, plot):
        axes.barh(names, rates, color=COLOURS["accent"], height=0.7)
        axes.invert_yaxis()
    plot["alt"] = "; ".join(f"{name} {rate:.0f}/s" for name, rate in zip(names, rates, strict=True))
    return plot
