"""The benchmark's section: one table, three plots, and the model of the scaling."""

import json
from typing import Any

import numpy as np

from plates.report.plots import COLOURS, themed_axes
from plates.storage import Place

SHOWN_PHASES = ["startup_s", "data_s", "train_s", "inference_s", "teardown_s"]
HEADER = [
    "row", "device", "precision", "startup", "data", "train", "infer", "total", "train/s", "per worker", "speed-up",
    "efficiency", "val accuracy", "device-s",
]  # fmt: skip


def show_benchmark(run: Place) -> dict[str, Any] | None:
    """None where the run is no benchmark."""
    if not (run / "benchmark.json").exists():
        return None
    found = json.loads((run / "benchmark.json").read_text())
    done = [row for row in found["rows"] if "reason" not in row]
    return {
        "name": "benchmark",
        "num_repeats": found["repeats"],
        "header": HEADER,
        "rows": tabulate_benchmark(found),
        "reasons": [f"{row['row']} could not run: {row['reason']}" for row in found["rows"] if "reason" in row],
        "remark": "The published loop was timed over a few epochs and its training extrapolated to all; "
        "the first plot leaves it out.",
        "plots": [draw_phases(done), draw_speedup(done), draw_rates(done)] if done else [],
        "model": say_model(found["model"]),
    }


def tabulate_benchmark(found: dict[str, Any]) -> list[list[str]]:
    """Cells of the table, as in the terminal; unknown is –."""
    rows = []
    for row in found["rows"]:
        if "reason" in row:
            rows.append([row["row"], row["device"], *["–"] * (len(HEADER) - 2)])
            continue
        seconds = [spread(row.get(phase)) for phase in ("startup_s", "data_s", "train_s", "inference_s", "total_s")]
        accuracy = row["val/accuracy"]
        rows.append(
            [
                row["row"] + (" (extrapolated)" if row["is_extrapolated"] else ""),
                row["device_name"],
                row["precision"],
                *seconds,
                f"{row['train_images_per_sec']:.1f}",
                f"{row['train_images_per_sec_per_worker']:.1f}",
                *(f"{row[key]:.2f}" if key in row else "–" for key in ("total_speedup", "efficiency")),
                "–" if accuracy is None else f"{accuracy:.1%}",
                f"{row['device_seconds']:.0f}",
            ]
        )
    return rows


def spread(values: dict[str, float] | None) -> str:
    if values is None:
        return "–"
    if values["min"] == values["max"]:
        return f"{values['median']:.1f}"
    return f"{values['median']:.1f} ({values['min']:.1f}–{values['max']:.1f})"


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


def draw_phases(done: list[dict[str, Any]]) -> dict[str, str]:
    """Median seconds of each phase, stacked, a bar a row; extrapolated rows would dwarf the others."""
    drawn: dict[str, str] = {}
    done = [row for row in done if not row["is_extrapolated"]]
    names = [row["row"] for row in done]
    shades = [COLOURS["line"], COLOURS["muted"], COLOURS["accent"], COLOURS["train"], COLOURS["muted"]]
    with themed_axes("seconds by phase", "seconds", 2.6, drawn) as axes:
        left = np.zeros(len(done))
        for phase, shade, alpha in zip(SHOWN_PHASES, shades, (1, 1, 1, 1, 0.4), strict=True):
            width = np.array([row.get(phase, {"median": 0.0})["median"] for row in done])
            axes.barh(names, width, left=left, color=shade, alpha=alpha, label=phase.removesuffix("_s"), height=0.7)
            left += width
        axes.invert_yaxis()
        legend = {"frameon": False, "labelcolor": COLOURS["muted"], "fontsize": 7}
        axes.figure.legend(loc="outside lower center", ncols=5, handlelength=1, columnspacing=1, **legend)
    return {**drawn, "alt": "; ".join(f"{name} {total:.0f} s" for name, total in zip(names, left, strict=True))}


def draw_speedup(done: list[dict[str, Any]]) -> dict[str, str]:
    """Training images/s over that of the smallest number of workers, against the ideal line."""
    drawn: dict[str, str] = {}
    spoken = []
    with themed_axes("training speed-up against ideal", "Ray workers", 2.6, drawn) as axes:
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
    return {**drawn, "alt": "; ".join(spoken) or "no row on Ray workers"}


def draw_rates(done: list[dict[str, Any]]) -> dict[str, str]:
    """Training images per second, a bar a row."""
    drawn: dict[str, str] = {}
    names, rates = [row["row"] for row in done], [row["train_images_per_sec"] for row in done]
    with themed_axes("training images/s", "images/s", 2.6, drawn) as axes:
        axes.barh(names, rates, color=COLOURS["accent"], height=0.7)
        axes.invert_yaxis()
    return {**drawn, "alt": "; ".join(f"{name} {rate:.0f}/s" for name, rate in zip(names, rates, strict=True))}
