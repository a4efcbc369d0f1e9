"""The group of workers: who one is, its share, and what all of them add up or hand to rank 0."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from plates.ray_private import progress_bar
from plates.storage import Place
from plates.timing import Pace

ItemT = TypeVar("ItemT")
MAX_TOGETHER, STRETCHES_PER_WORKER = 64, 32  # the shares differ by one stretch at most: 3% of the work
LEFT_FILE = "left"  # in Ray Train's folder of the run directory: how much work a group found to do
STATE_FOLDER = ".ray_train"  # Ray Train's own bookkeeping inside the run directory, gone when the run is done


@dataclass(frozen=True)
class Worker:
    """Who runs the loop: `world_size` 1 and rank 0 in the driver's own process. `threads`: CPU threads by rank."""

    rank: int
    world_size: int
    device: torch.device
    is_ray: bool
    threads: tuple[int, ...]
    pace: Pace = field(default_factory=Pace)

    @property
    def num_threads(self) -> int:
        return self.threads[self.rank]


def ranks_of(num_items: int, worker: Worker, num_together: int | None = None) -> list[int]:
    """The rank that each of so many items falls to: as often as it has threads, evenly spread.

    num_together: neighbours that fall to one rank; by default some, to read whole row groups of a large data set.
    """
    counts = [count // math.gcd(*worker.threads) for count in worker.threads]
    turns = sorted(((turn + 0.5) / count, rank) for rank, count in enumerate(counts) for turn in range(count))
    if num_together is None:
        num_together = min(MAX_TOGETHER, max(1, num_items // (STRETCHES_PER_WORKER * len(turns))))
    return [turns[index // num_together % len(turns)][1] for index in range(num_items)]


def share_of(items: Sequence[ItemT], worker: Worker, num_together: int | None = None) -> list[ItemT]:
    """The items that fall to this worker."""
    ranks = ranks_of(len(items), worker, num_together)
    return [item for item, rank in zip(items, ranks, strict=True) if rank == worker.rank]


def interleave(shares: Sequence[Sequence[ItemT]], worker: Worker) -> list[ItemT]:
    """Undoes `share_of`: the items of the shares of all workers, by rank, in their order."""
    rest = [iter(share) for share in shares]
    return [next(rest[rank]) for rank in ranks_of(sum(map(len, shares)), worker)]


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


def tell_left(run: Place, num_left: int, worker: Worker) -> None:
    """Tells the driver how much work this group finds to do: less than the group before it found is progress."""
    if worker.is_ray and worker.rank == 0:
        (run / STATE_FOLDER / LEFT_FILE).write_bytes(str(num_left).encode())


def progress(items: Iterable[ItemT], total: int, description: str, unit: str, worker: Worker) -> Iterator[ItemT]:
    """A progress bar on rank 0: tqdm in this process, Ray's own in a worker, whose lines Ray would double."""
    if worker.rank:
        yield from items
    elif worker.is_ray:
        bar = progress_bar(description, total, unit)
        for item in items:
            yield item
            bar.update(1)
        bar.close()
    else:
        yield from tqdm(items, desc=description, total=total, unit=unit)
