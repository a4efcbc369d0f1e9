"""What a run is, the same on every worker, and what it gives."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from plates.config import TrainConfig
from plates.dataset import Dataset
from plates.model import Weights, hash_weights
from plates.rundir import versions
from plates.storage import Place
from plates.transforms import Preprocessing

# Where a run lies and what computes it: the result is the same, to rounding.
NO_RESULT = {"data", "out", "backbone", "weights", "num_workers", "device", "cpus_per_worker", "skip_unreadable",
             "wait_for_nodes_s", "precision"}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a training run is, the same on every worker."""

    config: TrainConfig
    dataset: Dataset
    weights: Weights
    preprocessing: Preprocessing
    precision: str  # fp32, bf16 or fp16, of the whole group
    digests: dict[str, str]
    cache_root: Place
    run: Place
    submitted_at: float


def task_key(task: Task) -> str:
    """Hash of what a task's result follows from: settings, labelled images and weights by content, versions. What was
    stored under one key is never joined to work under another."""
    labelled = (task.dataset.train, task.dataset.val)
    whole = {
        "settings": {name: value for name, value in asdict(task.config).items() if name not in NO_RESULT},
        "images": [[(s.path, s.label, task.digests[s.path]) for s in samples] for samples in labelled],
        "backbone": task.weights.backbone,
        "weights": hash_weights(task.weights.state),
        "preprocessing": task.preprocessing.to_dict(),
        "precision": task.precision,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Fitted:
    """What a way of training gives, with the model's weights set: history and logits on rank 0."""

    history: list[dict[str, float]]
    val_logits: Tensor
    num_images: int
    has_reused_features: bool = False
    num_skipped_steps: int = 0


@dataclass(frozen=True)
class Trained:
    """What rank 0 hands back: tensors on the CPU, one history row an epoch, one timing row a worker."""

    state: dict[str, Tensor]
    history: list[dict[str, float]]
    val_logits: Tensor
    timings: list[dict[str, Any]]
    has_reused_features: bool
    num_skipped_steps: int
