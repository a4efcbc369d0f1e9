"""Shares of the images by each worker's threads."""

import pytest
import torch

from plates.train_loop.group import Worker, batch_share, interleave, shard

CPU = torch.device("cpu")


def workers_of(threads: tuple[int, ...]) -> list[Worker]:
    return [Worker(rank, len(threads), CPU, True, threads) for rank in range(len(threads))]


@pytest.mark.parametrize("threads", [(4, 4), (8, 4), (7, 5, 3), (64, 1)])
@pytest.mark.parametrize("count", [0, 1, 7, 13, 1000, 5003])
def test_shares_are_whole_disjoint_and_undone(threads, count):
    shards = [shard(range(count), worker) for worker in workers_of(threads)]
    assert sorted(item for part in shards for item in part) == list(range(count))
    rows = [torch.tensor(part, dtype=torch.float32)[:, None] for part in shards]
    assert torch.equal(interleave(rows, workers_of(threads)[0])[:, 0], torch.arange(count, dtype=torch.float32))
    batch = [batch_share(range(count), worker) for worker in workers_of(threads)]
    assert sorted(item for part in batch for item in part) == list(range(count))


@pytest.mark.parametrize("threads", [(8, 4), (7, 5, 3), (4, 4, 4), (64, 1)])
def test_shares_follow_the_threads(threads):
    for share in (shard, batch_share):
        counts = [len(share(range(6000), worker)) for worker in workers_of(threads)]
        for count, mine in zip(counts, threads, strict=True):
            assert count / 6000 == pytest.approx(mine / sum(threads), abs=0.02), share


def test_equal_threads_share_a_batch_as_every_world_sizeth():
    order = torch.randperm(29, generator=torch.Generator().manual_seed(0)).tolist()
    for worker in workers_of((6, 6, 6)):
        assert batch_share(order, worker) == order[worker.rank :: 3]


def test_a_small_batch_is_shared_evenly_over_its_length():
    """Not the first of it to the one and the rest to the other: the last batch of an epoch is short."""
    for count, expected in ((6, [4, 2]), (3, [2, 1]), (1, [1, 0])):
        assert [len(batch_share(range(count), worker)) for worker in workers_of((8, 4))] == expected
