"""A data set packed into Parquet shards: encoded images in row groups that are read one at a time."""

import functools
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plates.config import UserError
from plates.rundir import write_atomically
from plates.storage import Place

INDEX_FILE, FORMAT = "dataset.json", 1
IMAGES_PER_ROW_GROUP, BYTES_PER_ROW_GROUP = 64, 4 << 20  # read at once; whichever is reached first
IMAGES_PER_SHARD = 2048
NUM_KEPT = 12  # row groups of a process: the 8 that an epoch's order mixes, and some of the next 8
SCHEMA = pa.schema([("image", pa.binary()), *((name, pa.string()) for name in ("path", "label", "split", "sha256"))])


class RowGroup:
    """The encoded images of a row group, read by the first thread that wants one."""

    def __init__(self, shard: Place, number: int) -> None:
        self.shard, self.number = shard, number
        self.lock = threading.Lock()
        self.images: pa.ChunkedArray | None = None

    def read(self) -> pa.ChunkedArray:
        with self.lock:
            if self.images is None:
                with pq.ParquetFile(self.shard.open("rb")) as file:
                    self.images = file.read_row_group(self.number, columns=["image"])["image"]
            return self.images


@functools.lru_cache(maxsize=NUM_KEPT)
def row_group(shard: Place, number: int) -> RowGroup:
    return RowGroup(shard, number)


def write_shard(path: Place, rows: Iterable[dict[str, Any]]) -> None:
    """One shard, whole or not at all; no more than one row group of it is in memory."""

    def write(file: Path) -> None:
        # Images are compressed already and are all different: plain bytes are read four times as fast.
        repeated: Any = ["label", "split"]
        with pq.ParquetWriter(file, SCHEMA, compression="none", use_dictionary=repeated) as writer:
            group, num_bytes = [], 0
            for row in rows:
                group.append(row)
                num_bytes += len(row["image"])
                if len(group) == IMAGES_PER_ROW_GROUP or num_bytes >= BYTES_PER_ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                    group, num_bytes = [], 0
            if group:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))

    write_atomically(path, write)


def read_index(folder: Place) -> tuple[tuple[str, ...], pa.Table]:
    """Classes, and a row an image, in path order: path, label, split, digest, and where it lies; no image is read.

    Raises: UserError where the folder is damaged or of another format.
    """
    try:
        described = json.loads((folder / INDEX_FILE).read_text())
        if described["format"] != FORMAT:
            raise UserError(f"--data {folder}: is of format {described['format']}, this version reads {FORMAT}")
        parts = []
        for shard in described["shards"]:
            with pq.ParquetFile((folder / shard).open("rb")) as file:
                part = file.read(columns=["path", "label", "split", "sha256"])
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            digests = pa.array(map(bytes.fromhex, part["sha256"].to_pylist()), pa.binary(32))
            one_shard = pa.DictionaryArray.from_arrays(pa.array([0] * len(part), pa.int32()), [shard])
            row_groups = pa.array(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
            rows = pa.array([row for size in sizes for row in range(size)], pa.int32())
            part = part.set_column(3, "digest", digests).append_column("shard", one_shard)
            parts.append(part.append_column("row_group", row_groups).append_column("row", rows))
        index = pa.concat_tables(parts).unify_dictionaries()
        return tuple(described["classes"]), index.sort_by("path").combine_chunks()
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise UserError(f"--data {folder}: its shards are damaged ({error}); prepare it again") from error
