"""Data sets: what --data names, as splits of (path, label)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import pyarrow as pa
import torch
from pyarrow.compute import equal, index_in  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from tqdm import tqdm

from plates import synthetic
from plates.config import UserError
from plates.device import num_usable_cpus
from plates.folders import find_images, find_root, look_into, printable
from plates.images import IMAGE_SUFFIXES, UnreadableImageError
from plates.rules import Difficulty, parse_drawn
from plates.shards import INDEX_FILE, read_index
from plates.sources import FolderSource, ShardSource, Source, SyntheticSource, synthetic_identity
from plates.storage import Place, place_of

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
    def labels(self) -> Tensor:
        """(N,) int64, of images that all have one."""
        return torch.from_numpy(self.table["label"].to_numpy().astype(np.int64))


@dataclass(frozen=True)
class Skipped:
    path: str
    split: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Samples by split, in path order. Labels of the test split, where there are any, are for its score alone."""

    source: Source
    classes: tuple[str, ...]
    train: Samples
    val: Samples
    test: Samples

    def read_picture(self, path: str) -> np.ndarray:
        """(H, W, 3) uint8, for people. Raises: UnreadableImageError."""
        return self.source.read(path).permute(1, 2, 0).numpy()


def load_dataset(data: str, seed: int, *, needs_train: bool = True) -> Dataset:
    """Lists the data set that --data names; no image is read. Raises: UserError naming what is missing in it."""
    if drawn := parse_drawn(data):
        return list_synthetic(*drawn, seed)
    folder = place_of("--data", data)
    try:
        if (folder / INDEX_FILE).exists():
            return list_prepared(folder)
        root = find_root(folder)
        if root and (root / "train").is_dir():
            return list_folder(root)
        if needs_train:
            raise UserError(f"--data {folder}: holds no train/ folder; expected train/CLASS/*.jpg")
        top = root or folder
        test = find_images(top / "test" if root else top, top)
    except OSError as error:  # a folder that may not be listed, or a store that does not answer
        raise UserError(f"--data {data}: cannot be listed ({error})") from error
    if not test:
        raise UserError(f"--data {data}: holds no images to predict ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return Dataset(FolderSource(top), (), Samples.of(), Samples.of(), Samples.of(test))


def load_test_split(data: str, seed: int) -> Dataset:
    """The test split alone, for a checkpoint: test/** of a data set, or every image of a plain folder."""
    return load_dataset(data, seed, needs_train=False)


def list_folder(root: Place) -> Dataset:
    by_class = images_by_class(root, "train")
    classes = tuple(by_class)
    if len(classes) < 2:
        raise UserError(f"--data {root}: train/ holds {len(classes)} class folders; at least 2 are needed")
    has_val = (root / "val").is_dir()
    for name, paths in by_class.items():
        if not paths:
            raise UserError(f"--data {root}: train/{name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        if len(paths) < 2 and not has_val:
            raise UserError(f"--data {root}: train/{name} holds 1 image; the split needs at least 2 a class")
    if has_val:
        train, val = by_class, images_by_class(root, "val")
        unknown = [name for name in val if name not in by_class]
        if unknown:
            raise UserError(f"--data {root}: val/{unknown[0]} is not a class of train/ ({', '.join(classes)})")
        if not any(val.values()):
            raise UserError(f"--data {root}: val/ holds no images; fill it, or remove it to split train/")
    else:
        train, val = split_every_sixth(by_class)
    test = Samples.of(find_images(root / "test", root))
    return Dataset(FolderSource(root), classes, label(train, classes), label(val, classes), test)


def images_by_class(root: Place, split: str) -> dict[str, list[str]]:
    folders, _ = look_into(root / split)
    for child in folders:
        if printable(child.name) != child.name:
            raise UserError(f"--data {root}: {split}/{printable(child.name)}: a class must have a name in UTF-8")
    return {child.name: find_images(child, root) for child in folders}


def split_every_sixth(by_class: dict[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(train, val): of each class's sorted images every sixth, the first included, is held out."""
    val = {name: paths[::VALIDATION_EVERY] for name, paths in by_class.items()}
    train = {name: [p for i, p in enumerate(paths) if i % VALIDATION_EVERY] for name, paths in by_class.items()}
    return train, val


def label(by_class: dict[str, list[str]], classes: tuple[str, ...]) -> Samples:
    labels = {path: number for number, name in enumerate(classes) for path in by_class.get(name, [])}
    paths = sorted(labels)
    return Samples.of(paths, [labels[path] for path in paths])


def list_prepared(folder: Place) -> Dataset:
    """What `plates prepare` packed, with its splits as they were made then."""
    classes, index = read_index(folder)
    labels = index_in(index["label"], value_set=pa.array(classes, pa.string()))
    samples = Samples(index.select(["path", "digest"]).add_column(1, "label", labels))
    splits = (samples.where(equal(index["split"], split).to_numpy()) for split in ("train", "val", "test"))
    return Dataset(ShardSource(folder, index.drop_columns(["label", "split"])), classes, *splits)


def list_synthetic(num_labelled: int, difficulty: Difficulty, seed: int) -> Dataset:
    """`num_labelled` drawings in train/ with the classes in turn, and as many again in test/."""
    classes = synthetic.CLASSES
    paths = [f"train/{classes[index % len(classes)]}/{index:06d}.png" for index in range(num_labelled)]
    train, val = split_every_sixth({name: paths[number :: len(classes)] for number, name in enumerate(classes)})
    test = sorted(f"test/{index:06d}.png" for index in range(num_labelled, 2 * num_labelled))
    kept_aside = [int(synthetic_identity(seed, path)[1]) for path in test]
    splits = (label(train, classes), label(val, classes), Samples.of(test, kept_aside))
    return Dataset(SyntheticSource(seed, difficulty), classes, *splits)


def row_groups(source: Source, samples: Samples) -> Tensor:
    """(N,) int64: the number of the group that each image is read with, 0 for all where each is read alone."""
    if not isinstance(source, ShardSource):
        return torch.zeros(len(samples), dtype=torch.int64)
    indices = index_in(samples.table["path"], value_set=source.index["path"])
    found = source.index.select(["shard", "row_group"]).take(indices).to_pandas()
    groups = found.groupby(["shard", "row_group"], observed=True).ngroup()
    return torch.from_numpy(groups.to_numpy(np.int64, copy=True))


def in_threads(look: Callable[[str], bytes], samples: Samples) -> Iterator[bytes | UnreadableImageError]:
    """What is found at each path in turn, or why it cannot be read."""

    def try_to(path: str) -> bytes | UnreadableImageError:
        try:
            return look(path)
        except UnreadableImageError as error:
            return error

    # As many as by default, which counts a host's CPUs where its container has a share of them.
    with ThreadPoolExecutor(min(32, num_usable_cpus() + 4)) as pool:
        for batch in samples.table.to_batches(max_chunksize=SAMPLES_PER_BATCH):
            yield from pool.map(try_to, batch["path"].to_pylist())


def check_dataset(dataset: Dataset, skip_unreadable: bool) -> tuple[Dataset, list[Skipped]]:
    """Decodes every labelled image once, before anything is trained. Raises: UserError as `leave_out` does.

    Returns: the data set of the images that can be read, with their digests, and those that cannot.
    """
    skipped: list[Skipped] = []
    checked = {}
    with tqdm(total=len(dataset.train) + len(dataset.val), desc="checking", unit="image") as bar:
        for split, samples in (("train", dataset.train), ("val", dataset.val)):
            digests: list[bytes | None] = []
            for sample, found in zip(samples, in_threads(dataset.source.check, samples), strict=True):
                digests.append(found if isinstance(found, bytes) else None)
                if not isinstance(found, bytes):
                    skipped.append(Skipped(sample.path, split, str(found)))
                bar.update()
            checked[split] = samples.with_digests(digests)
    return leave_out(replace(dataset, **checked), skipped, skip_unreadable), skipped


def leave_out(dataset: Dataset, skipped: Sequence[Skipped], skip_unreadable: bool) -> Dataset:
    """The data set without labelled images that cannot be read.

    Raises: UserError naming them, unless they may be skipped; or where a class or the validation split is empty then.
    """
    if skipped and not skip_unreadable:
        named = "; ".join(f"{item.path}: {item.reason}" for item in skipped[:5])
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise UserError(
            f"--data: {len(skipped)} images cannot be read ({named}{more}); mend them, or pass --skip-unreadable"
        )
    unreadable = {item.path for item in skipped}
    train, val = (
        samples.where([sample.path not in unreadable for sample in samples]) if unreadable else samples
        for samples in (dataset.train, dataset.val)
    )
    counts = Counter(train.labels.tolist())
    for index, name in enumerate(dataset.classes):
        if not counts[index]:
            raise UserError(f"--data: no image of class {name} in the training split can be read")
    if not val:
        raise UserError("--data: no image of the validation split can be read")
    return replace(dataset, train=train, val=val)


def merge_labelled(dataset: Dataset) -> Dataset:
    """Both splits with all labelled images: cross-validation draws its own splits."""
    labelled = Samples(pa.concat_tables([dataset.train.table, dataset.val.table]).sort_by("path").combine_chunks())
    return replace(dataset, train=labelled, val=labelled)
