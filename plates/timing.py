"""Where the time went: phases of a process, synchronised with its device."""

import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

TIMING_COLUMNS = [
    "rank", "node", "device", "device_name", "num_workers", "startup_s", "data_s", "train_s", "inference_s",
    "total_s", "train_images_per_sec", "inference_images_per_sec",
]  # fmt: skip
NUM_WARM_UP_IMAGES = 64  # of a worker: decoding has to get ahead, and kernels are chosen and built


class Pace:
    """How fast a worker trains once it runs evenly: images through the model, those of validation included."""

    def __init__(self) -> None:
        self.num_images = 0
        self.start: tuple[int, float] | None = None  # images, and when, at the end of the warm-up
        self.end_s = 0.0

    def count(self, num_images: int) -> None:
        """So many more are through, and their results have been read: the clock needs no other synchronisation."""
        self.num_images += num_images
        self.end_s = time.perf_counter()
        if self.start is None and self.num_images >= NUM_WARM_UP_IMAGES:
            self.start = self.num_images, self.end_s

    def steady_rate(self) -> float | None:
        """Images a second after the counts that hold the first ones; None where fewer than these came after."""
        if self.start is None or self.num_images - self.start[0] < NUM_WARM_UP_IMAGES:
            return None
        return rate(self.num_images - self.start[0], self.end_s - self.start[1])


class Phases:
    """Seconds by phase name; a phase may be entered many times, and phases do not nest."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start_s = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds[name] += time.perf_counter() - start_s


def synchronize(device: torch.device | None) -> None:
    """Waits for queued CUDA work, which a clock would otherwise not see."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def process_age_s() -> float:
    """Seconds since this process was started, interpreter and imports included."""
    return time.time() - psutil.Process().create_time()


def rate(count: int, time_s: float) -> float | None:
    """Items per second; None where nothing was timed."""
    return count / time_s if count and time_s > 0 else None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def startup_and_pace(driver: Phases, trained: list[dict[str, Any]]) -> dict[str, float | None]:
    """What config.json tells beyond timing.csv: parts of start-up, and the steady rate of all workers together.

    Of the driver's phase "process", until all is imported and Ray is connected, and of what each worker of training
    measured.
    """
    rates = [row["steady_images_per_sec"] for row in trained]
    return {
        "startup_process_s": driver.seconds["process"],
        "startup_group_s": max(row["startup_s"] for row in trained),
        "steady_images_per_sec": None if None in rates else sum(rates),
    }


def timing_table(driver: Phases, num_workers: int, workers: list[dict[str, Any]], num_predicted: int) -> pd.DataFrame:
    """The rows of timing.csv: the whole run, then one a worker.

    Start-up ends when the last worker enters the loop; train_s and inference_s are the slowest worker's. What total_s
    has beyond the parts is the group's end and the report.

    Args:
        driver: the phases "startup" and "data".
        workers: by rank, what each measured; `num_train_images` of this run, None where its seconds hold other work.
        num_predicted: images of the test split.
    """
    slowest = {key: max(row[key] for row in workers) for key in ("data_s", "train_s", "inference_s")}
    counts = [row["num_train_images"] for row in workers]
    whole_run = {
        **{key: workers[0][key] for key in ("device", "device_name")},
        **slowest,
        "startup_s": driver.seconds["startup"] + max(row["startup_s"] for row in workers),
        "data_s": driver.seconds["data"] + slowest["data_s"],
        "total_s": process_age_s(),
        "train_images_per_sec": None if None in counts else rate(sum(counts), slowest["train_s"]),
        "inference_images_per_sec": rate(num_predicted, slowest["inference_s"]),
    }
    table = pd.DataFrame([whole_run, *workers]).assign(num_workers=num_workers).reindex(columns=TIMING_COLUMNS)
    return table.astype({"rank": "Int64"})
