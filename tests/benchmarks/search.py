"""Times `plates tune`, what it finds, and `plates predict` from its result against the trunk's bare forward passes.

python tests/benchmarks/search.py [DATA …] [--repeats 3] [--tta 1 8]

DATA is a folder of photos, or synthetic:N:hard. Each search starts with an empty cache, as does each prediction;
each repeat draws other plates. The last line is one JSON object of medians by data and --tta.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pandas as pd
import torch

from plates.checkpoint import load_bundle, rebuild_model
from plates.device import CPU, CPU_BATCH_SIZE, DTYPES, set_up_process
from plates.folding import fast_trunk

FIGURES = ("winner/log_loss", "winner/accuracy", "nested/log_loss", "nested/accuracy", "baseline/log_loss",
           "baseline/accuracy", "nested/gain", "nested/gain_low", "nested/gain_high", "test/accuracy")  # fmt: skip


def run_job(job: str, cache: Path, *flags: str) -> float:
    """Seconds of one job in a process of its own."""
    start_s = time.perf_counter()
    command = [sys.executable, "-m", f"ray_jobs.{job}", "--num-workers", "0", *flags]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PLATES_CACHE": str(cache)})
    return time.perf_counter() - start_s


def bare_rate(checkpoint: Path, num_batches: int = 8) -> float:
    """Views/s of the checkpoint's trunk at its size on a tensor in memory, in the precision of its run."""
    bundle = load_bundle(checkpoint)
    precision, size = bundle.info["precision"], bundle.preprocessing.image_size
    set_up_process(CPU, precision, torch.get_num_threads())
    trunk = fast_trunk(rebuild_model(bundle).trunk, CPU, DTYPES[precision], size)
    batch = torch.randn(CPU_BATCH_SIZE, 3, size, size).to(DTYPES[precision])
    batch = batch.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        trunk(batch)
        start_s = time.perf_counter()
        for _ in range(num_batches):
            trunk(batch)
    return num_batches * CPU_BATCH_SIZE / (time.perf_counter() - start_s)


def measure(data: str, tta: int, seed: int) -> tuple[dict[str, float], str]:
    """Figures of one search, and its winner in words."""
    with tempfile.TemporaryDirectory() as folder:
        run, again = Path(folder) / "run", Path(folder) / "again"
        flags, checkpoint = ["--data", data, "--out"], run / "checkpoint"
        search_s = run_job("tune", run.with_name("c1"), "--tta", str(tta), "--seed", str(seed), *flags, str(run))
        before = bare_rate(checkpoint)
        run_job("predict", run.with_name("c2"), "--checkpoint", str(checkpoint), *flags, str(again))
        bare = (before + bare_rate(checkpoint)) / 2
        metrics = json.loads((run / "metrics.json").read_text())
        rate = pd.read_csv(again / "timing.csv")["inference_images_per_sec"].iloc[0] * metrics["winner/tta"]
    found = {"search_s": search_s, "bare_views_per_sec": bare, "prediction_over_bare": rate / bare}
    found |= {name: metrics[name] for name in FIGURES if name in metrics}
    return found, json.dumps({name: value for name, value in metrics.items() if name.startswith("winner/")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", default=["synthetic:40:hard"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tta", type=int, nargs="+", default=[1])
    arguments = parser.parse_args()
    measured: dict[str, list[float]] = defaultdict(list)
    for repeat in range(arguments.repeats):
        for data in arguments.data:
            for tta in arguments.tta:
                figures, winner = measure(data, tta, repeat if data.startswith("synthetic:") else 0)
                for name, value in figures.items():
                    measured[f"{data} tta {tta} {name}"].append(value)
                print(f"repeat {repeat}, {data}, --tta {tta}: {winner} {json.dumps(figures)}", flush=True)
    print(json.dumps({name: round(statistics.median(values), 3) for name, values in measured.items()}))


if __name__ == "__main__":
    main()
