"""Features that a group of workers computes together: found in the store, else computed, each worker its share."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from plates.dataset import Seen, in_threads
from plates.features import FrozenTrunk, Wanted, compute_features, row_keys, trunk_key
from plates.looks import LOOK, Look
from plates.rundir import FEATURES_FOLDER
from plates.samples import Samples
from plates.store import BYTES_PER_PART, FeatureRows, FeatureStore
from plates.train_loop.group import Worker, all_gather, broadcast, gather, interleave, progress, share_of, tell_left
from plates.train_loop.task import Task

ROWS_AT_ONCE = 4096  # through the head
MAX_TRIES = 3  # to have all rows, where parts are damaged or somebody deletes them


@dataclass(frozen=True)
class StoredRows:
    """Rows that some worker can read: their keys (n,), the rank that hands each in (n,), and whether any of them was
    stored before."""

    keys: pa.Array
    ranks: np.ndarray
    is_reused: bool

    def of_rank(self, rank: int) -> tuple[np.ndarray, pa.Array]:
        """Indices and keys of the rows that it hands in."""
        indices = np.flatnonzero(self.ranks == rank)
        return indices, self.keys.take(pa.array(indices))

    def every(self, step: int) -> "StoredRows":
        """The first of each `step` rows: the first views of images."""
        first = pa.array(range(0, len(self.keys), step), pa.int64())
        return StoredRows(self.keys.take(first), self.ranks[::step], self.is_reused)


class SharedFeatures:
    """The features of a trunk, stored in the cache, or, where it was trained, in a folder that goes with the run."""

    def __init__(self, task: Task, worker: Worker, trunk: nn.Module, *, is_trained: bool = False) -> None:
        described = (
            task.weights.backbone,
            task.config.readout,
            task.preprocessing,
            task.precision,
            worker.device.type,
        )
        key = broadcast(trunk_key(trunk, *described) if worker.rank == 0 else "")
        self.task, self.worker, self.trunk = task, worker, trunk
        self.store = FeatureStore((task.run / FEATURES_FOLDER if is_trained else task.cache_root / "features") / key)
        self.fast_trunk: FrozenTrunk | None = None  # made when there is something to compute
        self.errors: dict[str, str] = {}  # by path why images of the test split cannot be read, alike on all workers
        self.num_computed = 0  # images, by this worker
        self.looks: dict[str, Look] = {}  # by path at images of the test split, until their features are there
        self.seen = np.zeros(0, LOOK)

    def complete(
        self,
        samples: Samples,
        views: Sequence[int],
        description: str = "",
        *,
        num_later: int = 0,
        may_fail: bool = False,
    ) -> StoredRows:
        """Computes what no worker has stored; every worker takes part.

        Args:
            views: their numbers; the rows are those of each image in turn.
            description: of the progress bar.
            num_later: images that are to be computed after these.
            may_fail: an image that cannot be read has no row, which none hands in, and its reason is in `errors`;
                what is seen of the others that this worker decodes is in `seen`.
        """
        keys, is_reused = row_keys(samples, views, self.task.drawing), None
        self.seen = np.zeros(len(samples), LOOK)
        for _ in range(MAX_TRIES + 1):
            ranks = np.full(len(keys), -1)
            for rank, bits in enumerate(all_gather(np.packbits(self.store.find(keys) >= 0))):
                ranks[(ranks < 0) & np.unpackbits(bits, count=len(keys)).astype(bool)] = rank
            is_reused = bool((ranks >= 0).any()) if is_reused is None else is_reused
            missing = (ranks < 0).reshape(len(samples), len(views))
            if self.errors:
                missing[[sample.path in self.errors for sample in samples]] = False
            indices = np.flatnonzero(missing.any(1)).tolist()
            tell_left(self.task.run, len(indices) + num_later, self.worker)
            if not indices:
                return StoredRows(keys, ranks, is_reused)
            share = share_of(indices, self.worker)
            wanted = ((samples[index].path, np.array(views)[missing[index]].tolist()) for index in share)
            rows = self.compute(wanted, may_fail) if share else iter(())
            shown = progress(rows, len(share), description, "image", self.worker) if description else rows
            for index, computed in zip(share, shown, strict=True):
                if self.looks and (look := self.looks.pop(samples[index].path, None)):
                    self.seen[index] = look.kept
                row_indices = index * len(views) + np.flatnonzero(missing[index])
                for row_index, row in zip(row_indices.tolist(), computed, strict=len(computed) > 0):
                    self.store.add(keys[row_index].as_py(), row)
            self.store.flush()
            for errors in all_gather(self.errors):
                self.errors |= errors
        raise FileNotFoundError(f"{self.store.folder}: features cannot be stored and read back; run again")

    def compute(self, wanted: Iterable[Wanted], may_fail: bool) -> Iterator[Tensor]:
        """(V, F) of each path and its views; (0, F) of an image that may fail and does."""
        if self.fast_trunk is None:
            self.fast_trunk = FrozenTrunk(
                self.trunk,
                self.task.preprocessing,
                self.worker.device,
                self.task.precision,
                self.worker.pace,
                self.task.config.readout,
            )
        source, errors = self.task.dataset.source, self.errors if may_fail else None
        # A prediction has no other images to compare with.
        looks = self.looks if may_fail and source.is_decoded_in_check and self.task.dataset.train else None
        for rows in compute_features(self.fast_trunk, source, wanted, self.task.drawing, errors, looks):
            self.num_computed += len(rows) > 0
            yield rows

    def complete_test(self) -> tuple[StoredRows, np.ndarray, Seen]:
        """Completes the test split, whose images nobody has looked at yet: each worker hashes a share of them first.

        Returns: the rows of the images that can be read, each view's in turn; (N,) which these are; and what was seen
            of all, on rank 0.
        """
        samples, worker = self.task.dataset.test, self.worker
        share = samples.take(share_of(range(len(samples)), worker))
        found = interleave(all_gather([*in_threads(self.task.dataset.source.digest, share)]), worker)
        digests = [digest if isinstance(digest, bytes) else None for digest in found]
        is_read = np.array([digest is not None for digest in digests], bool)
        self.errors |= {samples[index].path: str(found[index]) for index in np.flatnonzero(~is_read).tolist()}
        hashed = samples.with_digests(digests).where(is_read.tolist())
        views = self.task.config.eval_views
        stored = self.complete(hashed, views, "predicting", may_fail=True)
        looks, hashed_at = np.zeros(len(samples), LOOK), np.flatnonzero(is_read)
        own = np.flatnonzero(self.seen["width"])
        for indices, kept in gather((own, self.seen[own])):
            looks[hashed_at[indices]] = kept
        has_row = stored.ranks >= 0
        is_read[hashed_at] = has_row[:: len(views)]
        stored = replace(stored, keys=stored.keys.filter(pa.array(has_row)), ranks=stored.ranks[has_row])
        return stored, is_read, Seen(samples.with_digests(digests), looks)

    def on_rank_0(self, stored: StoredRows) -> FeatureRows | None:
        """The rows, on rank 0; every worker takes part. What lies in the caches of other nodes alone is sent, a part
        at a time, and stored there, too."""
        rank = self.worker.rank
        if (stored.ranks > 0).any():
            keys = stored.of_rank(rank)[1] if rank else stored.keys[:0]
            rows = self.store.rows(keys)
            num_at_once = max(1, BYTES_PER_PART // max(1, rows[:1].nbytes))
            for turn in range(max(all_gather(ceil(len(keys) / num_at_once)))):
                part = slice(turn * num_at_once, (turn + 1) * num_at_once)
                for sent_keys, sent_rows in gather((keys[part], rows[part])):
                    if len(sent_keys):
                        self.store.write(sent_keys, sent_rows)
        return None if rank else self.store.rows(stored.keys)

    def logits(self, head: nn.Linear, stored: StoredRows) -> Tensor | None:
        """(n, C) of the rows, on rank 0. Every worker takes part."""
        weight, bias = head.weight.detach().cpu(), head.bias.detach().cpu()
        return self.of_rows(lambda rows: linear(rows, weight, bias), len(bias), stored)

    def of_rows(self, compute: Callable[[Tensor], Tensor], num_columns: int, stored: StoredRows) -> Tensor | None:
        """(n, K) that is computed of the rows, on rank 0. Every worker takes part, with those that it hands in."""
        indices, keys = stored.of_rank(self.worker.rank)
        rows = self.store.rows(keys)
        slices = (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(keys), ROWS_AT_ONCE))
        computed = torch.cat([torch.empty(0, num_columns), *(compute(rows[part]) for part in slices)])
        found = torch.empty(len(stored.keys), num_columns)
        for sent_indices, values in gather((indices, computed)):
            found[torch.from_numpy(sent_indices)] = values
        return None if self.worker.rank else found
