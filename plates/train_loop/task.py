"""What a run is, the same on every worker, and what it gives."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from plates.config import TrainConfig
from plates.dataset import Dataset
from plates.model import Weights
from plates.storage import Place
from plates.transforms import Preprocessing

# Settings that say where and how a run works, not what it computes.
NOT_OF_THE_RESULT = ("out", "data", "num_workers", "device", "cpus_per_worker", "skip_unreadable")


@dataclass(frozen=True)
class Task:
    """What a training run is, the same on every worker."""

    config: TrainConfig
    dataset: Dataset
    weights: Weights
    preprocessing: Preprocessing
    digests: dict[str, str]
    cache_root: Place
    run: Place
    submitted_at: float


def task_key(task: Task) -> str:
    """Hash of all that a run computes from: settings, labelled images by their contents, weights, preprocessing."""
    weights = hashlib.sha256()
    for name, value in task.weights.state.items():
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    what = {
        "settings": {name: value for name, value in asdict(task.config).items() if name not in NOT_OF_THE_RESULT},
        "images": [[(s.path, s.label, task.digests[s.path]) for s in split]
                   for split in (task.dataset.train, task.dataset.val)],
        "weights": [task.weights.backbone, weights.hexdigest()],
        "preprocessing": task.preprocessing.to_dict(),
        "torch": torch.__version__,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Fitted:
    """What a way of training gives, with the model's weights set: history and logits on rank 0."""

    history: list[dict[str, float]]
    val_logits: Tensor
    num_images: int
    has_reused_features: bool


@dataclass(frozen=True)
class Trained:
    """What rank 0 hands back: tensors on the CPU, one history row an epoch, one timing row a worker."""

    state: dict[str, Tensor]
    history: list[dict[str, float]]
    val_logits: Tensor
    timings: list[dict[str, Any]]
    precision: str
    has_reused_features: bool
