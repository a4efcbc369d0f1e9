"""What a frozen trunk computes, computed once: shares of (view, image) pairs, stored by content."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pyarrow as pa
import torch
from torch import Tensor, nn

from plates import images, model, transforms
from plates.dataset import Sample, Source
from plates.images import prefetch
from plates.model import fast_trunk, hash_weights
from plates.rundir import write_whole
from plates.storage import Place, place_of
from plates.timing import Pace
from plates.transforms import Preprocessing, crop, draw_view, flip, move, normalize, resize

# Whose code a feature follows from; the last is an extra.
LIBRARIES = ("torch", "torchvision", "timm", "pillow", "torchcodec", "pillow_heif")
VIEWS_PER_FORWARD = 32


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
            for module in (images, transforms, model, sys.modules[__name__])
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
        dtype: torch.dtype,
        pace: Pace | None = None,
    ) -> None:
        self.module = fast_trunk(trunk, device, dtype)
        self.preprocessing = preprocessing
        self.device = device
        self.dtype = dtype
        self.pace = pace or Pace()

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, is_flipped: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) uint8, and (B,) bool which of them to mirror, to (B, F) float32 on the device."""
        batch = move(pictures, self.device)
        if is_flipped is not None:
            batch = flip(batch, move(is_flipped, self.device))
        return self.module(normalize(batch, self.preprocessing).to(self.dtype)).float()


def compute_views(
    trunk: FrozenTrunk, source: Source, samples: Sequence[Sample], seed: int, num_views: int
) -> Iterator[Tensor]:
    """Yields (V, F) features on the CPU for each sample in turn.

    Each image is decoded once, by a thread ahead of the trunk; all its views are made, and it is dropped.
    """
    size = trunk.preprocessing.image_size

    def load(sample: Sample) -> tuple[Tensor, Tensor]:
        image = source.read(sample.path)
        views = [draw_view(seed, index, sample.path, *image.shape[1:]) for index in range(num_views)]
        pictures = torch.stack([crop(image, view, size) for view in views])
        return pictures, torch.tensor([view.is_flipped for view in views])

    yield from forward_all(
        trunk, prefetch(load, samples, num_ahead=2 + VIEWS_PER_FORWARD // num_views, device=trunk.device)
    )


def compute_eval(trunk: FrozenTrunk, source: Source, samples: Sequence[Sample]) -> Iterator[Tensor]:
    """Yields (1, F) features on the CPU of the one eval view of each sample in turn."""
    size = trunk.preprocessing.image_size

    def load(sample: Sample) -> tuple[Tensor, Tensor]:
        return resize(source.read(sample.path), size)[None], torch.zeros(1, dtype=torch.bool)

    yield from forward_all(trunk, prefetch(load, samples, num_ahead=2 + VIEWS_PER_FORWARD, device=trunk.device))


def forward_all(trunk: FrozenTrunk, loaded: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Runs pictures (V, 3, S, S) through the trunk in full batches and yields each image's (V, F) rows again."""
    pictures: list[Tensor] = []  # waiting for a full batch
    flips: list[Tensor] = []
    rows: list[Tensor] = []  # computed, waiting for the rest of their image
    counts: deque[int] = deque()

    def forward(num_views: int) -> None:
        whole, is_flipped = torch.cat(pictures), torch.cat(flips)
        rows.append(trunk(whole[:num_views], is_flipped[:num_views]).cpu())
        trunk.pace.count(len(rows[-1]))
        pictures[:], flips[:] = [whole[num_views:]], [is_flipped[num_views:]]

    def finished() -> Iterator[Tensor]:
        whole, start = torch.cat(rows), 0
        while counts and len(whole) - start >= counts[0]:
            yield whole[start : start + counts[0]]
            start += counts.popleft()
        rows[:] = [whole[start:]]

    for views, is_flipped in loaded:
        pictures.append(views)
        flips.append(is_flipped)
        counts.append(len(views))
        while sum(map(len, pictures)) >= VIEWS_PER_FORWARD:
            forward(VIEWS_PER_FORWARD)
            yield from finished()
    if sum(map(len, pictures)):
        forward(VIEWS_PER_FORWARD)
        yield from finished()
