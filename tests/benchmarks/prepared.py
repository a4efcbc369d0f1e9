"""Prepared shards: memory of a run on few and on many images, and speed beside the same images in memory.

python tests/benchmarks/prepared.py [--images 5000 50000] [--folder FOLDER] [--repeats 2]

Packs drawn plates into FOLDER (kept there for the next time), half of them labelled, and runs `ray_jobs.train` on
each in one process: peak anonymous memory of both in MiB, without mapped files, which the system can take back. Then,
on up to 600 of the images and ResNet18 at 224 px, images/s with shards over images/s with decoded images in memory:
of the frozen trunk, and of an epoch of `layer4` that reads and decodes every image anew. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from plates.config import TrainConfig
from plates.dataset import Dataset, load_dataset
from plates.device import best_precision, set_up_process
from plates.features import Drawing, FrozenTrunk, compute_features
from plates.model import build_classifier, preprocessing_of, set_trainable
from plates.train_loop.end_to_end import ImageCache, train_epochs
from plates.train_loop.group import Worker
from plates.trainer import make_task
from plates.transforms import EVAL
from plates.weights import resolve_weights

CPU = torch.device("cpu")
NUM_TIMED = 600
SMALL = ["--backbone", "resnet18", "--weights", "none", "--image-size", "64", "--num-views", "1", "--epochs", "2"]


class MemorySource:
    """Decoded images."""

    def __init__(self, dataset: Dataset) -> None:
        self.images = {sample.path: dataset.source.read(sample.path) for sample in (*dataset.train, *dataset.val)}

    def read(self, path: str) -> Tensor:
        return self.images[path]


def run(*command: str) -> float:
    """Runs a job; peak MiB of anonymous memory, summed over its processes."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    job, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        peak = max(peak, sum(map(anonymous_kib, [job, *job.children(recursive=True)])))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return peak / 1024


def anonymous_kib(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def speeds(packed: Path, run_folder: Path, order: list[str]) -> dict[str, float]:
    """Images/s by way of training and source, the sources in this order."""
    whole = load_dataset(str(packed), 0)
    config = TrainConfig(backbone="resnet18", weights="none", trainable="layer4", epochs=1)
    dataset = replace(whole, train=whole.train[:NUM_TIMED], val=whole.val[:1])
    sources = {"shards": dataset, "memory": replace(dataset, source=MemorySource(dataset))}
    weights = resolve_weights("resnet18", "none", 0)
    preprocessing = preprocessing_of("resnet18", 224)
    precision, num_threads = best_precision(CPU), torch.get_num_threads()
    set_up_process(CPU, precision, num_threads)
    measured = {}
    for name in order:
        data = sources[name]
        model = build_classifier("resnet18", weights.state, 2, 0)
        trunk = FrozenTrunk(model.trunk, preprocessing, CPU, precision)
        start_s = time.perf_counter()
        wanted = [(sample.path, [EVAL]) for sample in data.train]
        assert len(list(compute_features(trunk, data.source, wanted, Drawing(0)))) == len(wanted)
        measured[f"head {name}"] = len(data.train) / (time.perf_counter() - start_s)
        task = make_task(config, data, weights, preprocessing, precision, run_folder / name)
        model = build_classifier("resnet18", weights.state, 2, 0)
        parameters = set_trainable(model.to(memory_format=torch.channels_last), "layer4")
        start_s = time.perf_counter()
        worker = Worker(0, 1, CPU, is_ray=False, threads=(num_threads,))
        train_epochs(task, worker, model, parameters, ImageCache(data.source, preprocessing, CPU, 0))
        measured[f"layer4 {name}"] = len(data.train) / (time.perf_counter() - start_s)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[5000, 50000])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "plates-packed")
    parser.add_argument("--repeats", type=int, default=2, help="of both orders of the two sources")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    for count in arguments.images:
        packed = arguments.folder / str(count)
        if not packed.exists():
            flags = ["--data", f"synthetic:{count // 2}", "--out", str(packed), "--num-workers", "0"]
            figures[f"packing {count} images: MiB"] = run("ray_jobs.prepare", *flags)
        with tempfile.TemporaryDirectory() as out:
            flags = [*SMALL, "--data", str(packed), "--num-workers", "0", "--out", f"{out}/run"]
            figures[f"{count} images: MiB"] = run("ray_jobs.train", *flags)
    with tempfile.TemporaryDirectory() as out:
        orders = [["shards", "memory"], ["memory", "shards"]] * arguments.repeats
        speeds(packed, Path(out), orders[0])  # warms up
        rounds = [speeds(packed, Path(out) / str(turn), order) for turn, order in enumerate(orders)]
    for way in ("head", "layer4"):
        ratios = [one[f"{way} shards"] / one[f"{way} memory"] for one in rounds]
        print(f"{way}: shards over memory {[round(ratio, 3) for ratio in ratios]}")
        figures[f"{way}: shards over memory"] = statistics.median(ratios)
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
