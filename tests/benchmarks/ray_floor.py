"""What bare Ray takes on this machine around a run on 2 workers, and what `ray_jobs.train` takes beside it.

python tests/benchmarks/ray_floor.py [--repeats 3]

Bare Ray imports, connects, and runs an empty TorchTrainer loop. Interleaved with it, each in a process of its own and
with an empty cache: `ray_jobs.train --num-workers 2` on drawn plates. Seconds from the start of the process until the
last worker is in its loop, and of the whole process without training, prediction and the reading of data; the last
line is one JSON object of medians.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time

import pandas as pd


def run_bare() -> float:
    """Seconds from the start of this process until an empty loop is entered on 2 workers."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    import psutil
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address="local", logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        fitted = TorchTrainer(
            lambda config: time.time(),
            train_loop_config={},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=folder),
        ).fit()
    ray.shutdown()
    return float(str(fitted.return_value)) - psutil.Process().create_time()


def measure_bare() -> dict[str, float]:
    start_s = time.time()
    command = [sys.executable, __file__, "--bare"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"loop entered": float(said.splitlines()[-1]), "whole": time.time() - start_s}


def measure_train(num_workers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--num-workers", str(num_workers), "--num-views", "2", "--out", f"{folder}/run"]
        start_s = time.time()
        subprocess.run(
            [sys.executable, "-m", "ray_jobs.train", *flags],
            check=True,
            capture_output=True,
            env={**os.environ, "PLATES_CACHE": f"{folder}/cache"},
        )
        wall_s, timing = time.time() - start_s, pd.read_csv(f"{folder}/run/timing.csv").iloc[0]
    work_s = float(timing[["data_s", "train_s", "inference_s"]].sum())
    return {"loop entered": float(timing["startup_s"]), "whole": wall_s - work_s, "with work": wall_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(run_bare())
        return
    measured: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats):
        for name, found in {"bare Ray": measure_bare(), "train": measure_train(2), "here": measure_train(0)}.items():
            for part, seconds in found.items():
                measured.setdefault(f"{name}: {part}", []).append(seconds)
        print(f"repeat {repeat}: { ({name: round(values[-1], 1) for name, values in measured.items()}) }", flush=True)
    print(json.dumps({name: round(statistics.median(values), 1) for name, values in measured.items()}))


if __name__ == "__main__":
    main()
