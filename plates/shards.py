"""A data set in Parquet shards, packed here or by Hugging Face: encoded images in row groups, read one at a time."""

import functools
import json
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.compute import if_else, is_in, less, or_kleene  # pyright: ignore[reportAttributeAccessIssue]

from plates.config import UserError
from plates.rundir import write_atomically
from plates.samples import repeated
from plates.storage import Place

INDEX_FILE, FORMAT = "dataset.json", 2
IMAGES_PER_ROW_GROUP, BYTES_PER_ROW_GROUP = 64, 4 << 20  # read at once; whichever is reached first
IMAGES_PER_SHARD = 2048
NUM_KEPT = 12  # row groups of a process: the 8 that an epoch's order mixes, and some of the next 8
# What a split may be called, in a table, as a folder, and where a shard's name begins.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FILE_NAMES = {"train": "train", "val": "validation", "test": "test"}  # as Hugging Face begins them


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
                    self.images = file.read_row_group(self.number, columns=["image.bytes"])["image"]
            return self.images


@functools.lru_cache(maxsize=NUM_KEPT)
def row_group(shard: Place, number: int) -> RowGroup:
    return RowGroup(shard, number)


def schema_of(classes: Sequence[str]) -> pa.Schema:
    """Hugging Face's layout of an image data set, which its library reads as features Image and ClassLabel.

    An image without a label has -1; sha256 is of the image's bytes, as hex.
    """
    label, digest = {"names": [*classes], "_type": "ClassLabel"}, {"dtype": "string", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": label, "sha256": digest}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [("image", image), ("label", pa.int64()), ("sha256", pa.string())]
    return pa.schema(columns, {"huggingface": json.dumps({"info": {"features": features}})})


def write_shard(path: Place, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    """One shard, whole or not at all; no more than one row group of it is in memory."""

    def write(file: Path) -> None:
        # Images are compressed already and are all different: plain bytes are read four times as fast.
        in_dictionary: Any = ["label"]
        with pq.ParquetWriter(file, schema, compression="none", use_dictionary=in_dictionary) as writer:
            group, num_bytes = [], 0
            for row in rows:
                group.append(row)
                num_bytes += len(row["image"]["bytes"])
                if len(group) == IMAGES_PER_ROW_GROUP or num_bytes >= BYTES_PER_ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    group, num_bytes = [], 0
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema))

    write_atomically(path, write)


def holds_images(file: Place) -> bool:
    """Whether a Parquet file has an image a row, and not its path."""
    with pq.ParquetFile(file.open("rb")) as shard:
        return "image" in shard.schema_arrow.names


def read_index(place: Place) -> pa.Table:
    """A row an image, as they are stored: path, label (text or null), split, digest (null where `plates prepare` did
    not write it), and where it lies: shard, row_group and row; no image is read.

    Args:
        place: a folder of shards, or one shard.

    Raises: UserError where it is damaged or of another format.
    """
    is_prepared, folder = (place / INDEX_FILE).exists(), place if place.is_dir() else place.parent
    try:
        splits = split_prepared(place) if is_prepared else split_by_name(place)
        parts = [read_part(folder, name, split, is_prepared) for name, split in splits.items()]
        return name_images(pa.concat_tables(parts).unify_dictionaries())
    except (OSError, ValueError, KeyError, IndexError, pa.ArrowException) as error:
        todo = "prepare it again" if is_prepared else "it needs image (bytes and path) and label, as Hugging Face has"
        raise UserError(f"--data {place}: its shards are damaged ({error}); {todo}") from error


def split_prepared(folder: Place) -> dict[str, str]:
    """The split of each shard that `plates prepare` wrote."""
    described = json.loads((folder / INDEX_FILE).read_text())
    if described["format"] != FORMAT:
        raise UserError(
            f"--data {folder}: is of format {described['format']}, this version reads {FORMAT}; prepare it again"
        )
    return {name: SPLITS[name.partition("-")[0]] for name in described["shards"]}


def split_by_name(place: Place) -> dict[str, str]:
    """The split of each Parquet file, by the first word of its name; train where no name begins with a split."""
    files = place.iterdir() if place.is_dir() else [place]
    names = sorted(file.name for file in files if file.suffix == ".parquet" and not file.name.startswith("."))
    splits = {name: SPLITS.get(re.split(r"[-_.]", name)[0]) for name in names}
    if not any(splits.values()):
        return dict.fromkeys(names, "train")
    for name, split in splits.items():
        if split is None:
            raise UserError(f"--data {place}: {name} names no split ({', '.join(SPLITS)}), while others do")
    return cast(dict[str, str], splits)


def read_part(folder: Place, name: str, split: str, is_prepared: bool) -> pa.Table:
    """The rows of one shard."""
    with pq.ParquetFile((folder / name).open("rb")) as file:
        part = file.read(columns=["image.path", "label", "sha256"])
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    digests = map(bytes.fromhex, part["sha256"].to_pylist()) if is_prepared else [None] * len(part)
    columns = {
        "path": pa.chunked_array([chunk.field("path") for chunk in part["image"].chunks], pa.string()),
        "label": name_labels(part["label"], part.schema),
        "split": pa.array([split] * len(part), pa.string()),
        "digest": pa.array(digests, pa.binary(32)),
        "shard": pa.DictionaryArray.from_arrays(pa.array([0] * len(part), pa.int32()), [name]),
        "row_group": pa.array(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)),
        "row": pa.array([row for size in sizes for row in range(size)], pa.int32()),
    }
    return pa.table(columns)


def name_labels(labels: pa.ChunkedArray, schema: pa.Schema) -> pa.ChunkedArray:
    """As text: the class's name where the schema has one, else the number; null of one below 0."""
    if not pa.types.is_integer(labels.type):
        return labels.cast(pa.string())
    numbers = if_else(less(labels, 0), pa.scalar(None, labels.type), labels)
    described = json.loads((schema.metadata or {}).get(b"huggingface", "{}"))
    names = described.get("info", {}).get("features", {}).get("label", {}).get("names")
    return pa.chunked_array([pa.array(names, pa.string())]).take(numbers) if names else numbers.cast(pa.string())


def name_images(index: pa.Table) -> pa.Table:
    """Of each row whose path is missing or not its own, SPLIT/SHARD-ROW in its place."""
    paths = index["path"]
    is_made_up = or_kleene(paths.is_null(), is_in(paths, value_set=repeated(paths))).to_numpy()
    if is_made_up.any():
        rows = index.select(["path", "split", "shard"]).to_pandas()
        stems = rows["shard"].astype(str).str.removesuffix(".parquet")
        numbers = rows.groupby("shard", observed=True).cumcount().astype(str).str.zfill(6)
        made_up = rows["split"] + "/" + stems + "-" + numbers
        paths = pa.array(rows["path"].mask(is_made_up, made_up), pa.string())
    return index.set_column(0, "path", paths)
