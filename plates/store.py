"""The feature store: rows of features by what they follow from, kept in parts that are never changed."""

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import torch
from pyarrow.compute import index_in  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from plates.rundir import write_atomically
from plates.storage import Place

SECONDS_PER_PART = 10.0  # of computing that a worker may lose
BYTES_PER_PART = 64 << 20  # of features that a worker holds
KEY_TYPE = pa.binary(16)
USE_FILE = ".in_use"  # of a folder on a disk: locked while its rows are in use, and as old as their last use


@dataclass(frozen=True)
class FeatureRows:
    """Stored features in the order that they were asked for: indexed as a tensor, to which what is read is copied."""

    parts: list[Tensor]  # (R, F) float32 each, memory-mapped
    positions: Tensor  # int64, of any shape: each row's position in the parts, counted end to end

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int | slice | Tensor | tuple[int | slice | Tensor, ...]) -> Tensor:
        """(..., F) for an index to (...) positions."""
        positions = self.positions[index].contiguous()
        if len(self.parts) == 1:
            return self.parts[0][positions]
        ends = torch.tensor([0, *map(len, self.parts)]).cumsum(0)
        rows = torch.empty((*positions.shape, self.parts[0].shape[1] if self.parts else 0))
        of_part = torch.searchsorted(ends, positions, right=True) - 1
        for number in of_part.unique().tolist():
            chosen = of_part == number
            rows[chosen] = self.parts[number][positions[chosen] - ends[number]]
        return rows

    def arranged(self, shape: tuple[int, ...], *order: int) -> "FeatureRows":
        """The same rows in another shape, its axes then in this order."""
        return FeatureRows(self.parts, self.positions.reshape(shape).permute(order or tuple(range(len(shape)))))


class FeatureStore:
    """The rows of one trunk's features, each found by a key of 16 bytes.

    They lie in parts, Arrow files that are never changed, nor deleted while somebody uses them: a run that is cut off
    leaves its rows to the next one, and of two that compute the same rows at once each has its own. A damaged part
    counts as gone.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self.use = mark_use(folder) if isinstance(folder, Path) else None
        self.keys: dict[Place, pa.Array] = {}  # of the parts seen so far
        self.names: list[bytes] = []  # of the rows that are pending
        self.pending = torch.empty(0, 0)  # filled in place: rows kept between large blocks would make the heap grow
        self.saved_at = time.monotonic()

    def find(self, keys: pa.Array) -> np.ndarray:
        """(n,) int64: the position of each row in all parts end to end, -1 where it is not stored."""
        for part in sorted(self.folder.iterdir()) if self.folder.exists() else []:
            if part.suffix == ".arrow" and part not in self.keys:
                self.keys[part] = read_keys(part)
        stored = pa.concat_arrays([pa.array([], KEY_TYPE), *self.keys.values()])
        return index_in(keys, value_set=stored).fill_null(-1).to_numpy().astype(np.int64)

    def rows(self, keys: pa.Array) -> FeatureRows:
        """Raises: FileNotFoundError where one is not stored."""
        found = self.find(keys)
        if (found < 0).any():
            raise FileNotFoundError(f"{self.folder}: {(found < 0).sum()} rows of features are gone; run again")
        ends = np.cumsum([0, *map(len, self.keys.values())])
        used, of_used = np.unique(np.searchsorted(ends, found, side="right") - 1, return_inverse=True)
        parts = [map_features(list(self.keys)[number]) for number in used]
        starts = np.cumsum([0, *map(len, parts)])  # of those that are used alone
        positions = found - ends[used][of_used] + starts[of_used]
        return FeatureRows(parts, torch.from_numpy(positions))

    def add(self, key: bytes, row: Tensor) -> None:
        """Takes a finished row (F,), and stores it with those before it when there is enough that could be lost."""
        if not len(self.pending):
            self.pending = torch.empty(max(1, BYTES_PER_PART // row.nbytes), len(row))
        self.pending[len(self.names)] = row
        self.names.append(key)
        if time.monotonic() - self.saved_at >= SECONDS_PER_PART or len(self.names) == len(self.pending):
            self.flush()

    def flush(self) -> None:
        """Stores the rows that are pending."""
        if self.names:
            self.write(pa.array(self.names, KEY_TYPE), self.pending[: len(self.names)])
        self.names, self.saved_at = [], time.monotonic()

    def write(self, keys: pa.Array, rows: Tensor) -> None:
        """Stores rows (n, F) float32 as one part."""
        values = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1).numpy()), rows.shape[1])
        batch = pa.record_batch({"key": keys, "feature": values})

        def write_part(file: Path) -> None:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)

        write_atomically(self.folder / f"{uuid.uuid4().hex}.arrow", write_part)


def mark_use(folder: Path) -> IO[bytes]:
    """The folder counts as in use until the file is closed, and as used now."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / USE_FILE).open("ab")
    with suppress(OSError):  # a disk without locks, where nothing is removed either
        fcntl.flock(file, fcntl.LOCK_SH)
    os.utime(file.fileno())
    return file


def limit_size(root: Place, max_bytes: float) -> None:
    """Removes folders of rows on a disk, the least recently used first, until what is left fits or is in use.

    An object store has rules of its own for that.
    """
    if not isinstance(root, Path) or not root.exists():
        return
    sizes = {
        guard: sum(file.stat().st_size for file in guard.parent.iterdir()) for guard in root.glob(f"*/{USE_FILE}")
    }
    for guard in sorted(sizes, key=lambda guard: guard.stat().st_mtime):
        if sum(sizes.values()) <= max_bytes:
            return
        with guard.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # in use, or on a disk that has no locks
                continue
            shutil.rmtree(guard.parent, ignore_errors=True)
            del sizes[guard]


def read_keys(part: Place) -> pa.Array:
    """Its keys, a copy; none where it is damaged or gone."""
    try:
        with part.open("rb") as file:
            options = pa.ipc.IpcReadOptions(included_fields=[0])
            return pa.ipc.open_file(file, options=options).get_batch(0)["key"]
    except (OSError, pa.ArrowInvalid):
        return pa.array([], KEY_TYPE)


def map_features(part: Place) -> Tensor:
    """(R, F) float32, memory-mapped, so that the system can take its memory back; of a URI, a passing copy is."""
    if not isinstance(part, Path):
        with tempfile.NamedTemporaryFile() as copy, part.open() as stored:
            shutil.copyfileobj(stored, copy)
            copy.flush()
            return map_features(Path(copy.name))
    batch = pa.ipc.open_file(pa.memory_map(str(part))).get_batch(0)
    return torch.from_dlpack(batch["feature"].values).reshape(len(batch), -1)
