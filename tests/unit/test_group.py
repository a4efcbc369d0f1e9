"""Shares of the images by each worker's threads."""

from functools import partial

import pytest
import torch

from plates.train_loop.group import Worker, interleave, share_of

CPU = torch.device("cpu")
batch_share = partial(share_of, num_together=1)


def workers_of(threads: tuple[int, ...]) -> list[Worker]:
    return [Worker(rank, len(threads), CPU, True, threads) for rank in range(len(threads))]


@pytest.mark.parametrize("threads", [(4, 4), (8, 4), (7, 5, 3), (64, 1)])
@pytest.mark.parametrize("count", [0, 1, 7, 13, 1000, 5003])
def test_shares_are_whole_disjoint_and_undone(threads, count):
    shares = [share_of(range(count), worker) for worker in workers_of(threads)]
    assert sorted(item for part in shares for item in part) == list(range(count))
    assert interleave(shares, workers_of(threads)[0]) == list(range(count))
    batch = [batch_share(range(count), worker) for worker in workers_of(threads)]
    assert sorted(item for part in batch for item in part) == list(range(count))


@pytest.mark.parametrize("threads", [(8, 4), (7, 5, 3), (4, 4, 4), (64, 1)])
def test_shares_follow_the_threads(threads):
    for deal in (share_of, batch_share):
        counts = [len(deal(range(6000), worker)) for worker in workers_of(threads)]
        for count, mine in zip(counts, threads, strict=True):
            assert count / 6000 == pytest.approx(mine / sum(threads), abs=0.02), deal


def test_equal_threads_share_a_batch_as_every_world_sizeth():
    order = torch.randperm(29, generator=torch.Generator().manual_seed(0)).tolist()
    for worker in workers_of((6, 6, 6)):
        assert batch_share(order, worker) == order[worker.rank :: 3]


def test_a_small_batch_is_shared_evenly_over_its_length():
    """Not the first of it to the one and the rest to the other: the last batch of an epoch is short."""
    for count, expected in ((6, [4, 2]), (3, [2, 1]), (1, [1, 0])):
        assert [len(batch_share(range(count), worker)) for worker in workers_of((8, 4))] == expected
