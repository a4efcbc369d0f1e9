"""What a frozen trunk computes, computed once: shares of (view, image) pairs, stored by content."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pyarrow as pa
import torch
from torch import Tensor, nn

from plates import backbones, device, folding, images, model, transforms
from plates.dataset import Sample, Source
from plates.device import DTYPES, find_batch_size, move, read_behind
from plates.folding import fast_trunk
from plates.images import UnreadableImageError, prefetch
from plates.model import hash_weights
from plates.rundir import write_whole
from plates.storage import Place, place_of
from plates.timing import Pace
from plates.transforms import Preprocessing, View, draw_view, eval_view, make_views, to_input

# Whose code a feature follows from; the last is an extra.
LIBRARIES = ("torch", "torchvision", "timm", "pillow", "torchcodec", "pillow_heif")


@dataclass(frozen=True)
class Features:
    """`train`: (V, N, F) float32, a layer a view; `val`: (M, F) float32; in the splits' order, memory-mapped."""

    train: Tensor
    val: Tensor


def features_key(
    digests: dict[str, str],
    splits: tuple[Sequence[Sample], Sequence[Sample]],
    weights: dict[str, Tensor],
    preprocessing: Preprocessing,
    described: dict[str, Any],
) -> str:
    """Hash of all that the features follow from: contents, paths, weights, preprocessing, seed, views, precision, and
    the code that decodes, draws and computes."""
    whole = {
        "code": [
            hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
            for module in (images, transforms, model, folding, backbones, device, sys.modules[__name__])
        ],
        "libraries": [[found.version for found in distributions(name=name)] for name in LIBRARIES],
        "images": [[(sample.path, digests[sample.path]) for sample in samples] for samples in splits],
        "weights": hash_weights(weights),
        "preprocessing": preprocessing.to_dict(),
        **described,
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def cache_root() -> Place:
    """PLATES_CACHE, a path or a URI, else the user's cache folder; absolute, since workers run elsewhere."""
    return place_of("PLATES_CACHE", os.environ.get("PLATES_CACHE") or platformdirs.user_cache_dir("plates"))


def load_features(path: Place, num_views: int, num_train: int, num_val: int) -> Features | None:
    """Stored features; None where there are none, or not all rows."""
    try:
        rows = map_rows(path)
    except (OSError, ValueError, EOFError):  # none, or a damaged file
        return None
    if len(rows) != num_views * num_train + num_val:
        return None
    return Features(*map(torch.from_numpy, split_rows(rows, num_views, num_train)))


def map_rows(path: Place) -> np.ndarray:
    """A stored array, memory-mapped, so that the system can take its memory back; of a URI, a passing copy is."""
    if isinstance(path, Path):
        return np.load(path, mmap_mode="c")  # copy on write, since torch knows no read-only tensors
    with tempfile.NamedTemporaryFile() as copy, path.open() as stored:
        shutil.copyfileobj(stored, copy)
        copy.flush()
        return np.load(copy.name, mmap_mode="c")


def split_rows(rows: np.ndarray, num_views: int, num_train: int) -> tuple[np.ndarray, np.ndarray]:
    """(V * N + M, F), the views' layers in turn and then the validation split, as (V, N, F) and (M, F)."""
    cut = num_views * num_train
    return rows[:cut].reshape(num_views, num_train, -1), rows[cut:]


def save_features(path: Place, tables: Iterable[pa.Table], num_views: int, num_train: int, num_val: int) -> None:
    """One array on the disk, filled from tables of parts as they come.

    Raises: FileNotFoundError where the tables do not hold all images.
    """
    missing = set(range(num_train + num_val))

    def fill(file: Path) -> None:
        train = val = np.empty(0, np.float32)
        for table in tables:
            column = table["feature"].combine_chunks()
            values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
            if not train.size:
                num_features = offsets[1] // (num_views if table["index"][0].as_py() < num_train else 1)
                shape = (num_views * num_train + num_val, int(num_features))
                rows = np.lib.format.open_memmap(file, "w+", np.float32, shape)
                reserve(file, rows.offset)
                train, val = split_rows(rows, num_views, num_train)
            for index, start, end in zip(table["index"].to_pylist(), offsets, offsets[1:], strict=False):
                if index < num_train:
                    train[:, index] = values[start:end].reshape(num_views, -1)
                else:
                    val[index - num_train] = values[start:end]
                missing.discard(index)
        if missing:
            raise FileNotFoundError(f"{path}: the features of {len(missing)} images are missing; run again")

    write_whole(path, fill)


def reserve(file: Path, start: int) -> None:
    """Takes the room of a sparse file from `start` on: a full disk is an error here, a crash in a mapped file."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), start, size - start)
        else:  # macOS
            opened.seek(start)
            while left := size - opened.tell():
                opened.write(bytes(min(left, 1 << 20)))


class FrozenTrunk:
    """The trunk as fast as the device runs it; views of images in, float32 features out."""

    def __init__(
        self,
        trunk: nn.Module,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: str,
        pace: Pace | None = None,
    ) -> None:
        self.dtype = DTYPES[precision]
        size = preprocessing.image_size
        self.module = fast_trunk(trunk, device, self.dtype, size)
        self.preprocessing = preprocessing
        self.device = device
        self.pace = pace or Pace()
        self.batch_size = find_batch_size(self.module, torch.zeros((3, size, size), dtype=self.dtype, device=device))

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, is_flipped: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 on the device, and (B,) bool which of them to mirror, to (B, F) float32 there."""
        batch = to_input(pictures, move(is_flipped, self.device), self.preprocessing)
        return self.module(batch.to(self.dtype)).float()


def compute_views(
    trunk: FrozenTrunk, source: Source, samples: Iterable[Sample], seed: int, num_views: int
) -> Iterator[Tensor]:
    """Yields (V, F) features on the CPU of V drawn views of each sample in turn."""

    def draw(path: str, height: int, width: int) -> list[View]:
        return [draw_view(seed, index, path, height, width) for index in range(num_views)]

    paths = (sample.path for sample in samples)
    return forward_all(trunk, load_views(trunk, source, paths, draw, num_views))


def compute_eval(
    trunk: FrozenTrunk, source: Source, paths: Iterable[str], errors: dict[str, str] | None = None
) -> Iterator[Tensor]:
    """Yields (1, F) features on the CPU of the one eval view of each image in turn.

    errors: where given, takes the reasons why images cannot be read; such an image yields no row, (0, F).
    """

    def choose(_: str, height: int, width: int) -> list[View]:
        return [eval_view(trunk.preprocessing, height, width)]

    return forward_all(trunk, load_views(trunk, source, paths, choose, 1, errors))


def load_views(
    trunk: FrozenTrunk,
    source: Source,
    paths: Iterable[str],
    choose: Callable[[str, int, int], list[View]],
    num_views: int,
    errors: dict[str, str] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures (V, 3, S, S) uint8 on the device, and which to mirror (V,), of each image in turn.

    A thread ahead of the trunk decodes an image once and copies it to the device once; all its views are made there,
    and it is dropped.
    """
    size = trunk.preprocessing.image_size

    def load(path: str) -> tuple[Tensor, Tensor]:
        try:
            image = move(source.read(path), trunk.device)
        except UnreadableImageError as error:
            if errors is None:
                raise
            errors[path] = str(error)
            return torch.empty((0, 3, size, size), dtype=torch.uint8, device=trunk.device), torch.empty(0) > 0
        views = choose(path, *image.shape[1:])
        return make_views(image, views, trunk.preprocessing), torch.tensor([view.is_flipped for view in views])

    return prefetch(load, paths, num_ahead=2 + trunk.batch_size // num_views, device=trunk.device)


def forward_all(trunk: FrozenTrunk, loaded: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Runs pictures (V, 3, S, S) through the trunk in full batches and yields each image's (V, F) rows again."""
    counts: deque[int] = deque()
    computed = torch.empty(0)  # rows that wait for the rest of their image
    for rows in read_behind(trunk(*batch) for batch in full_batches(loaded, trunk.batch_size, counts)):
        trunk.pace.count(len(rows))
        computed, start = torch.cat([computed, rows]) if len(computed) else rows, 0
        while counts and len(computed) - start >= counts[0]:
            yield computed[start : start + counts[0]]
            start += counts.popleft()
        computed = computed[start:]
    yield from (computed for _ in counts)  # without views


def full_batches(
    loaded: Iterable[tuple[Tensor, Tensor]], batch_size: int, counts: deque[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Joins and cuts pictures and flips into batches, the last one smaller; notes in `counts` each image's views."""
    pictures: list[Tensor] = []
    flips: list[Tensor] = []
    for views, is_flipped in loaded:
        pictures.append(views)
        flips.append(is_flipped)
        counts.append(len(views))
        while sum(map(len, pictures)) >= batch_size:
            whole, flipped = torch.cat(pictures), torch.cat(flips)
            yield whole[:batch_size], flipped[:batch_size]
            pictures, flips = [whole[batch_size:]], [flipped[batch_size:]]
    if sum(map(len, pictures)):
        yield torch.cat(pictures), torch.cat(flips)
