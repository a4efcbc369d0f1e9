"""End to end: every epoch through the whole model, exact whatever the number of workers."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from math import ceil

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from plates import metrics
from plates.dataset import row_groups
from plates.device import DTYPES, move
from plates.features import Views, make_numbered, no_views
from plates.head import FIGURES, epoch_order
from plates.images import prefetch
from plates.model import Classifier, set_trainable
from plates.samples import Sample, Samples
from plates.sources import Source
from plates.timing import Phases
from plates.train_loop.group import Worker, all_reduce_sum, gather, interleave, progress, share_of, tell_left
from plates.train_loop.resume import SavedState
from plates.train_loop.task import Fitted, Task
from plates.transforms import Preprocessing, cut_background, to_input

EVAL_BATCH_SIZE_PER_WORKER = 64
logger = logging.getLogger(__name__)
IMAGE_CACHE_BYTES = 1 << 30  # decoded images that a worker keeps; what does not fit is decoded again each epoch


class ImageCache:
    """Decoded images by path, on the device, without the background where it is cut; kept while they fit into the
    budget."""

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        device: torch.device,
        budget_bytes: int = IMAGE_CACHE_BYTES,
    ) -> None:
        self.source = source
        self.preprocessing = preprocessing
        self.device = device
        self.num_free_bytes = budget_bytes
        self.images: dict[str, Tensor] = {}

    def read(self, path: str) -> Tensor:
        """(3, H, W) uint8 on the device."""
        image = self.images.get(path)
        if image is None:
            image = cut_background(move(self.source.read(path), self.device), self.preprocessing)
            if image.nbytes <= self.num_free_bytes and path not in self.images:
                self.num_free_bytes -= image.nbytes
                self.images[path] = image
        return image

    def warm(self, samples: Sequence[Sample]) -> None:
        """Decodes images ahead of the first epoch until the budget is spent."""
        for image in prefetch(lambda sample: self.read(sample.path), samples, num_ahead=8, device=self.device):
            if image.nbytes > self.num_free_bytes:
                return


def train_end_to_end(task: Task, worker: Worker, model: Classifier, phases: Phases) -> Fitted:
    """The loop for `layer4` and `all`: every epoch through the whole model."""
    model.to(device=worker.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parameters = set_trainable(model, task.config.trainable)
    cache = ImageCache(task.dataset.source, task.preprocessing, worker.device)
    with phases.measure("data"):
        cache.warm([*task.dataset.train, *task.dataset.val])
    with phases.measure("train"):
        state, num_images = train_epochs(task, worker, model, parameters, cache)
        val_logits = evaluate(task, worker, model, cache).cpu()
    rows = interleave(gather(val_logits), worker)
    figures = {}
    if task.precision == "fp16":
        num_steps = task.config.epochs * ceil(len(task.dataset.train) / task.config.global_batch_size)
        figures["train/num_skipped_steps"] = num_steps - state.num_taken_steps()
    val_logits = torch.stack(rows) if rows else val_logits
    return Fitted(state.history, val_logits, num_images, figures=figures)


def autocast(task: Task, worker: Worker) -> torch.autocast:
    """Around one forward pass and its loss: until it ends, autocast computes with the copies of the weights that it
    made first, so that around several steps it would train on stale ones."""
    return torch.autocast(worker.device.type, DTYPES[task.precision], enabled=task.precision != "fp32")


def train_epochs(
    task: Task, worker: Worker, model: Classifier, parameters: list[nn.Parameter], cache: ImageCache
) -> tuple[SavedState, int]:
    """Adam and StepLR over all epochs, end to end; the weights stay in fp32, whatever precision the passes run in.

    In fp16 the loss is scaled, so that small gradients do not vanish. Where the scaled ones overflow on any worker
    they do on all, once they are summed: no worker takes that step, and the scale is halved.

    Returns: the state after the last epoch, with one history row an epoch, the same on every worker; how many
        training images this worker computed.
    """
    config, dataset = task.config, task.dataset
    state = SavedState(task, parameters, worker.device)
    state.restore(worker)
    optimizer, scaler = state.optimizer, state.scaler
    groups, num_images = row_groups(dataset.source, dataset.train), 0
    class_weights = torch.tensor(task.class_weights, device=worker.device)
    forward = sum_gradients(model) if dist.is_initialized() else model
    epochs = range(len(state.history), config.epochs)
    tell_left(task.run, len(epochs) + len(dataset.test), worker)
    for epoch in progress(epochs, len(epochs), "training", "epoch", worker):
        lr, num_taken = optimizer.param_groups[0]["lr"], state.num_taken_steps()
        sums = torch.zeros(3, dtype=torch.float64, device=worker.device)
        order = epoch_order(config.seed, epoch, groups).tolist()
        for batch, labels, global_weight in train_batches(task, worker, epoch, order, cache):
            with autocast(task, worker):
                logits = forward(batch)
                loss_sum = cross_entropy(logits, labels, class_weights, reduction="sum")
                loss = loss_sum / global_weight  # a part of the batch's mean
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            sums += metrics.batch_sums(logits, labels)
            num_images += len(labels)
            worker.pace.num_images += len(labels)
        if state.num_taken_steps() == num_taken and worker.rank == 0:
            logger.warning("epoch %d: all steps overflowed in fp16 and were skipped; use bf16 or fp32", epoch)
        state.scheduler.step()
        val_logits = evaluate(task, worker, model, cache)
        val_labels = move(dataset.val.labels[share_of(range(len(dataset.val)), worker)], worker.device)
        val_sums = metrics.batch_sums(val_logits, val_labels)
        figures = (lr, *metrics.divide(all_reduce_sum(sums)), *metrics.divide(all_reduce_sum(val_sums)))
        state.history.append({"epoch": epoch, **dict(zip(FIGURES, figures, strict=True))})
        worker.pace.count(len(val_logits))
        if worker.rank == 0:
            state.save(is_last=epoch == config.epochs - 1)
    return state, num_images


def sum_gradients(model: Classifier) -> DistributedDataParallel:
    """The model, its gradients summed over workers.

    The average that is torch's default would want losses larger by the number of workers, on which then would depend
    what overflows in fp16.
    """

    def sum_bucket(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()  # pyright: ignore
        return summed.then(lambda future: future.value()[0])

    parallel = DistributedDataParallel(model, forward_sync_buffers=False)
    parallel.register_comm_hook(None, sum_bucket)  # pyright: ignore[reportArgumentType]
    return parallel


def train_batches(
    task: Task, worker: Worker, epoch: int, order: Sequence[int], cache: ImageCache
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """This worker's part of each global batch, its images read ahead by threads: (B, 3, S, S), (B,), and the sum of
    the class weights of all images of the global batch, whose labels every worker knows.

    A worker without images in a batch gets B = 0, and takes part with a loss of zero.
    """
    config, labels = task.config, task.dataset.train.labels
    weights = torch.tensor(task.class_weights)[labels]
    size, view = config.global_batch_size, config.train_views[epoch % len(config.train_views)]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    shares = [share_of(batch, worker, num_together=1) for batch in batches]
    loaded = load_batches(task, cache, task.dataset.train, shares, [view])
    for batch, share, inputs in zip(batches, shares, loaded, strict=True):
        yield inputs, move(labels[share], worker.device), float(weights[batch].sum())


@torch.inference_mode()
def evaluate(task: Task, worker: Worker, model: Classifier, cache: ImageCache) -> Tensor:
    """(n, C) logits on the device of this worker's share of the validation images."""
    share = share_of(range(len(task.dataset.val)), worker)
    views = task.config.eval_views
    size = max(1, EVAL_BATCH_SIZE_PER_WORKER // len(views))
    batches = [share[i : i + size] for i in range(0, len(share), size)]
    logits = [torch.zeros((0, model.head.out_features), device=worker.device)]
    for inputs in load_batches(task, cache, task.dataset.val, batches, views):
        with autocast(task, worker):
            logits.append(model(inputs).float().unflatten(0, (-1, len(views))).mean(1))
    return torch.cat(logits)


def load_batches(
    task: Task, cache: ImageCache, samples: Samples, batches: Sequence[Sequence[int]], views: Sequence[int]
) -> Iterator[Tensor]:
    """Views of the images of each batch as input, (B * V, 3, S, S), read ahead by threads; B may be 0."""
    preprocessing = task.preprocessing

    def load(index: int) -> Views:
        path = samples[index].path
        return make_numbered(cache.read(path), path, views, task.drawing, preprocessing)

    loaded = prefetch(load, chain(*batches), 2 * max([1, *map(len, batches)]), cache.device)
    nothing = no_views(preprocessing, cache.device)
    for batch in batches:
        pictures, flips = map(torch.cat, zip(nothing, *islice(loaded, len(batch)), strict=True))
        yield to_input(pictures, move(flips, cache.device), preprocessing)
