"""What a frozen trunk computes, computed once: rows of features, each known by all that it follows from."""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import torch
from torch import Tensor, nn

from plates import backbones, device, folding, foreground, images, model, readouts, transforms
from plates.backbones import OWN_READOUT
from plates.device import DTYPES, find_batch_size, move, read_behind
from plates.folding import fast_trunk
from plates.images import UnreadableImageError, prefetch
from plates.looks import Look
from plates.model import hash_weights
from plates.readouts import read_out
from plates.samples import Samples
from plates.sources import Source
from plates.store import KEY_TYPE
from plates.timing import Pace
from plates.transforms import EVAL, Preprocessing, cut_background, find_view, make_views, to_input

# Whose code a feature follows from; the last is an extra.
LIBRARIES = ("torch", "torchvision", "timm", "pillow", "torchcodec", "pillow_heif")
Wanted: TypeAlias = tuple[str, Sequence[int]]  # an image's path, and the numbers of its views
Views: TypeAlias = tuple[Tensor, Tensor]  # pictures (V, 3, S, S) uint8 on the device, and which to mirror (V,) bool


@dataclass(frozen=True)
class Drawing:
    """What a view follows from beside its number and its image: the seed, and whether drawn views are turned, too."""

    seed: int
    is_turned: bool = False


def trunk_key(
    trunk: nn.Module, backbone: str, readout: str, preprocessing: Preprocessing, precision: str, device_type: str
) -> str:
    """Hash of what all features of a trunk follow from: weights, preprocessing, precision, and the code that decodes,
    draws and computes."""
    modules = (images, foreground, transforms, model, readouts, folding, backbones, device, sys.modules[__name__])
    described = {
        "code": [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in modules],
        "libraries": [[found.version for found in distributions(name=name)] for name in LIBRARIES],
        "weights": hash_weights(trunk.state_dict()),
        "backbone": backbone,
        "readout": readout,
        "preprocessing": preprocessing.to_dict(),
        "precision": precision,
        "device": device_type,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def row_keys(samples: Samples, views: Sequence[int], drawing: Drawing) -> pa.Array:
    """(N * V,) keys of 16 bytes, the views of each image in turn.

    A symmetry of the image follows from its bytes; another view is drawn from the seed, its number and the path, too.
    """
    drawn = f"/{drawing.seed}{'+turns' * drawing.is_turned}"

    def name_view(digest: bytes, path: str, view: int) -> bytes:
        return digest + (f"/{view}" if view <= EVAL else f"{drawn}/{view}/{path}").encode()

    if list(views) == [EVAL]:
        names = (digest.as_py() + f"/{EVAL}".encode() for digest in samples.table["digest"])
    else:
        columns = (samples.table[name].to_pylist() for name in ("digest", "path"))
        names = (name_view(digest, path, view) for digest, path in zip(*columns, strict=True) for view in views)
    return pa.array((hashlib.blake2b(name, digest_size=16).digest() for name in names), KEY_TYPE)


class FrozenTrunk:
    """The trunk as fast as the device runs it; views of images in, float32 features out."""

    def __init__(
        self,
        trunk: nn.Module,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: str,
        pace: Pace | None = None,
        readout: str = OWN_READOUT,
    ) -> None:
        self.dtype = DTYPES[precision]
        size = preprocessing.image_size
        self.module = fast_trunk(trunk, device, self.dtype, size)
        self.preprocessing = preprocessing
        self.readout = readout
        self.device = device
        self.pace = pace or Pace()
        self.batch_size = find_batch_size(self.module, torch.zeros((3, size, size), dtype=self.dtype, device=device))

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, is_flipped: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 on the device, and (B,) bool which of them to mirror, to (B, F) float32 there."""
        batch = to_input(pictures, move(is_flipped, self.device), self.preprocessing)
        return read_out(self.module, batch.to(self.dtype), self.readout).float()


def compute_features(
    trunk: FrozenTrunk,
    source: Source,
    wanted: Iterable[Wanted],
    drawing: Drawing,
    errors: dict[str, str] | None = None,
    looks: dict[str, Look] | None = None,
) -> Iterator[Tensor]:
    """Yields (V, F) features on the CPU of each image in turn.

    Args:
        errors: where given, takes the reasons why images cannot be read; such an image yields no row, (0, F).
        looks: where given, takes what is seen of each image before its features are there.
    """

    def load(one: Wanted) -> Views:
        """A thread ahead of the trunk decodes an image and copies it, once each; its views are made on the device."""
        path, views = one
        try:
            if looks is None:
                image = source.read(path)
            else:
                image, looks[path] = source.read_and_look(path)
            image = cut_background(move(image, trunk.device), trunk.preprocessing)
        except UnreadableImageError as error:
            if errors is None:
                raise
            errors[path] = str(error)
            return no_views(trunk.preprocessing, trunk.device)
        return make_numbered(image, path, views, drawing, trunk.preprocessing)

    listed = iter(wanted)
    first = next(listed, None)
    if first is not None:
        num_ahead = 2 + trunk.batch_size // len(first[1])
        yield from forward_all(trunk, prefetch(load, chain([first], listed), num_ahead, trunk.device))


def make_numbered(
    image: Tensor, path: str, numbers: Sequence[int], drawing: Drawing, preprocessing: Preprocessing
) -> Views:
    """The views of these numbers, on the image's device."""
    views = [
        find_view(preprocessing, number, drawing.seed, path, *image.shape[1:], is_turned=drawing.is_turned)
        for number in numbers
    ]
    return make_views(image, views, preprocessing), torch.tensor([view.is_flipped for view in views])


def no_views(preprocessing: Preprocessing, device: torch.device) -> Views:
    size = preprocessing.image_size
    return torch.empty((0, 3, size, size), dtype=torch.uint8, device=device), torch.empty(0, dtype=torch.bool)


def forward_all(trunk: FrozenTrunk, loaded: Iterable[Views]) -> Iterator[Tensor]:
    """Runs the views of images through the trunk in full batches and yields each image's (V, F) rows again."""
    counts: deque[int] = deque()
    computed = torch.empty(0)  # rows that wait for the rest of their image
    for rows in read_behind(trunk(*batch) for batch in full_batches(loaded, trunk.batch_size, counts)):
        trunk.pace.count(len(rows))
        computed = torch.cat([computed, rows]) if len(computed) else rows
        while counts and len(computed) >= counts[0]:
            count = counts.popleft()
            yield computed[:count]
            computed = computed[count:]
    yield from (computed for _ in counts)  # without views


def full_batches(loaded: Iterable[Views], batch_size: int, counts: deque[int]) -> Iterator[Views]:
    """Joins and cuts views of images, one or more, into batches; notes in `counts` how many each image has."""
    waiting: list[Views] = []
    for views in loaded:
        waiting.append(views)
        counts.append(len(views[0]))
        while sum(len(pictures) for pictures, _ in waiting) >= batch_size:
            pictures, flips = map(torch.cat, zip(*waiting, strict=True))
            yield pictures[:batch_size], flips[:batch_size]
            waiting = [(pictures[batch_size:], flips[batch_size:])]
    pictures, flips = map(torch.cat, zip(*waiting, strict=True))
    if len(pictures):
        yield pictures, flips
