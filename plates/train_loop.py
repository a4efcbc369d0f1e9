"""What runs on each worker: the loop of epochs, exact whatever the number of workers."""

import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from plates import metrics
from plates.config import TrainConfig
from plates.dataset import Dataset, Sample, Source, prefetch
from plates.features import (
    Features,
    FrozenTrunk,
    compute_eval,
    compute_views,
    features_key,
    load_features,
    save_features,
)
from plates.head import Heads, HeadSettings, epoch_order, fit_heads
from plates.model import Classifier, Weights, build_classifier, dtype_name, resolve_precision, set_trainable
from plates.timing import Phases, device_name, rate
from plates.transforms import Preprocessing, draw_view, eval_batch, to_picture, train_batch

ItemT = TypeVar("ItemT")
EVAL_BATCH_SIZE_PER_WORKER = 64
IMAGE_CACHE_BYTES = 1 << 30  # decoded images that a worker keeps; what does not fit is decoded again each epoch


@dataclass(frozen=True)
class Task:
    """What a training run is, the same on every worker."""

    config: TrainConfig
    dataset: Dataset
    weights: Weights
    preprocessing: Preprocessing
    digests: dict[str, str]
    cache_root: Path
    submitted_at: float


@dataclass(frozen=True)
class Worker:
    """Who runs the loop: `world_size` 1 and rank 0 in the driver's own process."""

    rank: int
    world_size: int
    device: torch.device
    is_ray: bool


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


class ImageCache:
    """Decoded images by path, kept while they fit into the budget."""

    def __init__(self, source: Source, budget_bytes: int = IMAGE_CACHE_BYTES) -> None:
        self.source = source
        self.num_free_bytes = budget_bytes
        self.images: dict[str, Tensor] = {}

    def read(self, path: str) -> Tensor:
        """(3, H, W) uint8."""
        image = self.images.get(path)
        if image is None:
            image = self.source.read(path)
            if image.nbytes <= self.num_free_bytes and path not in self.images:
                self.num_free_bytes -= image.nbytes
                self.images[path] = image
        return image


def train_loop_per_worker(config: dict[str, Any]) -> Trained | None:
    """The function that Ray Train calls on each worker; rank 0's return value is the run's result."""
    import ray
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    return train(ray.get(config["task"]), Worker(context.get_world_rank(), context.get_world_size(), device, True))


def train(task: Task, worker: Worker) -> Trained | None:
    """Trains on one worker of the group. Every worker takes part; rank 0 returns the result, the others None."""
    startup_s = time.time() - task.submitted_at
    phases = Phases(worker.device)
    config, dataset = task.config, task.dataset
    dtype = resolve_precision(config.precision, worker.device, task.weights.backbone)
    model = build_classifier(task.weights.backbone, task.weights.state, len(dataset.classes), config.seed)
    way = train_head if config.trainable == "head" else train_end_to_end
    fitted = way(task, worker, model, dtype, phases)
    timings = gather(
        {
            "rank": worker.rank,
            "node": socket.gethostname(),
            "device": worker.device.type,
            "device_name": device_name(worker.device),
            "startup_s": startup_s,
            "data_s": phases.seconds["data"],
            "train_s": phases.seconds["train"],
            "train_images_per_sec": rate(fitted.num_images, phases.seconds["train"]),
        }
    )
    if worker.rank:
        return None
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return Trained(state, fitted.history, fitted.val_logits, timings, dtype_name(dtype), fitted.has_reused_features)


def train_head(task: Task, worker: Worker, model: Classifier, dtype: torch.dtype, phases: Phases) -> Fitted:
    """The head alone: the group computes the trunk's features once, rank 0 fits the head on them.

    With the trunk frozen this is the same head as training end to end over the same views, to rounding.
    """
    config, dataset = task.config, task.dataset
    with phases.measure("train"):
        features, num_images = shared_features(task, worker, model, dtype)
        history: list[dict[str, float]] = []
        val_logits = torch.zeros(0)
        if features is not None:
            settings = HeadSettings(
                lr=config.lr, step_size=config.step_size, gamma=config.gamma, indices=range(len(dataset.train))
            )
            heads = fit_heads(
                features.train,
                labels_of(dataset.train),
                [settings],
                (model.head.weight.detach(), model.head.bias.detach()),
                epochs=config.epochs,
                global_batch_size=config.global_batch_size,
                seed=config.seed,
                evaluation=(features.val, labels_of(dataset.val)),
            )
            model.head.load_state_dict({"weight": heads.weight[0], "bias": heads.bias[0]})
            val_logits = heads.logits(features.val)[0]
            history = history_of(heads)
    return Fitted(history, val_logits, num_images, has_reused_features=num_images == 0 and worker.rank == 0)


def shared_features(task: Task, worker: Worker, model: Classifier, dtype: torch.dtype) -> tuple[Features | None, int]:
    """All features on rank 0 (None on the others), stored or computed now, each worker its share of the images.

    Returns: the features, and how many views of training images this worker computed (0 where they were stored).
    """
    config, dataset = task.config, task.dataset
    num_views = config.num_views or config.epochs
    described = {
        "backbone": task.weights.backbone,
        "seed": config.seed,
        "num_views": num_views,
        "precision": dtype_name(dtype),
        "device": worker.device.type,
    }
    key = features_key(task.digests, (dataset.train, dataset.val), task.weights.state, task.preprocessing, described)
    path = task.cache_root / "features" / f"{key}.parquet"
    stored = None
    if worker.rank == 0:
        stored = load_features(path, num_views, len(dataset.train), len(dataset.val))
    if broadcast(stored is not None):
        return stored, 0
    trunk = FrozenTrunk(model.trunk, task.preprocessing, worker.device, dtype)
    mine, my_val = shard(dataset.train, worker), shard(dataset.val, worker)
    computed = compute_views(trunk, dataset.source, mine, config.seed, num_views)
    train_rows = list(progress(computed, len(mine), f"features in {dtype_name(dtype)}", "image", worker))
    val_rows = [row[0] for row in compute_eval(trunk, dataset.source, my_val)]
    num_features = model.head.in_features
    shards = gather((stack_rows(train_rows, (num_views, num_features)), stack_rows(val_rows, (num_features,))))
    num_images = len(mine) * num_views
    if worker.rank:
        return None, num_images
    train_features, val_features = (interleave(parts) for parts in zip(*shards, strict=True))
    features = Features(train_features.transpose(0, 1).contiguous(), val_features)
    save_features(path, features)
    return features, num_images


def history_of(heads: Heads) -> list[dict[str, float]]:
    """One row an epoch of the first head."""
    columns = {
        "lr": heads.lr,
        "train/loss": heads.train_loss,
        "train/accuracy": heads.train_accuracy,
        "val/loss": heads.eval_loss,
        "val/accuracy": heads.eval_accuracy,
    }
    return [
        {"epoch": epoch, **{name: float(values[epoch][0]) for name, values in columns.items()}}
        for epoch in range(len(heads.lr))
    ]


def train_end_to_end(task: Task, worker: Worker, model: Classifier, dtype: torch.dtype, phases: Phases) -> Fitted:
    """The loop for `layer4` and `all`: every epoch through the whole model."""
    model.to(device=worker.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parameters = set_trainable(model, task.config.trainable)
    cache = ImageCache(task.dataset.source)
    with phases.measure("data"):
        warm(cache, [*task.dataset.train, *task.dataset.val])
    with phases.measure("train"), torch.autocast(worker.device.type, dtype, enabled=dtype != torch.float32):
        history, num_images = train_epochs(task, worker, model, parameters, cache)
        val_logits = evaluate(model, task.dataset.val, cache, task.preprocessing, worker)
    shards = gather(val_logits)
    return Fitted(history, interleave(shards) if shards else val_logits, num_images, has_reused_features=False)


def train_epochs(
    task: Task, worker: Worker, model: Classifier, parameters: list[nn.Parameter], cache: ImageCache
) -> tuple[list[dict[str, float]], int]:
    """Adam and StepLR over all epochs, end to end.

    Returns: one history row an epoch, the same on every worker; how many training images this worker computed.
    """
    config, dataset = task.config, task.dataset
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.step_size, config.gamma)
    forward = DistributedDataParallel(model, forward_sync_buffers=False) if dist.is_initialized() else model
    history, num_images = [], 0
    for epoch in progress(range(config.epochs), config.epochs, "training", "epoch", worker):
        lr = optimizer.param_groups[0]["lr"]
        sums = torch.zeros(3, dtype=torch.float64, device=worker.device)
        for batch, labels, global_count in train_batches(task, worker, epoch, cache):
            logits = forward(batch)
            # DistributedDataParallel averages over workers; the loss is a mean over the global batch.
            loss = cross_entropy(logits, labels, reduction="sum") * (worker.world_size / global_count)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += metrics.batch_sums(logits, labels)
            num_images += len(labels)
        scheduler.step()
        val_logits = evaluate(model, dataset.val, cache, task.preprocessing, worker)
        val_sums = metrics.batch_sums(val_logits, labels_of(shard(dataset.val, worker))).to(worker.device)
        train_loss, train_accuracy = metrics.divide(all_reduce_sum(sums))
        val_loss, val_accuracy = metrics.divide(all_reduce_sum(val_sums))
        history.append(
            {
                "epoch": epoch,
                "lr": lr,
                "train/loss": train_loss,
                "train/accuracy": train_accuracy,
                "val/loss": val_loss,
                "val/accuracy": val_accuracy,
            }
        )
    return history, num_images


def train_batches(task: Task, worker: Worker, epoch: int, cache: ImageCache) -> Iterator[tuple[Tensor, Tensor, int]]:
    """This worker's part of each global batch, made ahead by threads: (B, 3, S, S), (B,), global count.

    A worker without images in a batch gets B = 0, and takes part with a loss of zero.
    """
    config, samples = task.config, task.dataset.train
    view_index = epoch % (config.num_views or config.epochs)
    order = epoch_order(config.seed, epoch, len(samples))

    def load(start: int) -> tuple[Tensor, Tensor, int]:
        whole = order[start : start + config.global_batch_size]
        mine = [samples[i] for i in whole[worker.rank :: worker.world_size]]
        images = [cache.read(sample.path) for sample in mine]
        views = [
            draw_view(config.seed, view_index, sample.path, image.shape[1], image.shape[2])
            for sample, image in zip(mine, images, strict=True)
        ]
        batch = train_batch(images, views, task.preprocessing, worker.device)
        return batch, labels_of(mine).to(worker.device), len(whole)

    yield from prefetch(load, range(0, len(order), config.global_batch_size), num_ahead=2)


@torch.inference_mode()
def evaluate(
    model: Classifier, samples: Sequence[Sample], cache: ImageCache, preprocessing: Preprocessing, worker: Worker
) -> Tensor:
    """(n, C) logits on the CPU of this worker's share of the samples: every world_size-th, by rank."""
    mine = shard(samples, worker)
    logits = [torch.zeros((0, model.head.out_features))]
    for start in range(0, len(mine), EVAL_BATCH_SIZE_PER_WORKER):
        images = [cache.read(sample.path) for sample in mine[start : start + EVAL_BATCH_SIZE_PER_WORKER]]
        logits.append(model(eval_batch(images, preprocessing, worker.device)).float().cpu())
    return torch.cat(logits)


def draw_examples(
    dataset: Dataset, preprocessing: Preprocessing, seed: int, num_examples: int = 16
) -> list[tuple[np.ndarray, str]]:
    """First views of training images spread over the split: (S, S, 3) uint8 as the model sees them, class name."""
    step = max(1, len(dataset.train) // num_examples)
    examples = []
    for sample in dataset.train[::step][:num_examples]:
        image = dataset.source.read(sample.path)
        view = draw_view(seed, 0, sample.path, image.shape[1], image.shape[2])
        model_input = train_batch([image], [view], preprocessing, torch.device("cpu"))[0]
        examples.append((to_picture(model_input, preprocessing), dataset.classes[sample.label or 0]))
    return examples


def warm(cache: ImageCache, samples: Sequence[Sample]) -> None:
    """Decodes images ahead of the first epoch until the cache's budget is spent."""
    for image in prefetch(lambda sample: cache.read(sample.path), samples, num_ahead=8):
        if image.nbytes > cache.num_free_bytes:
            return


def shard(samples: Sequence[Sample], worker: Worker) -> Sequence[Sample]:
    return samples[worker.rank :: worker.world_size]


def interleave(shards: Sequence[Tensor]) -> Tensor:
    """Undoes `shard`: the (N, ...) rows of all workers in the samples' order."""
    whole = torch.zeros((sum(len(part) for part in shards), *shards[0].shape[1:]))
    for rank, part in enumerate(shards):
        whole[rank :: len(shards)] = part
    return whole


def stack_rows(rows: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """(n, *shape) of a worker's rows; n may be 0."""
    return torch.stack(rows) if rows else torch.zeros((0, *shape))


def labels_of(samples: Sequence[Sample]) -> Tensor:
    """(n,) int64."""
    return torch.tensor([sample.label for sample in samples], dtype=torch.int64)


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over workers, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """Every worker's value by rank, on rank 0; an empty list on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def broadcast(value: bool) -> bool:
    """Rank 0's value, on every worker."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def progress(items: Iterable[ItemT], total: int, description: str, unit: str, worker: Worker) -> Iterator[ItemT]:
    """A progress bar on rank 0: tqdm in this process, Ray's own in a worker, whose lines Ray would double."""
    if worker.rank:
        yield from items
    elif worker.is_ray:
        from ray.experimental import tqdm_ray

        bar = tqdm_ray.tqdm(desc=description, total=total, unit=unit)
        for item in items:
            yield item
            bar.update(1)
        bar.close()
    else:
        yield from tqdm(items, desc=description, total=total, unit=unit)
