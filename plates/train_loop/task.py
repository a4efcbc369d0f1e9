"""What a run is, the same on every worker, and what it gives."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plates.config import TrainConfig
from plates.dataset import Dataset
from plates.model import Weights
from plates.storage import Place
from plates.transforms import Preprocessing


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
