"""What runs on each worker: the loop of epochs, exact whatever the number of workers."""

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from plates.model import Classifier, Weights, build_classifier, set_trainable
from plates.timing import Phases, device_name, rate
from plates.transforms import Preprocessing, draw_view, eval_batch, to_picture, train_batch

EVAL_BATCH_SIZE_PER_WORKER = 64
IMAGE_CACHE_BYTES = 1 << 30  # decoded images that a worker keeps; what does not fit is decoded again each epoch


@dataclass(frozen=True)
class Task:
    """What a training run is, the same on every worker."""

    config: TrainConfig
    dataset: Dataset
    weights: Weights
    preprocessing: Preprocessing
    submitted_at: float


@dataclass(frozen=True)
class Worker:
    """Who runs the loop: `world_size` 1 and rank 0 in the driver's own process."""

    rank: int
    world_size: int
    device: torch.device
    is_ray: bool


@dataclass(frozen=True)
class Trained:
    """What rank 0 hands back: tensors on the CPU, one history row an epoch, one timing row a worker."""

    state: dict[str, Tensor]
    history: list[dict[str, float]]
    val_logits: Tensor
    timings: list[dict[str, Any]]


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
    """Runs all epochs. Every worker takes part in every step; rank 0 returns the result, the others None."""
    startup_s = time.time() - task.submitted_at
    phases = Phases(worker.device)
    config, dataset = task.config, task.dataset
    model = build_classifier(task.weights.backbone, task.weights.state, len(dataset.classes), config.seed)
    model = model.to(device=worker.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parameters = set_trainable(model, config.trainable)
    cache = ImageCache(dataset.source)
    with phases.measure("data"):
        warm(cache, [*dataset.train, *dataset.val])
    with phases.measure("train"):
        history, num_images = train_epochs(task, worker, model, parameters, cache)
        val_logits = evaluate(model, dataset.val, cache, task.preprocessing, worker)
    timings = gather(
        {
            "rank": worker.rank,
            "node": socket.gethostname(),
            "device": worker.device.type,
            "device_name": device_name(worker.device),
            "startup_s": startup_s,
            "data_s": phases.seconds["data"],
            "train_s": phases.seconds["train"],
            "train_images_per_sec": rate(num_images, phases.seconds["train"]),
        }
    )
    shards = gather(val_logits)
    if worker.rank:
        return None
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return Trained(state, history, interleave(shards), timings)


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
    for epoch in progress(range(config.epochs), "training", worker):
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


def epoch_order(seed: int, epoch: int, num_images: int) -> list[int]:
    """The order of the training images in an epoch: a function of seed and epoch alone."""
    generator = torch.Generator().manual_seed((seed << 24) + epoch)
    return torch.randperm(num_images, generator=generator).tolist()


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


def interleave(shards: list[Tensor]) -> Tensor:
    """Undoes `shard`: the (N, C) rows of all workers in the samples' order."""
    whole = torch.zeros((sum(len(part) for part in shards), *shards[0].shape[1:]))
    for rank, part in enumerate(shards):
        whole[rank :: len(shards)] = part
    return whole


def labels_of(samples: Sequence[Sample]) -> Tensor:
    """(n,) int64."""
    return torch.tensor([sample.label for sample in samples], dtype=torch.int64)


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over workers, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """Every worker's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def progress(items: range, description: str, worker: Worker) -> Iterator[int]:
    """A progress bar on rank 0: tqdm in this process, Ray's own in a worker, whose lines Ray would double."""
    if worker.rank:
        yield from items
    elif worker.is_ray:
        from ray.experimental import tqdm_ray

        bar = tqdm_ray.tqdm(desc=description, total=len(items), unit="epoch")
        for item in items:
            yield item
            bar.update(1)
        bar.close()
    else:
        yield from tqdm(items, desc=description, unit="epoch")
