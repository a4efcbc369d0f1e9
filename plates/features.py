"""What a frozen trunk computes, computed once: shares of (view, image) pairs, stored by content."""

import hashlib
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from plates.dataset import Sample, Source, prefetch
from plates.model import fast_trunk
from plates.rundir import write_whole
from plates.storage import Place, place_of, remove_tree
from plates.transforms import Preprocessing, crop, draw_view, flip, move, normalize, resize

FORMAT = 1  # of the stored features; a change of what is computed here changes it
VIEWS_PER_FORWARD = 32
SECONDS_PER_PART = 10.0  # of computing that a worker may lose


@dataclass(frozen=True)
class Features:
    """`train`: (V, N, F) float32, a layer a view; `val`: (M, F) float32; in the order of the splits."""

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
    """Stored features, memory-mapped; None where there are none, or not all rows."""
    if not path.exists():
        return None
    column = read_columns(path)
    if column is None:
        return None
    column = column["feature"].combine_chunks()
    rows = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy()).view(len(column), -1)
    if len(rows) != num_views * num_train + num_val:
        return None
    cut = num_views * num_train
    return Features(rows[:cut].view(num_views, num_train, -1), rows[cut:])


def read_columns(path: Place) -> pa.Table | None:
    """A whole Parquet file, memory-mapped on a disk; None where it is damaged."""
    try:
        if isinstance(path, Path):
            return pq.read_table(path, memory_map=True)
        return pq.read_table(pa.BufferReader(path.read_bytes()))
    except (OSError, pa.ArrowInvalid):
        return None


class Parts:
    """Rows of features that workers have finished, stored as they go: a run that is cut off computes only the rest.

    A row is the (V, F) features of one image, known by its number in the run.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self.pending: dict[int, Tensor] = {}
        self.saved_at = time.monotonic()

    def load(self) -> dict[int, Tensor]:
        """The rows that can be seen from here; each (V * F,) float32."""
        rows: dict[int, Tensor] = {}
        names = sorted(self.folder.iterdir()) if self.folder.exists() else []
        for path in names:
            table = read_columns(path) if path.suffix == ".parquet" and not path.name.startswith(".") else None
            if table is not None:
                rows |= {
                    int(index.as_py()): torch.from_numpy(row.values.to_numpy().copy())
                    for index, row in zip(table["index"], table["feature"], strict=True)
                }
        return rows

    def add(self, index: int, row: Tensor) -> None:
        """Stores a finished row, with those before it, when there is enough that could be lost."""
        self.pending[index] = row
        if time.monotonic() - self.saved_at >= SECONDS_PER_PART:
            rows = [row.reshape(-1).numpy() for row in self.pending.values()]
            table = pa.table({"index": list(self.pending), "feature": pa.array(rows, pa.list_(pa.float32()))})
            write_whole(self.folder / f"{uuid.uuid4().hex}.parquet", lambda file: pq.write_table(table, file))
            self.pending, self.saved_at = {}, time.monotonic()

    def remove(self) -> None:
        remove_tree(self.folder)


def save_features(path: Place, features: Features) -> None:
    """One Parquet file of float32 lists: the views' layers in turn, then the validation split."""
    num_features = features.val.shape[1]
    rows = torch.cat([features.train.reshape(-1, num_features), features.val])
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.numpy().reshape(-1)), num_features)
    table = pa.table({"feature": column})
    write_whole(path, lambda file: pq.write_table(table, file, compression="none"))


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
        while counts and sum(map(len, rows)) >= counts[0]:
            whole, count = torch.cat(rows), counts.popleft()
            rows[:] = [whole[count:]]
            yield whole[:count]

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
