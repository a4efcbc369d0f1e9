"""Rows of a benchmark: each a training run in a process of its own; then medians, ratios and a model of them."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from plates.config import (
    EXIT_OK,
    EXIT_SOME_UNREADABLE,
    PUBLISHED_LIMIT_S,
    BenchmarkConfig,
    ModelConfig,
)
from plates.rules import DEFAULT_NUM_SYNTHETIC
from plates.rundir import read_csv, write_atomically
from plates.storage import Place, remove_tree

PHASES = ["startup_s", "data_s", "train_s", "inference_s", "teardown_s", "total_s"]
STARTUP_PARTS = ["startup_process_s", "startup_group_s"]
RATES = ["train_images_per_sec", "steady_images_per_sec", "inference_images_per_sec"]
SETUP = ["device_name", "num_nodes", "threads_per_worker", "precision", "global_batch_size"]
SCORES = ["val/accuracy", "val/loss"]
BASELINE_SETTINGS = ("data", "backbone", "weights", "trainable", "image_size", "seed", "skip_unreadable")
ROW_FOLDER = ".row"  # of the run being measured, inside the benchmark's
MIN_COUNTS_TO_FIT = 4
WORTHWHILE_GAIN = 0.1  # a doubling of the workers that saves less than this share of the time does not pay


@dataclass(frozen=True)
class Row:
    """One line of the table: a device and a number of workers; 0 is one process without Ray."""

    kind: str
    device: str
    num_workers: int

    @property
    def name(self) -> str:
        if self.kind == "published":
            return f"published loop, {self.device}"
        workers = "1 Ray worker" if self.num_workers == 1 else f"{self.num_workers} Ray workers"
        return f"{workers if self.num_workers else 'one process, all cores'}, {self.device}"


def plan_rows(config: BenchmarkConfig, num_cpus: int, num_gpus: int) -> list[Row]:
    """By device the published loop, one process without Ray, and the worker counts."""
    rows = []
    for device in dict.fromkeys(config.devices or (["cpu", "cuda"] if num_gpus else ["cpu"])):
        most = num_gpus if device == "cuda" else num_cpus
        counts = config.worker_counts or [2**power for power in range(max(1, most).bit_length())]
        rows += [Row("published", device, 0), *(Row("plates", device, count) for count in sorted({0, *counts}))]
    return rows


def share_threads(rows: list[Row], share: Callable[[int, str], int | None]) -> dict[str, int]:
    """CPU threads of each Ray worker, by device the same in all its rows: as many as its largest group can have.

    Args:
        share: the most CPUs a worker in a group of so many on a device; None where it cannot be placed, as a group
            that will not run.
    """
    shares: dict[str, list[int]] = {row.device: [] for row in rows}
    for row in rows:
        if row.num_workers and (num_threads := share(row.num_workers, row.device)):
            shares[row.device].append(num_threads)
    return {device: min(found, default=1) for device, found in shares.items()}


def measure_row(row: Row, config: BenchmarkConfig, cpus_per_worker: int, keep: Place) -> dict[str, Any]:
    """One repeat of a row, in a new process and with an empty cache; its predictions and skipped.csv are kept.

    Returns: a row of benchmark.csv, with the exit code; where it cannot run here, one whose `reason` says why.
    """
    folder = keep / ROW_FOLDER
    run, environment = folder / "run", {**os.environ, "PLATES_CACHE": str(folder / "cache")}
    command, start_s = command_of(row, config, cpus_per_worker, run), time.perf_counter()
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        wall_s = time.perf_counter() - start_s
        measured = {"row": row.name, **asdict(row), "exit_code": ended.returncode}
        if ended.returncode not in (EXIT_OK, EXIT_SOME_UNREADABLE):
            said = (ended.stderr.strip() or "it said nothing").splitlines()
            return {**measured, "reason": f"exit code {ended.returncode}: {said[-1]}"}
        if row.kind == "published":
            return measured | extrapolate(json.loads(ended.stdout.splitlines()[-1]), config, wall_s)
        for name in ("predictions.csv", "skipped.csv"):
            if (run / name).exists():
                text = (run / name).read_bytes()  # as it is: read as a table, an id 0001 would be 1
                write_atomically(keep / name, partial(Path.write_bytes, data=text))
        return measured | read_run(run, wall_s)
    finally:
        remove_tree(folder)


def command_of(row: Row, config: BenchmarkConfig, cpus_per_worker: int, run: Place) -> list[str]:
    if row.kind == "published":
        settings = {name: getattr(config, name) for name in BASELINE_SETTINGS}
        settings |= {"device": row.device, "num_epochs": config.epochs, "limit_s": PUBLISHED_LIMIT_S}
        return [sys.executable, "-m", "plates.published", json.dumps(settings)]
    command = [sys.executable, "-m", "ray_jobs.train", "--out", str(run), "--device", row.device]
    command += ["--num-workers", str(row.num_workers), *flags_of(config, row.num_workers)]
    return [*command, "--cpus-per-worker", str(cpus_per_worker)] if row.num_workers else command


def flags_of(config: BenchmarkConfig, num_workers: int) -> list[str]:
    """The flags of the training run that the settings stand for.

    In weak scaling N workers get N times the images and N times the global batch, and the learning rate grows by the
    square root of N: Adam's rule in Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms,
    2022, without theirs for its betas and epsilon.
    """
    base = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    base |= {"data": config.data, "precision": config.precision}
    if config.scaling == "weak":
        growth = max(1, num_workers)
        name, *parts = config.data.split(":")
        parts[:1] = [str(int(parts[0] if parts else DEFAULT_NUM_SYNTHETIC) * growth)]
        base |= {"data": ":".join([name, *parts]), "lr": config.lr * math.sqrt(growth)}
        base["global_batch_size"] = config.global_batch_size * growth
    flags = [["--" + name.replace("_", "-"), str(value)] for name, value in base.items() if value is not None]
    return [part for flag in flags for part in flag] + ["--skip-unreadable"] * config.skip_unreadable


def extrapolate(measured: dict[str, Any], config: BenchmarkConfig, wall_s: float) -> dict[str, Any]:
    """The published loop's phases, its training scaled from the epochs that it ran to all."""
    train_s = measured["train_s"] * config.epochs / measured["num_epochs"]
    total_s = wall_s - measured["train_s"] + train_s
    same = ("device_name", "num_epochs", "startup_s", "inference_s", "steady_images_per_sec")
    return {
        **{name: measured[name] for name in (*same, "val/loss", "val/accuracy")},
        "num_nodes": 1,
        "threads_per_worker": measured["num_threads"],
        "precision": "fp32",
        "global_batch_size": 8,
        "startup_process_s": measured["startup_s"],
        "train_s": train_s,
        "teardown_s": total_s - measured["startup_s"] - train_s - measured["inference_s"],
        "total_s": total_s,
        "train_images_per_sec": measured["num_train"] * config.epochs / train_s,
        "inference_images_per_sec": measured["num_test"] / measured["inference_s"] if measured["num_test"] else None,
        "device_seconds": total_s,
        "is_extrapolated": measured["num_epochs"] < config.epochs,
    }


def read_run(run: Place, wall_s: float) -> dict[str, Any]:
    """What a finished run's files say; teardown is what the process took beyond them."""
    described, metrics = (json.loads((run / name).read_text()) for name in ("config.json", "metrics.json"))
    timing = read_csv(run / "timing.csv")
    totals, workers = timing.iloc[0], timing.iloc[1:]
    phases = {name: float(totals[name]) for name in ("startup_s", "data_s", "train_s", "inference_s")}
    return {
        "device_name": ", ".join(described["device_names"]),
        "num_nodes": int(workers["node"].nunique()),
        **{name: described[name] for name in ("threads_per_worker", "precision", "global_batch_size")},
        "num_epochs": described["epochs"],
        **phases,
        **described["timing"],
        "teardown_s": wall_s - sum(phases.values()),
        "total_s": wall_s,
        **{name: float(totals[name]) for name in ("train_images_per_sec", "inference_images_per_sec")},
        **{name: metrics[name] for name in ("val/loss", "val/accuracy")},
        "device_seconds": wall_s * max(1, len(workers)),
        "is_extrapolated": False,
    }


def summarize(repeats: pd.DataFrame, scaling: str = "strong") -> list[dict[str, Any]]:
    """One entry a row, in first-seen order: min, median and max of each phase, medians of rates, speed-ups."""
    columns = ["reason", *SETUP, *PHASES, *STARTUP_PARTS, *RATES, *SCORES, "device_seconds"]
    repeats = repeats.reindex(columns=repeats.columns.union(columns, sort=False))
    entries: list[dict[str, Any]] = []
    for name, group in repeats.groupby("row", sort=False):
        first = group.iloc[0]
        entry = {"kind": first["kind"], "device": first["device"], "num_workers": int(first["num_workers"])}
        entry["row"] = str(name)
        entries.append(entry)
        if group["reason"].notna().any():
            entry["reason"] = group["reason"].dropna().iloc[0]
            continue
        # Whole numbers are floats beside a row that failed.
        entry |= {key: first[key] if isinstance(first[key], str) else int(first[key]) for key in SETUP}
        entry["is_extrapolated"] = bool(group["is_extrapolated"].any())
        entry["num_repeats"] = len(group)
        entry["num_epochs"] = int(group["num_epochs"].min())
        phases = group[[*PHASES, *STARTUP_PARTS]].astype(float)
        entry |= phases.agg(["min", "median", "max"]).dropna(axis=1).to_dict()
        alike = group[group["num_epochs"] == entry["num_epochs"]]  # of the published loop near its limit not all are
        for key, values in [*group[[*RATES, "device_seconds"]].items(), *alike[SCORES].items()]:
            median = values.astype(float).median()
            entry[str(key)] = None if np.isnan(median) else float(median)
        entry["train_images_per_sec_per_worker"] = entry["train_images_per_sec"] / max(1, entry["num_workers"])
    add_speedups(entries, scaling)
    return entries


def add_speedups(entries: list[dict[str, Any]], scaling: str) -> None:
    """Against the first row of all by total time, where both did the same work; and by training time against the
    device's smallest Ray row, the 1 in an efficiency of T(1) / (N T(N)), or T(1) / T(N) in weak scaling, where the
    work is N-fold.
    """
    done = [entry for entry in entries if "reason" not in entry]
    for entry in done:
        if scaling == "strong" or entry["num_workers"] <= 1:
            entry["total_speedup"] = done[0]["total_s"]["median"] / entry["total_s"]["median"]
        on_ray = [e for e in done if e["device"] == entry["device"] and e["num_workers"] > 0]
        if entry["num_workers"] and on_ray:
            base = min(on_ray, key=lambda e: e["num_workers"])
            growth = entry["num_workers"] / base["num_workers"]
            gain = base["train_s"]["median"] / entry["train_s"]["median"]
            entry["efficiency"] = gain if scaling == "weak" else gain / growth
            entry["scaling"] = entry["efficiency"] * growth


def fit_model(entries: list[dict[str, Any]], scaling: str = "strong") -> dict[str, Any]:
    """Total time as start-up + serial + parallel / N for the device with most counts: a model, with its residuals.

    Start-up is the measured median; serial and parallel seconds are fitted to the rest by non-negative least squares.
    Of weak scaling there is none: its work is not divided by N.
    """
    if scaling == "weak":
        return {"reason": "the work grows with the workers; the efficiency is T(1) / T(N) of training"}
    usable = [e for e in entries if e["num_workers"] and "reason" not in e]
    devices = dict.fromkeys(e["device"] for e in usable)
    points = max(([e for e in usable if e["device"] == device] for device in devices), key=len, default=[])
    if len(points) < MIN_COUNTS_TO_FIT:
        return {"reason": f"{len(points)} worker counts measured; a fit needs {MIN_COUNTS_TO_FIT}"}
    counts = np.array([point["num_workers"] for point in points], dtype=float)
    startups, totals = (np.array([point[name]["median"] for point in points]) for name in ("startup_s", "total_s"))
    (serial_s, parallel_s), _ = nnls(np.stack([np.ones_like(counts), 1 / counts], axis=1), totals - startups)
    startup_s = float(np.median(startups))

    def predict_s(count: Any) -> Any:
        return startup_s + serial_s + parallel_s / count

    most, enough = int(counts.max()), 1
    while enough < 2**20 and predict_s(2 * enough) < (1 - WORTHWHILE_GAIN) * predict_s(enough):
        enough *= 2
    return {
        "device": points[0]["device"],
        "startup_s": startup_s,
        "serial_s": float(serial_s),
        "parallel_s": float(parallel_s),
        "residuals_s": (totals - startups + startup_s - predict_s(counts)).tolist(),
        "predicted_total_s": {str(count): predict_s(count) for count in (2 * most, 4 * most)},
        "workers_past_which_doubling_saves_under_10_percent": enough,
    }
