"""What a run is, the same on every worker, and what it gives."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from plates.config import TrainConfig
from plates.dataset import Dataset, Seen
from plates.features import Drawing
from plates.model import Weights, hash_weights
from plates.reference import Reference
from plates.rundir import versions
from plates.samples import SAMPLES_PER_BATCH
from plates.storage import Place
from plates.transforms import Preprocessing

# Where a run lies and what computes it: the result is the same, to rounding.
NO_RESULT = {"data", "out", "backbone", "weights", "num_workers", "device", "cpus_per_worker", "skip_unreadable",
             "wait_for_nodes_s", "precision", "cache_gb", "budget_s"}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a training run is, the same on every worker."""

    config: TrainConfig
    dataset: Dataset
    weights: Weights
    preprocessing: Preprocessing
    precision: str  # fp32, bf16 or fp16, of the whole group
    cache_root: Place
    run: Place
    submitted_at: float
    class_weights: tuple[float, ...]  # by class how much an image counts in the loss

    @property
    def drawing(self) -> Drawing:
        return Drawing(self.config.seed, is_turned=self.config.augment == "both")


def task_key(task: Task) -> str:
    """Hash of what a task's result follows from: settings, labelled images and weights by content, versions. What was
    stored under one key is never joined to work under another."""
    images = hashlib.sha256()
    for samples in (task.dataset.train, task.dataset.val):
        for batch in samples.table.to_batches(max_chunksize=SAMPLES_PER_BATCH):
            images.update(repr(batch.to_pydict()).encode())
        images.update(b"end of split")
    described = {
        "settings": {name: value for name, value in asdict(task.config).items() if name not in NO_RESULT},
        "images": images.hexdigest(),
        "backbone": task.weights.backbone,
        "weights": hash_weights(task.weights.state),
        "preprocessing": task.preprocessing.to_dict(),
        "precision": task.precision,
        "class_weights": task.class_weights,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Fitted:
    """What training gives, with the model's weights set: history and logits on rank 0."""

    history: list[dict[str, float]]
    val_logits: Tensor | None
    num_images: int
    has_reused_features: bool = False
    figures: dict[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Predicted:
    """The test split in its order: (N, C) logits on the CPU, not a number where `errors` says by path why an image
    cannot be read; one timing row a worker; what was seen of its images by those that decoded them; the training
    images that images were compared with, and (N, 3) what `Reference.compare` gives of each; None where there are
    none."""

    logits: Tensor
    errors: dict[str, str]
    timings: list[dict[str, Any]]
    seen: Seen | None = None
    reference: Reference | None = None
    compared: Tensor | None = None


@dataclass(frozen=True)
class Trained:
    """What rank 0 hands back: tensors on the CPU, one history row an epoch; the timing rows are in `predicted`."""

    state: dict[str, Tensor]
    history: list[dict[str, float]]
    val_logits: Tensor
    predicted: Predicted
    has_reused_features: bool
    figures: dict[str, float | int]  # of this kind of training alone

    @property
    def timings(self) -> list[dict[str, Any]]:
        return self.predicted.timings
