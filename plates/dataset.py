"""Data sets: what --data names, as splits of (path, label)."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from pyarrow.compute import index_in  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from tqdm import tqdm

from plates import synthetic
from plates.archives import download, unpack
from plates.config import UserError
from plates.device import num_usable_cpus
from plates.folders import find_data, find_images, look_into, printable, tell_left_out
from plates.images import IMAGE_SUFFIXES, UnreadableImageError
from plates.looks import LOOK, Look
from plates.rules import DATA_KINDS, Difficulty, parse_drawn
from plates.samples import SAMPLES_PER_BATCH, Samples, split_every_sixth
from plates.shards import SPLITS, read_index
from plates.sources import FolderSource, ShardSource, Source, SyntheticSource, synthetic_identity
from plates.storage import Place, place_of
from plates.tables import read_table, split_table

FoundT = TypeVar("FoundT")
MAX_NESTED = 3  # archives, one in another


@dataclass(frozen=True, eq=False)
class Seen:
    """The images of a split as listed, with the digests of those that can be read; and (N,) LOOK."""

    samples: Samples
    looks: np.ndarray


@dataclass(frozen=True)
class Skipped:
    path: str
    split: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Samples by split, in path order or, of shards, as they are stored. Labels of the test split, where there are
    any, are for its score alone; `left_out` tells in one line what was not looked at, if anything."""

    source: Source
    classes: tuple[str, ...]
    train: Samples
    val: Samples
    test: Samples
    left_out: str = ""

    def read_picture(self, path: str) -> np.ndarray:
        """(H, W, 3) uint8, for people. Raises: UnreadableImageError."""
        return self.source.read(path).permute(1, 2, 0).numpy()


def load_dataset(data: str, seed: int, *, needs_train: bool = True, known: tuple[str, ...] = ()) -> Dataset:
    """Lists the data set that --data names; no image is read.

    known: the classes that a test split without training images may have labels of.
    Raises: UserError naming what is missing in it.
    """
    if drawn := parse_drawn(data):
        return list_synthetic(*drawn, seed)
    place = download(data) if data.startswith("kaggle:") else place_of("--data", data)
    left_out: Counter[str] = Counter()
    try:
        dataset = list_place(place, needs_train, known, left_out)
    except UserError as error:
        if data in str(error):
            raise
        raise UserError(f"--data {data}: in {str(error).removeprefix('--data ')}") from error  # unpacked somewhere
    except (OSError, pa.ArrowInvalid) as error:  # a folder that may not be listed, or a store that does not answer
        raise UserError(f"--data {data}: cannot be listed ({error})") from error
    return replace(dataset, left_out=tell_left_out(left_out))


def load_test_split(data: str, seed: int, known: tuple[str, ...] = ()) -> Dataset:
    """The test split alone, for a checkpoint of these classes: test/** of a data set, or every image of a folder."""
    return load_dataset(data, seed, needs_train=False, known=known)


def list_place(place: Place, needs_train: bool, known: tuple[str, ...], left_out: Counter[str]) -> Dataset:
    kind, found = find_data(place, needs_train)
    for _ in range(MAX_NESTED):
        if kind == "archive":
            kind, found = find_data(unpack(found, left_out), needs_train)
    if kind == "table":
        return Dataset(FolderSource(found.parent), *split_table(found, read_table(found), needs_train, known))
    if kind == "shards":
        index = read_index(found)
        located = index.drop_columns(["label", "split"]).sort_by("path").combine_chunks()
        source = ShardSource(found if found.is_dir() else found.parent, located)
        return Dataset(source, *split_table(found, index, needs_train, known))
    if kind == "splits" and (found / "train").is_dir():
        return list_folder(found, left_out)
    if needs_train or kind == "archive":
        raise UserError(f"--data {place}: holds no train/ folder; expected train/CLASS/*.jpg, or give {DATA_KINDS}")
    test = list_test(found / "test" if kind == "splits" else found, found, known, left_out)
    if not test:
        raise UserError(f"--data {place}: holds no images to predict ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return Dataset(FolderSource(found), (), Samples.of(), Samples.of(), test)


def list_folder(root: Place, left_out: Counter[str]) -> Dataset:
    folders, images, _ = look_into(root, left_out)
    left_out["image(s) in no split"] += len(images)
    left_out["other folder(s)"] += sum(folder.name not in SPLITS for folder in folders)
    by_class = images_by_class(root, "train", left_out)
    classes = tuple(by_class)
    if len(classes) < 2:
        raise UserError(f"--data {root}: train/ holds {len(classes)} class folders; at least 2 are needed")
    held_out = [folder.name for folder in folders if SPLITS.get(folder.name) == "val"]
    if len(held_out) > 1:
        raise UserError(f"--data {root}: {' and '.join(held_out)} are names of one split; keep one of them")
    for name, paths in by_class.items():
        if not paths:
            raise UserError(f"--data {root}: train/{name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        if len(paths) < 2 and not held_out:
            raise UserError(f"--data {root}: train/{name} holds 1 image; the split needs at least 2 a class")
    train = label(by_class, classes)
    if held_out:
        by_class = images_by_class(root, held_out[0], left_out)
        unknown = [name for name in by_class if name not in classes]
        if unknown:
            raise UserError(
                f"--data {root}: {held_out[0]}/{unknown[0]} is not a class of train/ ({', '.join(classes)})"
            )
        if not any(by_class.values()):
            raise UserError(f"--data {root}: {held_out[0]}/ holds no images; fill it, or remove it to split train/")
        val = label(by_class, classes)
    else:
        train, val = split_every_sixth(train)
    return Dataset(FolderSource(root), classes, train, val, list_test(root / "test", root, classes, left_out))


def images_by_class(root: Place, split: str, left_out: Counter[str]) -> dict[str, list[str]]:
    folders, images, _ = look_into(root / split, left_out)
    left_out["image(s) in no class folder"] += len(images)
    for child in folders:
        if printable(child.name) != child.name:
            raise UserError(f"--data {root}: {split}/{printable(child.name)}: a class must have a name in UTF-8")
    return {child.name: find_images(child, root, left_out) for child in folders}


def label(by_class: dict[str, list[str]], classes: tuple[str, ...]) -> Samples:
    labels = {path: number for number, name in enumerate(classes) for path in by_class.get(name, [])}
    paths = sorted(labels)
    return Samples.of(paths, [labels[path] for path in paths])


def list_test(folder: Place, root: Place, classes: tuple[str, ...], left_out: Counter[str]) -> Samples:
    """Its images, with labels for their score where each lies in a folder of a class's name."""
    paths = find_images(folder, root, left_out)
    depth, numbers = int(folder != root), {name: number for number, name in enumerate(classes)}
    labels = [numbers.get(path.split("/", depth + 1)[depth]) for path in paths]
    return Samples.of(paths, None if None in labels else labels)


def list_synthetic(num_labelled: int, difficulty: Difficulty, seed: int) -> Dataset:
    """`num_labelled` drawings in train/ with the classes in turn, and as many again in test/."""
    classes = synthetic.CLASSES
    paths = [f"train/{classes[index % len(classes)]}/{index:06d}.png" for index in range(num_labelled)]
    labelled = label({name: paths[number :: len(classes)] for number, name in enumerate(classes)}, classes)
    test = sorted(f"test/{index:06d}.png" for index in range(num_labelled, 2 * num_labelled))
    kept_aside = [int(synthetic_identity(seed, path)[1]) for path in test]
    splits = (*split_every_sixth(labelled), Samples.of(test, kept_aside))
    return Dataset(SyntheticSource(seed, difficulty), classes, *splits)


def row_groups(source: Source, samples: Samples) -> Tensor:
    """(N,) int64: the number of the group that each image is read with, 0 for all where each is read alone."""
    if not isinstance(source, ShardSource):
        return torch.zeros(len(samples), dtype=torch.int64)
    indices = index_in(samples.table["path"], value_set=source.index["path"])
    found = source.index.select(["shard", "row_group"]).take(indices).to_pandas()
    groups = found.groupby(["shard", "row_group"], observed=True).ngroup()
    return torch.from_numpy(groups.to_numpy(np.int64, copy=True))


def in_threads(look: Callable[[str], FoundT], samples: Samples) -> Iterator[FoundT | UnreadableImageError]:
    """What is found at each path in turn, or why it cannot be read."""

    def try_to(path: str) -> FoundT | UnreadableImageError:
        try:
            return look(path)
        except UnreadableImageError as error:
            return error

    # As many as by default, which counts a host's CPUs where its container has a share of them.
    with ThreadPoolExecutor(min(32, num_usable_cpus() + 4)) as pool:
        for batch in samples.table.to_batches(max_chunksize=SAMPLES_PER_BATCH):
            yield from pool.map(try_to, batch["path"].to_pylist())


def check_dataset(
    dataset: Dataset, skip_unreadable: bool, seen: dict[str, Seen] | None = None
) -> tuple[Dataset, list[Skipped]]:
    """Decodes every labelled image once, before anything is trained. Raises: UserError as `leave_out` does.

    seen: where given, takes by split what was seen of the images.

    Returns: the data set of the images that can be read, with their digests, and those that cannot.
    """
    labelled = {"train": dataset.train, "val": dataset.val}
    found, skipped = look_over(labelled, dataset.source.check)
    if seen is not None:
        seen |= found
    checked = {split: found[split].samples for split in labelled}
    return leave_out(replace(dataset, **checked), skipped, skip_unreadable), skipped


def look_over(splits: dict[str, Samples], look: Callable[[str], Look]) -> tuple[dict[str, Seen], list[Skipped]]:
    """What is seen of the images by split, and those that cannot be read."""
    skipped: list[Skipped] = []
    seen = {}
    with tqdm(total=sum(map(len, splits.values())), desc="checking", unit="image") as bar:
        for split, samples in splits.items():
            digests: list[bytes | None] = []
            looks = np.zeros(len(samples), LOOK)
            for index, found in enumerate(in_threads(look, samples)):
                if isinstance(found, UnreadableImageError):
                    digests.append(None)
                    skipped.append(Skipped(samples[index].path, split, str(found)))
                else:
                    digests.append(found.digest)
                    looks[index] = found.kept
                bar.update()
            seen[split] = Seen(samples.with_digests(digests), looks)
    return seen, skipped


def count_classes(samples: Samples, classes: Sequence[str]) -> dict[str, int]:
    """How many of the samples, which all have a label, each class has."""
    return dict(zip(classes, torch.bincount(samples.labels, minlength=len(classes)).tolist(), strict=True))


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
    both = (dataset.train, dataset.val)
    merged = pa.concat_tables([samples.table for samples in both])
    if all(samples.is_in_path_order for samples in both):  # else of shards, to be read as they are stored
        merged = merged.sort_by("path")
    labelled = Samples(merged.combine_chunks())
    return replace(dataset, train=labelled, val=labelled)
