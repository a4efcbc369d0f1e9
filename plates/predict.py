"""Predictor, a plain callable: batch of paths in, probabilities out; in this process or under Ray Data."""

import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from plates.checkpoint import Bundle, build_model
from plates.cluster import Plan, count_node_cpus, find_room, this_node
from plates.dataset import Dataset, Sample, Skipped, Source, image_ids
from plates.device import set_up_process
from plates.features import FrozenTrunk, compute_eval
from plates.metrics import score
from plates.rundir import write_csv, write_parquet
from plates.storage import Place
from plates.timing import device_name, rate

PATHS_PER_CALL = {"cpu": 128, "cuda": 2048}  # handed to the Predictor at once: decoding runs ahead of computing

Batch = dict[str, np.ndarray]


class Predictor:
    """Holds the model on a device. Ray Data builds one in each worker."""

    def __init__(self, bundle: Bundle, source: Source, device: str, precision: str, num_threads: int) -> None:
        self.device = torch.device(device)
        set_up_process(self.device, precision, num_threads)
        self.source = source
        model = build_model(bundle)
        self.trunk = FrozenTrunk(model.trunk, bundle.preprocessing, self.device, precision)
        self.head = model.head
        self.identity = {
            "node": this_node(is_ray=False),
            "pid": os.getpid(),
            "device": self.device.type,
            "device_name": device_name(self.device),
        }

    def __call__(self, batch: Batch) -> Batch:
        """Reads and predicts.

        Args:
            batch: "path", (B,) str.

        Returns: the batch with "probabilities" (B, C) float32, rows of NaN where "error" (B,) str is not empty;
            and by row who computed it ("node", "pid", "device", "device_name") and its share of "time_s" seconds.
        """
        start_s = time.perf_counter()
        paths = [str(path) for path in batch["path"]]
        errors: dict[str, str] = {}
        features = [row for row in compute_eval(self.trunk, self.source, paths, errors) if len(row)]
        probabilities = np.full((len(paths), self.head.out_features), np.nan, dtype=np.float32)
        if features:
            with torch.inference_mode():
                found = self.head(torch.cat(features)).softmax(1)
            probabilities[[path not in errors for path in paths]] = found.numpy()
        time_s = (time.perf_counter() - start_s) / max(1, len(paths))
        return {
            "path": batch["path"],
            "probabilities": probabilities,
            "error": np.array([errors.get(path, "") for path in paths]),
            **{name: np.full(len(paths), value) for name, value in self.identity.items()},
            "time_s": np.full(len(paths), time_s),
        }


class RayPredictor(Predictor):
    """The Predictor as Ray Data builds it: the bundle comes through the object store. Without a number of threads it
    has all CPUs of its node."""

    def __init__(
        self, bundle_ref: list[Any], source: Source, device: str, precision: str, num_threads: int | None
    ) -> None:
        import ray

        super().__init__(ray.get(bundle_ref[0]), source, device, precision, num_threads or count_node_cpus())
        self.identity["node"] = this_node(is_ray=True)


@dataclass(frozen=True)
class Predictions:
    """`table`: path, id, label, p_CLASS…, one row an image in path order. `timings`: seconds and rate by worker."""

    table: pd.DataFrame
    skipped: list[Skipped]
    timings: list[dict[str, Any]]


def predict(bundle: Bundle, source: Source, samples: Sequence[Sample], plan: Plan, precision: str) -> Predictions:
    """Predicts samples by the plan. Each readable image is one row; the others are listed as skipped."""
    paths = sorted(sample.path for sample in samples)
    columns = [f"p_{name}" for name in bundle.classes]
    if not paths:
        return Predictions(pd.DataFrame(columns=["path", "id", "label", *columns]), [], [])
    run = predict_on_ray if plan.num_workers else predict_here
    # Filled in place: small results kept between the large blocks of passing batches would make the heap grow.
    probabilities = np.full((len(paths), len(columns)), np.nan, dtype=np.float32)
    places = {path: place for place, path in enumerate(paths)}
    errors: dict[str, str] = {}
    seconds, counts = Counter[tuple[str, int, str, str]](), Counter[tuple[str, int, str, str]]()
    for batch in tqdm_paths(run(bundle, source, paths, plan, precision), len(paths)):
        probabilities[[places[path] for path in batch["path"]]] = batch["probabilities"]
        errors |= {str(path): str(error) for path, error in zip(batch["path"], batch["error"], strict=True) if error}
        identities = zip(*(batch[name].tolist() for name in ("node", "pid", "device", "device_name")), strict=True)
        for identity, time_s in zip(identities, batch["time_s"].tolist(), strict=True):
            seconds[identity] += time_s
            counts[identity] += 1
    assert counts.total() == len(paths), "every image is predicted once"
    table = pd.DataFrame(probabilities, columns=pd.Index(columns)).assign(path=paths)
    table = table[[path not in errors for path in paths]].reset_index(drop=True)
    table["id"] = image_ids(table["path"])
    table["label"] = [bundle.classes[i] for i in table[columns].to_numpy().argmax(1)]
    skipped = [Skipped(path, "test", errors[path]) for path in sorted(errors)]
    timings = [
        {
            "node": node,
            "device": device,
            "device_name": name,
            "inference_s": seconds[node, pid, device, name],
            "inference_images_per_sec": rate(count, seconds[node, pid, device, name]),
        }
        for (node, pid, device, name), count in sorted(counts.items())
    ]
    return Predictions(table[["path", "id", "label", *columns]], skipped, timings)


def predict_here(bundle: Bundle, source: Source, paths: list[str], plan: Plan, precision: str) -> Iterator[Batch]:
    predictor = Predictor(bundle, source, plan.device, precision, plan.cpus_per_worker)
    step = PATHS_PER_CALL[plan.device]
    for start in range(0, len(paths), step):
        yield predictor({"path": np.array(paths[start : start + step])})


def predict_on_ray(bundle: Bundle, source: Source, paths: list[str], plan: Plan, precision: str) -> Iterator[Batch]:
    import ray.data

    plan = find_room(plan)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the driver's tqdm shows it
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Blocks are made here: a read or repartition task would wait for a CPU that the workers hold, for ever.
    step = min(PATHS_PER_CALL[plan.device], math.ceil(len(paths) / plan.num_workers))
    blocks = [pd.DataFrame({"path": paths[i : i + step]}) for i in range(0, len(paths), step)]
    rows = ray.data.from_pandas(blocks)
    predicted = rows.map_batches(
        RayPredictor,
        fn_constructor_kwargs={
            "bundle_ref": [ray.put(bundle)],
            "source": source,
            "device": plan.device,
            "precision": precision,
            "num_threads": None if plan.uses_whole_nodes else plan.cpus_per_worker,
        },
        batch_size=step,  # Ray Data wants one where GPUs are asked for
        compute=ray.data.ActorPoolStrategy(size=plan.num_workers),
        num_cpus=plan.cpus_per_worker,
        num_gpus=1 if plan.resource == "GPU" else 0,
        resources={plan.resource: 1} if plan.resource not in (None, "GPU") else None,
    )
    yield from cast(Iterator[Batch], predicted.iter_batches(batch_size=None, batch_format="numpy"))


def tqdm_paths(batches: Iterator[Batch], total: int) -> Iterator[Batch]:
    with tqdm(total=total, desc="predicting", unit="image") as bar:
        for batch in batches:
            bar.update(len(batch["path"]))
            yield batch


def write_predictions(run: Place, predictions: Predictions) -> None:
    """predictions.csv and .parquet, and submission.csv, the competition's form."""
    write_csv(run / "predictions.csv", predictions.table)
    write_parquet(run / "predictions.parquet", predictions.table)
    write_csv(run / "submission.csv", predictions.table[["id", "label"]])


def score_predictions(predictions: Predictions, dataset: Dataset) -> dict[str, float | int]:
    """test/ figures: counts, and, where the true labels were kept aside (drawn plates), loss and accuracy."""
    table = predictions.table
    figures: dict[str, float | int] = {
        "test/num_images": len(table),
        "test/num_unreadable": len(predictions.skipped),
    }
    if dataset.true_test_labels and len(table):
        columns = [f"p_{name}" for name in dataset.classes]
        probabilities = torch.tensor(table[columns].to_numpy(dtype=np.float64))
        labels = torch.tensor([dataset.true_test_labels[path] for path in table["path"]])
        figures |= score(probabilities.clamp_min(1e-30).log(), labels, dataset.classes, "test")
    return figures


def print_skipped(skipped: Sequence[Skipped]) -> None:
    """Names the images that were left out, on standard error."""
    for item in skipped:
        print(f"left out, cannot be read: {item.path} ({item.reason})", file=sys.stderr)
