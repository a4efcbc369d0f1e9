"""Where the pixels of a data set are: folders of images, Parquet shards, drawings."""

import bisect
import functools
import hashlib
import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from plates import synthetic
from plates.images import UnreadableImageError, decode, is_stored_rotated
from plates.looks import Look, look_at
from plates.rules import Difficulty
from plates.shards import row_group
from plates.storage import Place


class Source(ABC):
    """Where the pixels are; small, and sent to every worker. All methods raise UnreadableImageError."""

    is_decoded_in_check: ClassVar[bool] = False

    @abstractmethod
    def read_bytes(self, path: str) -> bytes:
        """The encoded image."""

    @abstractmethod
    def digest(self, path: str) -> bytes:
        """The SHA-256 of what `read` decodes, 32 bytes."""

    def check(self, path: str) -> Look:
        """What is seen of it, or its digest alone, once it is sure that `read` will succeed."""
        return self.read_and_look(path)[1] if self.is_decoded_in_check else Look(self.digest(path))

    def read_and_look(self, path: str) -> tuple[Tensor, Look]:
        data = self.read_bytes(path)
        image = decode(data)
        return image, look_at(hashlib.sha256(data).digest(), image, is_stored_rotated(data))

    def read(self, path: str) -> Tensor:
        """(3, H, W) uint8 RGB."""
        return decode(self.read_bytes(path))


@dataclass(frozen=True)
class FolderSource(Source):
    root: Place
    is_decoded_in_check = True

    def read_bytes(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and "\\x" in path:  # as find_images shows it
                raise UnreadableImageError("its name is not UTF-8; rename it") from error
            raise UnreadableImageError(error.strerror or str(error)) from error

    def digest(self, path: str) -> bytes:
        return hashlib.sha256(self.read_bytes(path)).digest()


@dataclass(frozen=True)
class ShardSource(Source):
    """Images of Parquet shards, found in the index that the driver reads once.

    `index`: a row an image, in path order: path, digest (32 bytes or null), shard, row_group and row.
    """

    root: Place
    index: pa.Table

    def find(self, path: str) -> dict[str, Any]:
        index = bisect.bisect_left(self.index["path"].chunk(0), path, key=lambda scalar: scalar.as_py())
        return {name: self.index[name][index].as_py() for name in self.index.column_names}

    def read_bytes(self, path: str) -> bytes:
        row = self.find(path)
        try:
            image = row_group(self.root / row["shard"], row["row_group"]).read()[row["row"]].as_py()
        except (OSError, pa.ArrowInvalid) as error:
            raise UnreadableImageError(f"{row['shard']}: {error}") from error
        if not image or image["bytes"] is None:  # as `datasets` writes the images of a local folder
            raise UnreadableImageError(f"{row['shard']} holds its name, and not its bytes")
        return image["bytes"]

    def digest(self, path: str) -> bytes:
        """As `plates prepare` stored it when it had decoded the image; by reading, where another wrote the shards."""
        return self.find(path)["digest"] or hashlib.sha256(self.read_bytes(path)).digest()

    def check(self, path: str) -> Look:
        digest = self.find(path)["digest"]
        return Look(digest) if digest else self.read_and_look(path)[1]


@dataclass(frozen=True)
class SyntheticSource(Source):
    seed: int
    difficulty: Difficulty = "easy"

    def read(self, path: str) -> Tensor:
        index, is_dirty = synthetic_identity(self.seed, path)
        picture = synthetic.draw_plate(self.seed, index, is_dirty, self.difficulty)
        return torch.from_numpy(picture).permute(2, 0, 1)

    def read_and_look(self, path: str) -> tuple[Tensor, Look]:
        image = self.read(path)
        return image, look_at(self.digest(path), image)

    def read_bytes(self, path: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.read(path).permute(1, 2, 0).numpy()).save(buffer, "PNG")
        return buffer.getvalue()

    def digest(self, path: str) -> bytes:
        """A drawing follows from the drawing program, its libraries, the seed, the difficulty and the path; none is
        made here."""
        key = f"{drawing_program()}/{Image.__version__}/{np.__version__}/{self.seed}/{self.difficulty}/{path}"
        return hashlib.sha256(key.encode()).digest()


@functools.cache
def drawing_program() -> str:
    files = sorted(Path(synthetic.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def synthetic_identity(seed: int, path: str) -> tuple[int, bool]:
    """(index, is_dirty) of a drawing; a test drawing's class is drawn from its index, not told by its path."""
    pure = PurePosixPath(path)
    index = int(pure.stem)
    if pure.parts[0] == "test":
        return index, bool(np.random.default_rng([seed, index, 1]).integers(2))
    return index, pure.parts[1] == "dirty"
