"""Sources of images to splits of (path, label), and the reading of one image."""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

import joblib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from plates import synthetic
from plates.config import UserError, is_drawn
from plates.folders import find_images, find_root, listing, look_into, printable
from plates.images import IMAGE_SUFFIXES, UnreadableImageError, decode
from plates.shards import ShardSource, is_prepared, read_index
from plates.storage import Place, place_of

VALIDATION_EVERY = 6  # the published split: every sixth image
DEFAULT_NUM_SYNTHETIC = 40  # as many labelled images as the published data set


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: its path as the user knows it, and its class index (None in the test split)."""

    path: str
    label: int | None = None


@dataclass(frozen=True)
class Skipped:
    path: str
    split: str
    reason: str


class Source(Protocol):
    """Where the pixels are; small, and sent to every worker."""

    def read(self, path: str) -> Tensor:
        """(3, H, W) uint8 RGB. Raises: UnreadableImageError."""
        ...

    def read_bytes(self, path: str) -> bytes:
        """The encoded image. Raises: UnreadableImageError."""
        ...

    def check(self, path: str) -> str:
        """Makes sure that `read` will succeed; the hash of what it decodes. Raises: UnreadableImageError."""
        ...


@dataclass(frozen=True)
class FolderSource:
    root: Place

    def read(self, path: str) -> Tensor:
        return decode(self.read_bytes(path))

    def check(self, path: str) -> str:
        data = self.read_bytes(path)
        decode(data)
        return hashlib.sha256(data).hexdigest()

    def read_bytes(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and "\\x" in path:  # as find_images shows it
                raise UnreadableImageError("its name is not UTF-8; rename it") from error
            raise UnreadableImageError(error.strerror or str(error)) from error


@dataclass(frozen=True)
class SyntheticSource:
    seed: int

    def read(self, path: str) -> Tensor:
        index, is_dirty = synthetic_identity(self.seed, path)
        return torch.from_numpy(synthetic.draw_plate(self.seed, index, is_dirty)).permute(2, 0, 1)

    def read_bytes(self, path: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.read(path).permute(1, 2, 0).numpy()).save(buffer, "PNG")
        return buffer.getvalue()

    def check(self, path: str) -> str:
        """A drawing follows from the drawing program, its libraries, the seed and the path; nothing is drawn here."""
        program = Path(synthetic.__file__).read_bytes()
        key = f"{Image.__version__}/{np.__version__}/{self.seed}/{path}"
        return hashlib.sha256(program + key.encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Samples by split, in path order. `true_test_labels` holds what a drawn test split keeps aside."""

    source: Source
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    true_test_labels: dict[str, int] = field(default_factory=dict)

    def read_picture(self, path: str) -> np.ndarray:
        """(H, W, 3) uint8, for people. Raises: UnreadableImageError."""
        return self.source.read(path).permute(1, 2, 0).numpy()


def load_dataset(data: str, seed: int) -> Dataset:
    """Lists the data set that --data names; no image is read.

    Raises: UserError naming the folder and what is missing in it.
    """
    if is_drawn(data):
        num_labelled = int(data.partition(":")[2] or DEFAULT_NUM_SYNTHETIC)
        return list_synthetic(num_labelled, seed)
    folder = place_of("--data", data)
    with listing(data):
        if is_prepared(folder):
            return list_prepared(folder)
        root = find_root(folder)
        if root is None or not (root / "train").is_dir():
            raise UserError(f"--data {folder}: holds no train/ folder; expected train/CLASS/*.jpg")
        return list_folder(root)


def load_test_split(data: str, seed: int) -> Dataset:
    """The test split alone, for a checkpoint: test/** of a data set, or every image of a plain folder."""
    if is_drawn(data):
        return load_dataset(data, seed)
    folder = place_of("--data", data)
    with listing(data):
        if is_prepared(folder):
            return list_prepared(folder)
        root = find_root(folder)
        if root and (root / "train").is_dir():
            return list_folder(root)
        top = root or folder
        test = tuple(Sample(path) for path in find_images(top / "test" if root else top, top))
    if not test:
        raise UserError(f"--data {data}: holds no images to predict ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return Dataset(FolderSource(top), (), (), (), test)


def list_folder(root: Place) -> Dataset:
    by_class = images_by_class(root, "train")
    classes = tuple(by_class)
    if len(classes) < 2:
        raise UserError(f"--data {root}: train/ holds {len(classes)} class folders; at least 2 are needed")
    for name, paths in by_class.items():
        if not paths:
            raise UserError(f"--data {root}: train/{name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    test = tuple(Sample(path) for path in find_images(root / "test", root))
    if (root / "val").is_dir():
        train, val = by_class, images_by_class(root, "val")
        unknown = [name for name in val if name not in by_class]
        if unknown:
            raise UserError(f"--data {root}: val/{unknown[0]} is not a class of train/ ({', '.join(classes)})")
        if not any(val.values()):
            raise UserError(f"--data {root}: val/ holds no images; fill it, or remove it to split train/")
    else:
        for name, paths in by_class.items():
            if len(paths) < 2:
                raise UserError(f"--data {root}: train/{name} holds 1 image; the split needs at least 2 a class")
        train, val = split_every_sixth(by_class)
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


def label(by_class: dict[str, list[str]], classes: tuple[str, ...]) -> tuple[Sample, ...]:
    samples = [Sample(path, classes.index(name)) for name, paths in by_class.items() for path in paths]
    return tuple(sorted(samples, key=lambda sample: sample.path))


def list_prepared(folder: Place) -> Dataset:
    """What `plates prepare` packed, with its splits as they were made then."""
    classes, rows = read_index(folder)
    by_split: dict[str, list[Sample]] = defaultdict(list)
    true_labels: dict[str, int] = {}
    for path, name, split in sorted(rows[["path", "label", "split"]].itertuples(index=False, name=None)):
        number = classes.index(name) if isinstance(name, str) else None
        by_split[split].append(Sample(path, number if split != "test" else None))
        if split == "test" and number is not None:
            true_labels[path] = number
    train, val, test = (tuple(by_split[split]) for split in ("train", "val", "test"))
    return Dataset(ShardSource.of(folder, rows), classes, train, val, test, true_labels)


def list_synthetic(num_labelled: int, seed: int) -> Dataset:
    """`num_labelled` drawings in train/ with the classes in turn, and as many again, unlabelled, in test/."""
    classes = synthetic.CLASSES
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    for index in range(num_labelled):
        name = classes[index % len(classes)]
        by_class[name].append(f"train/{name}/{index:06d}.png")
    train, val = split_every_sixth(by_class)
    test = tuple(Sample(f"test/{index:06d}.png") for index in range(num_labelled, 2 * num_labelled))
    true_labels = {sample.path: int(synthetic_identity(seed, sample.path)[1]) for sample in test}
    return Dataset(SyntheticSource(seed), classes, label(train, classes), label(val, classes), test, true_labels)


def synthetic_identity(seed: int, path: str) -> tuple[int, bool]:
    """(index, is_dirty) of a drawing; a test drawing's class is drawn from its index, not told by its path."""
    pure = PurePosixPath(path)
    index = int(pure.stem)
    if pure.parts[0] == "test":
        return index, bool(np.random.default_rng([seed, index, 1]).integers(2))
    return index, pure.parts[1] == "dirty"


def row_groups(source: Source, samples: Sequence[Sample]) -> Tensor:
    """(N,) int64: the number of the group that each image is read with, 0 for all where each is read alone."""
    if not isinstance(source, ShardSource):
        return torch.zeros(len(samples), dtype=torch.int64)
    numbers: dict[tuple[str, int], int] = {}
    return torch.tensor(
        [numbers.setdefault(source.rows[s.path][:2], len(numbers)) for s in samples], dtype=torch.int64
    )


def check_samples(source: Source, split: str, samples: Sequence[Sample]) -> Iterator[str | Skipped]:
    """Decodes each image once, in threads, and yields its content hash, or why it cannot be read."""

    def check(sample: Sample) -> str | Skipped:
        try:
            return source.check(sample.path)
        except UnreadableImageError as error:
            return Skipped(sample.path, split, str(error))

    # As many as by default, which counts a host's CPUs where its container has a share of them.
    with ThreadPoolExecutor(min(32, joblib.cpu_count() + 4)) as pool:
        yield from pool.map(check, samples)


def check_dataset(dataset: Dataset, skip_unreadable: bool) -> tuple[Dataset, list[Skipped], dict[str, str]]:
    """Decodes every labelled image once, before anything is trained.

    Returns: the data set of the images that can be read, those that cannot, and content hashes by path.

    Raises: UserError as `leave_out` does.
    """
    skipped, digests = [], {}
    labelled = [("train", dataset.train), ("val", dataset.val)]
    with tqdm(total=len(dataset.train) + len(dataset.val), desc="checking", unit="image") as bar:
        for split, samples in labelled:
            for sample, outcome in zip(samples, check_samples(dataset.source, split, samples), strict=True):
                bar.update()
                if isinstance(outcome, Skipped):
                    skipped.append(outcome)
                else:
                    digests[sample.path] = outcome
    return leave_out(dataset, skipped, skip_unreadable), skipped, digests


def leave_out(dataset: Dataset, skipped: Sequence[Skipped], skip_unreadable: bool) -> Dataset:
    """The data set without labelled images that cannot be read.

    Raises: UserError naming them, unless they are to be skipped; or where skipping leaves a class without training
        images, or the validation split empty.
    """
    if skipped and not skip_unreadable:
        named = "; ".join(f"{item.path}: {item.reason}" for item in skipped[:5])
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise UserError(
            f"--data: {len(skipped)} images cannot be read ({named}{more}); mend them, or pass --skip-unreadable"
        )
    unreadable = {item.path for item in skipped}
    train = tuple(sample for sample in dataset.train if sample.path not in unreadable)
    val = tuple(sample for sample in dataset.val if sample.path not in unreadable)
    counts = Counter(sample.label for sample in train)
    for index, name in enumerate(dataset.classes):
        if not counts[index]:
            raise UserError(f"--data: no image of class {name} in the training split can be read")
    if not val:
        raise UserError("--data: no image of the validation split can be read")
    return replace(dataset, train=train, val=val)


def merge_labelled(dataset: Dataset) -> Dataset:
    """Both splits with all labelled images: cross-validation draws its own splits."""
    labelled = tuple(sorted((*dataset.train, *dataset.val), key=lambda sample: sample.path))
    return replace(dataset, train=labelled, val=labelled)


def image_ids(paths: Iterable[str]) -> list[str]:
    """The stem of each path; where stems collide, the path without suffix; where those do, the path."""
    listed = list(paths)
    ids = [PurePosixPath(path).stem for path in listed]
    for longer in (lambda path: PurePosixPath(path).with_suffix("").as_posix(), lambda path: path):
        places = defaultdict(list)
        for place, name in enumerate(ids):
            places[name].append(place)
        for group in places.values():
            if len(group) > 1:
                for place in group:
                    ids[place] = longer(listed[place])
    return ids
