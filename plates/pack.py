"""Packing a data set into shards: in this process, or by Ray Data on the workers of a cluster."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pandas as pd
from tqdm import tqdm

from plates.cluster import Plan, find_room
from plates.config import UserError
from plates.dataset import Dataset, Skipped, leave_out
from plates.device import CPU
from plates.images import UnreadableImageError, prefetch
from plates.rundir import write_json
from plates.shards import FILE_NAMES, FORMAT, IMAGES_PER_SHARD, INDEX_FILE, schema_of, write_shard
from plates.sources import Source
from plates.storage import Place, remove_tree


def pack(dataset: Dataset, plan: Plan, folder: Place, skip_unreadable: bool) -> tuple[dict[str, int], list[Skipped]]:
    """Checks the images and writes the shards, then the index that makes them a data set.

    Returns: the number of images by split, and the images that cannot be read.
    Raises: UserError as `leave_out` does; the folder is then removed.
    """
    shards = list(list_shards(dataset))
    counts: Counter[str] = Counter()
    skipped: list[Skipped] = []
    if plan.num_workers:
        results = pack_on_ray(dataset, shards, plan, folder)
    else:
        results = (pack_shard(shard, dataset.source, dataset.classes, folder) for shard in shards)
    with tqdm(total=sum(map(len, shards)), desc="packing", unit="image") as bar:
        for packed in results:
            is_read = packed["error"] == ""
            counts.update(packed.loc[is_read, "split"])
            skipped += [Skipped(*row) for row in packed.loc[~is_read].itertuples(index=False, name=None)]
            bar.update(len(packed))
    try:
        leave_out(dataset, [item for item in skipped if item.split != "test"], skip_unreadable)
    except UserError:
        remove_tree(folder)
        raise
    num_images = {split: counts[split] for split in ("train", "val", "test")}
    names = [str(shard["shard"].iloc[0]) for shard in shards]
    described = {"format": FORMAT, "classes": dataset.classes, "num_images": num_images, "shards": names}
    write_json(folder / INDEX_FILE, described)
    return num_images, skipped


def list_shards(dataset: Dataset) -> Iterator[pd.DataFrame]:
    """A table of path, label, split and shard for each shard to be: images of one split, in their order."""
    for split, samples in (("train", dataset.train), ("val", dataset.val), ("test", dataset.test)):
        starts = range(0, len(samples), IMAGES_PER_SHARD)
        for index, start in enumerate(starts):
            listed = [*samples[start : start + IMAGES_PER_SHARD]]
            labels = [-1 if sample.label is None else sample.label for sample in listed]
            columns = {"path": [sample.path for sample in listed], "label": labels, "split": split}
            name = f"{FILE_NAMES[split]}-{index:05d}-of-{len(starts):05d}.parquet"
            yield pd.DataFrame({**columns, "shard": name})


def pack_shard(shard: pd.DataFrame, source: Source, classes: tuple[str, ...], folder: Place) -> pd.DataFrame:
    """Reads, checks and writes a shard's images; a table of path, split and error, empty where all is well."""
    errors: dict[str, str] = {}

    def load(row: dict[str, Any]) -> dict[str, Any] | None:
        try:
            digest, image = source.check(row["path"]).digest.hex(), source.read_bytes(row["path"])
            return {"image": {"bytes": image, "path": row["path"]}, "label": row["label"], "sha256": digest}
        except UnreadableImageError as error:
            errors[row["path"]] = str(error)

    listed: list[Any] = shard.to_dict("records")
    loaded = prefetch(load, listed, num_ahead=8, device=CPU)
    rows = (row for row in loaded if row is not None)
    write_shard(folder / str(shard["shard"].iloc[0]), schema_of(classes), rows)
    return shard[["path", "split"]].assign(error=[errors.get(path, "") for path in shard["path"]])


def pack_on_ray(dataset: Dataset, shards: list[pd.DataFrame], plan: Plan, folder: Place) -> Iterator[pd.DataFrame]:
    """One task a shard, as many at a time as the plan has workers."""
    import ray.data

    plan = find_room(plan)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the driver's tqdm shows it
    packed = ray.data.from_pandas(shards).map_batches(
        cast(Any, pack_shard),
        fn_kwargs={"source": dataset.source, "classes": dataset.classes, "folder": folder},
        batch_size=None,
        batch_format="pandas",
        num_cpus=plan.cpus_per_worker,
        compute=ray.data.TaskPoolStrategy(size=plan.num_workers),
    )
    yield from packed.iter_batches(batch_size=None, batch_format="pandas")  # pyright: ignore[reportReturnType]
