"""Tables of images, by CSV or Parquet, and the splits and classes of any table of path, label and split."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from pyarrow.compute import equal, if_else, index_in  # pyright: ignore[reportAttributeAccessIssue]

from plates.config import UserError
from plates.samples import Samples, repeated, split_every_sixth
from plates.shards import SPLITS
from plates.storage import Place

COLUMNS = ("path", "label", "split")


def read_table(file: Place) -> pa.Table:
    """A row an image, in path order: path, label (null where there is none), split (train, val or test), no digest.

    Raises: UserError naming what is wrong in it.
    """
    try:
        with file.open("rb") as stream:
            if file.suffix.lower() == ".csv":
                as_text = csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()))
                found = csv.read_csv(stream, convert_options=as_text)
            else:
                found = pq.ParquetFile(stream).read(columns=[*COLUMNS])
        for name in ("path", "label"):
            if name not in found.column_names:
                raise UserError(f"--data {file}: has no column {name}; a table has path, label and, if wanted, split")
        columns = {name: found[name].cast(pa.string()) for name in COLUMNS if name in found.column_names}
    except pa.ArrowException as error:
        raise UserError(f"--data {file}: cannot be read as a table ({str(error).splitlines()[0]})") from error
    paths, label = (columns[name].fill_null("") for name in ("path", "label"))
    for path in repeated(paths).to_pylist()[:1]:
        raise UserError(f"--data {file}: {path or 'an empty path'} is listed more than once")
    if "split" in columns:
        named = columns["split"].fill_null("")
        numbers = index_in(named, value_set=pa.array(["", *SPLITS]))
        for unknown in named.filter(numbers.is_null()).to_pylist()[:1]:
            raise UserError(f"--data {file}: {unknown} is no split; they are {', '.join(SPLITS)}")
        split = pa.array(["train", *SPLITS.values()]).take(numbers)
    else:
        split = pa.array(["train"] * len(found))
    return pa.table(
        {
            "path": paths,
            "label": if_else(equal(label, ""), pa.scalar(None, pa.string()), label),
            "split": split,
            "digest": pa.nulls(len(found), pa.binary(32)),
        }
    ).sort_by("path")


def split_table(
    data: Place, table: pa.Table, needs_train: bool, known: Sequence[str]
) -> tuple[tuple[str, ...], Samples, Samples, Samples]:
    """Classes of the training rows, in sorted order, then train, val and test in the order of their rows.

    Without rows of val every sixth image of each class is held out, as of folders.

    Args:
        table: path, label (text or null), split and digest.
        known: classes of the labels where there are no training rows.

    Raises: UserError naming what is missing, and rows that fit no class.
    """
    rows = {split: table.filter(equal(table["split"], split)) for split in ("train", "val", "test")}
    classes = tuple(sorted(rows["train"]["label"].drop_null().unique().to_pylist()))
    if (needs_train or rows["train"]) and len(classes) < 2:
        raise UserError(f"--data {data}: its training rows have {len(classes)} classes; at least 2 are needed")
    for name in classes:
        if "/" in name:
            raise UserError(f"--data {data}: label {name}: a class has no / in its name")
    names, splits = classes or tuple(known), {}
    for split, part in rows.items():
        numbers = index_in(part["label"], value_set=pa.array(names, pa.string()))
        unlabelled = part.filter(part["label"].is_null())
        if split != "test" and len(unlabelled):
            raise UserError(f"--data {data}: {unlabelled['path'][0]} of {split} has no label")
        strange = part.select(["path", "label"]).filter(numbers.is_null()).drop_null()
        if names and len(strange):
            path, label = (strange[name][0] for name in ("path", "label"))
            raise UserError(f"--data {data}: {path} of {split}: {label} is not a class of train ({', '.join(names)})")
        splits[split] = Samples(part.select(["path", "digest"]).add_column(1, "label", numbers).combine_chunks())
    train, val, test = splits.values()
    if classes and not val:
        counts = train.labels.bincount().tolist()
        if 1 in counts:
            raise UserError(
                f"--data {data}: {names[counts.index(1)]} has 1 image; the split needs at least 2 a class"
            )
        train, val = split_every_sixth(train)
    return classes, train, val, test
