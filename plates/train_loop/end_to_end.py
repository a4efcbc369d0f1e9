"""End to end: every epoch through the whole model, exact whatever the number of workers."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from plates import metrics
from plates.dataset import Sample, Source
from plates.head import epoch_order
from plates.images import prefetch
from plates.model import Classifier, set_trainable
from plates.timing import Phases
from plates.train_loop.group import (
    Worker,
    all_reduce_sum,
    batch_share,
    gather,
    interleave,
    labels_of,
    progress,
    shard,
    tell_left,
)
from plates.train_loop.resume import SavedState
from plates.train_loop.task import Fitted, Task
from plates.transforms import Preprocessing, draw_view, eval_batch, train_batch

EVAL_BATCH_SIZE_PER_WORKER = 64
IMAGE_CACHE_BYTES = 1 << 30  # decoded images that a worker keeps; what does not fit is decoded again each epoch


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


def train_end_to_end(task: Task, worker: Worker, model: Classifier, dtype: torch.dtype, phases: Phases) -> Fitted:
    """The loop for `layer4` and `all`: every epoch through the whole model."""
    model.to(device=worker.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parameters = set_trainable(model, task.config.trainable)
    cache = ImageCache(task.dataset.source)
    with phases.measure("data"):
        warm(cache, [*task.dataset.train, *task.dataset.val], worker.device)
    with phases.measure("train"):
        history, num_images = train_epochs(task, worker, model, parameters, cache, dtype)
        val_logits = evaluate(model, task.dataset.val, cache, task.preprocessing, worker, dtype)
    shards = gather(val_logits)
    return Fitted(
        history, interleave(shards, worker) if shards else val_logits, num_images, has_reused_features=False
    )


def autocast(worker: Worker, dtype: torch.dtype) -> torch.autocast:
    """Around one forward pass and its loss: until it ends, autocast computes with the copies of the weights that it
    made first, so that around several steps it would train on stale ones."""
    return torch.autocast(worker.device.type, dtype, enabled=dtype != torch.float32)


def train_epochs(
    task: Task,
    worker: Worker,
    model: Classifier,
    parameters: list[nn.Parameter],
    cache: ImageCache,
    dtype: torch.dtype,
) -> tuple[list[dict[str, float]], int]:
    """Adam and StepLR over all epochs, end to end; the weights stay in fp32, whatever `dtype` the passes run in.

    Returns: one history row an epoch, the same on every worker; how many training images this worker computed.
    """
    config, dataset = task.config, task.dataset
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.step_size, config.gamma)
    state = SavedState(task, parameters, optimizer, scheduler)
    history, num_images = state.restore(worker), 0
    forward = DistributedDataParallel(model, forward_sync_buffers=False) if dist.is_initialized() else model
    epochs = range(len(history), config.epochs)
    tell_left(task.run, len(epochs), worker)
    for epoch in progress(epochs, len(epochs), "training", "epoch", worker):
        lr = optimizer.param_groups[0]["lr"]
        sums = torch.zeros(3, dtype=torch.float64, device=worker.device)
        for batch, labels, global_count in train_batches(task, worker, epoch, cache):
            with autocast(worker, dtype):
                logits = forward(batch)
                # DistributedDataParallel averages over workers; the loss is a mean over the global batch.
                loss = cross_entropy(logits, labels, reduction="sum") * (worker.world_size / global_count)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += metrics.batch_sums(logits, labels)
            num_images += len(labels)
        scheduler.step()
        val_logits = evaluate(model, dataset.val, cache, task.preprocessing, worker, dtype)
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
        if worker.rank == 0:
            state.save(history, is_last=epoch == config.epochs - 1)
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
        mine = [samples[i] for i in batch_share(whole, worker)]
        images = [cache.read(sample.path) for sample in mine]
        views = [
            draw_view(config.seed, view_index, sample.path, image.shape[1], image.shape[2])
            for sample, image in zip(mine, images, strict=True)
        ]
        batch = train_batch(images, views, task.preprocessing, worker.device)
        return batch, labels_of(mine).to(worker.device), len(whole)

    yield from prefetch(load, range(0, len(order), config.global_batch_size), num_ahead=2, device=worker.device)


@torch.inference_mode()
def evaluate(
    model: Classifier,
    samples: Sequence[Sample],
    cache: ImageCache,
    preprocessing: Preprocessing,
    worker: Worker,
    dtype: torch.dtype,
) -> Tensor:
    """(n, C) logits on the CPU of this worker's share of the samples."""
    mine = shard(samples, worker)
    logits = [torch.zeros((0, model.head.out_features))]
    for start in range(0, len(mine), EVAL_BATCH_SIZE_PER_WORKER):
        images = [cache.read(sample.path) for sample in mine[start : start + EVAL_BATCH_SIZE_PER_WORKER]]
        with autocast(worker, dtype):
            outputs = model(eval_batch(images, preprocessing, worker.device))
        logits.append(outputs.float().cpu())
    return torch.cat(logits)


def warm(cache: ImageCache, samples: Sequence[Sample], device: torch.device) -> None:
    """Decodes images ahead of the first epoch until the cache's budget is spent."""
    for image in prefetch(lambda sample: cache.read(sample.path), samples, num_ahead=8, device=device):
        if image.nbytes > cache.num_free_bytes:
            return
