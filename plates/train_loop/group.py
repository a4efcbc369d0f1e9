"""The group of workers: who one is, its share, and what all of them add up or hand to rank 0."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from plates.dataset import Sample
from plates.timing import Pace

ItemT = TypeVar("ItemT")
MAX_RUN, RUNS_PER_WORKER = 64, 32  # the shares differ by one run at most: 3% of the work


@dataclass(frozen=True)
class Worker:
    """Who runs the loop: `world_size` 1 and rank 0 in the driver's own process."""

    rank: int
    world_size: int
    device: torch.device
    is_ray: bool
    num_threads: int
    pace: Pace = field(default_factory=Pace)


def shard(items: Sequence[ItemT], worker: Worker) -> list[ItemT]:
    """This worker's share: runs of neighbours dealt in turn, to read whole row groups of a large data set."""
    run = min(MAX_RUN, max(1, len(items) // (RUNS_PER_WORKER * worker.world_size)))
    return [item for place, item in enumerate(items) if place // run % worker.world_size == worker.rank]


def batch_share(items: Sequence[ItemT], worker: Worker) -> Sequence[ItemT]:
    """This worker's share of one global batch."""
    return items[worker.rank :: worker.world_size]


def interleave(shards: Sequence[Tensor], worker: Worker) -> Tensor:
    """Undoes `shard`: the (N, ...) rows of all workers in the samples' order."""
    whole = torch.zeros((sum(len(part) for part in shards), *shards[0].shape[1:]))
    for rank, part in enumerate(shards):
        whole[shard(range(len(whole)), replace(worker, rank=rank))] = part
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
    """Every worker's value by rank, on rank 0; an empty list on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def all_gather(value: ItemT) -> list[ItemT]:
    """Every worker's value by rank, on every worker."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: ItemT) -> ItemT:
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
