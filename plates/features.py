"""What a frozen trunk computes, computed once: shares of (view, image) pairs, stored by content."""

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from plates.dataset import Sample, Source
from plates.images import prefetch
from plates.model import fast_trunk
from plates.rundir import write_whole
from plates.storage import Place, place_of, remove_tree
from plates.transforms import Preprocessing, crop, draw_view, flip, move, normalize, resize

FORMAT = 3  # of the stored features; a change of what is computed here changes it
VIEWS_PER_FORWARD = 32
SECONDS_PER_PART = 10.0  # of computing that a worker may lose
BYTES_PER_PART = 64 << 20  # of features that a worker holds


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
    """Hash of all that the features follow from: contents, paths, weights, preprocessing, seed, views, precision."""
    state = hashlib.sha256()
    for name, value in weights.items():
        state.update(name.encode())
        state.update(value.contiguous().numpy().tobytes())
    whole = {
        "format": FORMAT,
        "images": [[(sample.path, digests[sample.path]) for sample in samples] for samples in splits],
        "weights": state.hexdigest(),
        "preprocessing": preprocessing.to_dict(),
        "torch": torch.__version__,
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
                with file.open("r+b") as reserved:  # a disk that fills up is an error here, a crash in a mapped file
                    os.posix_fallocate(reserved.fileno(), 0, file.stat().st_size)
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


class Parts:
    """Rows of features that workers have finished, stored as they go: a run that is cut off computes only the rest,
    and none holds them all in memory.

    A row is the (V, F) features of one image, known by its number in the run; a part is a table of some of them.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self.places: list[Place] = []  # of this worker's
        self.pending: dict[int, Tensor] = {}
        self.num_pending_bytes = 0
        self.saved_at = time.monotonic()

    def find(self) -> dict[Place, list[int]]:
        """The parts of a run cut off that can be seen from here, and the images that they hold."""
        names = sorted(self.folder.iterdir()) if self.folder.exists() else []
        found = {}
        for place in names:
            if place.suffix == ".parquet" and not place.name.startswith("."):
                table = read_part(place, ["index"])
                found |= {place: table["index"].to_pylist()} if table is not None else {}
        return found

    def add(self, index: int, row: Tensor) -> None:
        """Takes a finished row, and stores it with those before it when there is enough that could be lost."""
        self.pending[index] = row
        self.num_pending_bytes += row.nbytes
        if time.monotonic() - self.saved_at >= SECONDS_PER_PART or self.num_pending_bytes >= BYTES_PER_PART:
            place, table = self.folder / f"{uuid.uuid4().hex}.parquet", self.pending_table()
            write_whole(place, lambda file: pq.write_table(table, file))
            self.places.append(place)
            self.pending, self.num_pending_bytes, self.saved_at = {}, 0, time.monotonic()

    def pending_table(self) -> pa.Table:
        rows = [row.reshape(-1).numpy() for row in self.pending.values()]
        indices = pa.array(list(self.pending), pa.int64())
        return pa.table({"index": indices, "feature": pa.array(rows, pa.list_(pa.float32()))})

    def remove(self) -> None:
        remove_tree(self.folder)


def read_part(place: Place, columns: list[str] | None = None) -> pa.Table | None:
    """None where it is damaged, or gone, since another run of the same features has finished."""
    try:
        with pq.ParquetFile(place.open("rb")) as file:
            return file.read(columns)
    except (OSError, pa.ArrowInvalid):
        return None


class FrozenTrunk:
    """The trunk as fast as the device runs it; views of images in, float32 features out."""

    def __init__(
        self, trunk: nn.Module, preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.module = fast_trunk(trunk, device, dtype)
        self.preprocessing = preprocessing
        self.device = device
        self.dtype = dtype

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
