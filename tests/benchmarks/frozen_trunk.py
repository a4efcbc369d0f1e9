"""Times `ray_jobs.train` against the published loop in plain PyTorch, and against its own bare forward passes.

python tests/benchmarks/frozen_trunk.py PHOTOS [--repeats 3] [--published-epochs 100]

PHOTOS is laid out as train/CLASS/*, test/*. All parts run interleaved on ResNet18 with random weights (the speed is
that of pretrained ones) and an empty cache; the last line is one JSON object of medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from plates.device import CPU_BATCH_SIZE, DTYPES, best_precision, set_up_process
from plates.folding import fast_trunk
from plates.images import decode
from plates.model import build_trunk

NUM_FORWARDS = {"train_100_views": 100 * 32 + 8, "train_20_views": 20 * 32 + 8}


def bare_rate(num_batches: int = 12) -> float:
    """Images/s of the trunk on a tensor in memory, at the precision and batch that the project uses."""
    device = torch.device("cpu")
    precision = best_precision(device)
    set_up_process(device, precision, torch.get_num_threads())
    dtype = DTYPES[precision]
    trunk = fast_trunk(build_trunk("resnet18")[0], device, dtype)
    batch = torch.randn(CPU_BATCH_SIZE, 3, 224, 224).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        trunk(batch)
        start_s = time.perf_counter()
        for _ in range(num_batches):
            trunk(batch)
        return num_batches * len(batch) / (time.perf_counter() - start_s)


def run_train(photos: Path, num_views: int) -> dict[str, float]:
    """One whole `ray_jobs.train` in a process and with a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ray_jobs.train", "--data", str(photos), "--out", f"{folder}/run"]
        command += ["--backbone", "resnet18", "--weights", "none", "--num-views", str(num_views)]
        start_s = time.perf_counter()
        environment = {**os.environ, "PLATES_CACHE": f"{folder}/cache"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        wall_s = time.perf_counter() - start_s
        whole = pd.read_csv(f"{folder}/run/timing.csv").iloc[0]
    return {"wall_s": wall_s, "train_s": whole["train_s"], "inference_rate": whole["inference_images_per_sec"]}


def run_published(photos: Path, epochs: int) -> dict[str, float]:
    """The published loop in a process of its own, its training scaled from `epochs` to 100."""
    settings = {"data": str(photos), "backbone": "resnet18", "weights": "none", "trainable": "head", "seed": 0}
    settings |= {"image_size": 224, "device": "cpu", "num_epochs": epochs, "skip_unreadable": False, "limit_s": 1e9}
    start_s = time.perf_counter()
    command = [sys.executable, "-m", "plates.published", json.dumps(settings)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    wall_s = time.perf_counter() - start_s
    inner = json.loads(ended.stdout.splitlines()[-1])
    train_s = inner["train_s"] * 100 / epochs
    return {"wall_s": wall_s - inner["train_s"] + train_s, "train_s": train_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--published-epochs", type=int, default=100)
    arguments = parser.parse_args()
    photos = arguments.photos.resolve()
    first = next((photos / "test").iterdir())
    decode(first.read_bytes())  # fails here, not after minutes, where PHOTOS is not what it should be
    measured: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats):
        parts = {
            "bare": {"rate": bare_rate()},
            "train_100_views": run_train(photos, 100),
            "bare_again": {"rate": bare_rate()},
            "train_20_views": run_train(photos, 20),
            "published": run_published(photos, arguments.published_epochs),
        }
        bare = (parts["bare"]["rate"] + parts["bare_again"]["rate"]) / 2
        for views, num_forwards in NUM_FORWARDS.items():
            run = parts[views]
            ratios = {
                "train_over_bare_forwards": run["train_s"] * bare / num_forwards,
                "inference_over_bare_rate": run["inference_rate"] / bare,
                "training_speedup": parts["published"]["train_s"] / run["train_s"],
                "whole_speedup": parts["published"]["wall_s"] / run["wall_s"],
            }
            for name, value in {**run, **ratios}.items():
                measured.setdefault(f"{views}/{name}", []).append(float(value))
        measured.setdefault("bare_rate", []).append(bare)
        measured.setdefault("published/train_s", []).append(parts["published"]["train_s"])
        measured.setdefault("published/wall_s", []).append(parts["published"]["wall_s"])
        print(f"repeat {repeat}: { ({name: round(values[-1], 2) for name, values in measured.items()}) }", flush=True)
    print(json.dumps({name: round(statistics.median(values), 3) for name, values in measured.items()}))


if __name__ == "__main__":
    main()
