"""The images of a split: their paths, labels and digests, as columns."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pyarrow.compute import greater, less  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

VALIDATION_EVERY = 6  # the published split: every sixth image
SAMPLES_PER_BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: its path as the user knows it, and its class index; None where it is not known."""

    path: str
    label: int | None = None


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """The images of a split as columns, for a million of them to fit beside a model."""

    table: pa.Table  # path (string), label (int32 or null), digest (the image's SHA-256, null until it is known)

    @classmethod
    def of(cls, paths: Sequence[str] = (), labels: Iterable[int | None] | None = None) -> "Samples":
        known = pa.nulls(len(paths), pa.int32()) if labels is None else pa.array(labels, pa.int32())
        digests = pa.nulls(len(paths), pa.binary(32))
        return cls(pa.table({"path": pa.array(paths, pa.string()), "label": known, "digest": digests}))

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return Sample(self.table["path"][index].as_py(), self.table["label"][index].as_py())

    def __iter__(self) -> Iterator[Sample]:
        for batch in self.table.to_batches(max_chunksize=SAMPLES_PER_BATCH):
            yield from map(Sample, batch["path"].to_pylist(), batch["label"].to_pylist())

    def __eq__(self, other: object) -> bool:
        """Of paths and labels."""
        return isinstance(other, Samples) and [*self] == [*other]

    def take(self, indices: Iterable[int]) -> "Samples":
        return Samples(self.table.take(pa.array(indices, pa.int64())).combine_chunks())

    def where(self, is_kept: Sequence[bool] | np.ndarray) -> "Samples":
        return Samples(self.table.filter(pa.array(is_kept, pa.bool_())).combine_chunks())

    def with_digests(self, digests: Sequence[bytes | None]) -> "Samples":
        return Samples(self.table.set_column(2, "digest", pa.array(digests, pa.binary(32))))

    @property
    def is_in_path_order(self) -> bool:
        paths = self.table["path"]
        return bool(less(paths[:-1], paths[1:]).to_numpy().all())

    @property
    def labels(self) -> Tensor:
        """(N,) int64, of images that all have one."""
        return torch.from_numpy(self.table["label"].to_numpy().astype(np.int64))


def split_every_sixth(labelled: Samples) -> tuple[Samples, Samples]:
    """(train, val): of each class's images every sixth, the first included, is held out."""
    labels = pd.Series(labelled.labels.numpy())
    is_held_out = (labels.groupby(labels).cumcount() % VALIDATION_EVERY == 0).to_numpy()
    return labelled.where(~is_held_out), labelled.where(is_held_out)


def repeated(paths: pa.ChunkedArray) -> pa.Array:
    """Those that occur more than once."""
    counts = paths.value_counts()
    return counts.field("values").filter(greater(counts.field("counts"), 1))
