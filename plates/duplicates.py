"""Sets of images that are the same, or look the same, as they are or mirrored."""

import functools
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np

from plates.looks import GREY_SIDE, MIRROR, NUM_BITS

# Measured on 40 photos of plates and 120 drawn ones, 341 x 256: copies as JPEG of quality 60 to 95, halved or
# mirrored differ in at most 16 bits (all at once in 22) and their greys in at most 5 of 255. Of the 3.9 million pairs
# of these photos, 744 others and 2,000 drawings 6 differ in at most 24 bits: one, by 10 bits and 4 greys, is the same
# photo cut out twice, the others differ by 25 greys and more.
MAX_DISTANCE, MAX_GREY_DISTANCE = 24, 12


def find_sets(digests: np.ndarray, looks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sets of duplicates: each image is in one, alone or with all that are near to any in it.

    Args:
        digests: (N,) int64, equal where the images' files are.
        looks: (N,) LOOK.

    Returns: (N,) the number of each image's set; (N,) float, the least number of bits in which the hash of another
        file that is near differs, infinite where none is.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    is_seen = looks["width"] > 0
    seen_first = np.argsort(~is_seen, kind="stable")
    _, firsts, inverse = np.unique(digests[seen_first], return_index=True, return_inverse=True)
    first = np.empty_like(seen_first)  # (N,) of the images with the same digest one that was seen, if any was
    first[seen_first] = seen_first[firsts[inverse]]
    files = np.flatnonzero(is_seen & (first == np.arange(len(digests))))
    shown = np.concatenate([looks["hash"][files], looks["grey"][files].reshape(-1, GREY_SIDE**2)], axis=1)
    _, heads, groups = np.unique(shown, axis=0, return_index=True, return_inverse=True)
    nearest = np.where(np.bincount(groups, minlength=len(heads)) > 1, 0.0, np.inf)  # of pictures all different
    edges = [np.stack([np.arange(len(digests)), first]), np.stack([files, files[heads[groups]]])]
    for one, other, distances in find_pairs(looks[files[heads]]):
        edges.append(files[heads[np.stack([one, other])]])
        for ends in (one, other):
            np.minimum.at(nearest, ends, distances)
    one, other = np.concatenate(edges, axis=1)
    graph = coo_matrix((np.ones(len(one), bool), (one, other)), shape=(len(digests), len(digests)))
    least = np.full(len(digests), np.inf)
    least[files] = nearest[groups]
    return connected_components(graph, directed=False)[1], least[first]


def find_pairs(
    looks: np.ndarray, max_distance: int = MAX_DISTANCE, few: int = 20_000
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields arrays of all pairs of near pictures, as they are or one of them mirrored, and in how many bits their
    hashes differ; some repeatedly.

    Two hashes that differ in t bits are equal in one of t + 1 chunks of their bits, and in two of t + 2, so that only
    those are compared: by one chunk of few pictures, and by two of more.

    looks: (N,) LOOK.
    """
    count = len(looks)
    num_equal = 1 if count <= few else 2
    hashes = np.concatenate([looks["hash"], looks["hash"] ^ MIRROR])
    greys = np.concatenate([looks["grey"], looks["grey"][:, :, ::-1]])
    words = hashes.view(np.uint64)  # (2 N, 4)
    for chosen in combinations(cut_in_chunks(hashes, max_distance + num_equal), num_equal):
        keys = functools.reduce(lambda key, chunk: key << np.uint64(32) | chunk, chosen)  # (2 N,)
        order = np.argsort(keys, kind="stable")
        keys, at, step = keys[order], np.arange(2 * count), 0
        while len(at := at[at + (step := step + 1) < 2 * count]):
            at = at[keys[at] == keys[at + step]]
            one, other = order[at], order[at + step]  # a stable order has no picture after its mirrored self
            is_new = (one < count) & (one != other % count)
            one, other = one[is_new], other[is_new]
            distances = np.bitwise_count(words[one] ^ words[other]).sum(1)
            is_near = distances <= max_distance
            one, other, distances = one[is_near], other[is_near], distances[is_near]
            lower, higher = np.minimum(greys[one], greys[other]), np.maximum(greys[one], greys[other])
            is_near = (higher - lower).max((1, 2), initial=0) <= MAX_GREY_DISTANCE
            yield one[is_near], other[is_near] % count, distances[is_near]


def cut_in_chunks(hashes: np.ndarray, num_chunks: int) -> list[np.ndarray]:
    """(N, 32) uint8 as that many (N,) uint64, of about equally many bits each."""
    bits = np.unpackbits(hashes, axis=1)
    edges = pairwise(np.linspace(0, NUM_BITS, num_chunks + 1).astype(int))
    return [(bits[:, start:stop] @ (1 << np.arange(stop - start))).astype(np.uint64) for start, stop in edges]
