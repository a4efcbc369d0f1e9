"""Features that workers have finished, stored as they go."""

import time
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from torch import Tensor

from plates.rundir import LOCK_FILE, STALE_S, write_whole
from plates.storage import Place, remove_tree

SECONDS_PER_PART = 10.0  # of computing that a worker may lose
BYTES_PER_PART = 64 << 20  # of features that a worker holds


class Parts:
    """Rows of features that workers have finished, stored as they go: a run that is cut off computes only the rest,
    and none holds them all in memory.

    A row is the (V, F) features of one image, known by its number in the run; a part is a table of some of them. Each
    worker writes into a folder of its own. On a disk it is locked while the worker lives: whoever can lock another's
    takes over what a run cut off left, and nobody touches what a run beside this one is at. An object store has no
    locks: all folders are read there, and one goes when nothing was written into it for a while.
    """

    def __init__(self, root: Place, key: str) -> None:
        self.root = root
        self.key = key
        self.own: Place | None = None  # made with the first part
        self.folders: dict[Place, FileLock | None] = {}  # this worker's own and those taken over
        self.places: list[Place] = []  # of the parts that this worker hands in
        self.pending: dict[int, Tensor] = {}
        self.num_pending_bytes = 0
        self.saved_at = time.monotonic()

    def find(self) -> dict[Place, list[int]]:
        """The parts that this worker may read, and the images that they hold."""
        found = {}
        for folder in sorted(self.root.iterdir()) if self.root.exists() else []:
            is_ours = folder.name.startswith(self.key) and folder.suffix == ".parts"
            if is_ours and (folder in self.folders or self.take(folder)):
                for place in sorted(folder.iterdir()):
                    if place.suffix == ".parquet" and not place.name.startswith("."):
                        table = read_part(place, ["index"])
                        found |= {place: table["index"].to_pylist()} if table is not None else {}
        return found

    def take(self, folder: Place) -> bool:
        """Takes a folder for this worker; False where it cannot be locked, most of all since its worker lives."""
        lock = None
        if isinstance(folder, Path):
            lock = FileLock(folder / LOCK_FILE)
            try:
                lock.acquire(timeout=0)
            except OSError:
                return False
        self.folders[folder] = lock
        return True

    def make_own(self) -> Place:
        name = f"{self.key}.{uuid.uuid4().hex}.parts"
        self.own, hidden = self.root / name, self.root / f".{name}"
        if isinstance(hidden, Path):
            hidden.mkdir(parents=True)
            self.take(hidden)
            hidden.rename(str(self.own))  # locked when it can be seen
        self.folders[self.own] = self.folders.pop(hidden, None)
        return self.own

    def add(self, index: int, row: Tensor) -> None:
        """Takes a finished row, and stores it with those before it when there is enough that could be lost."""
        self.pending[index] = row
        self.num_pending_bytes += row.nbytes
        if time.monotonic() - self.saved_at >= SECONDS_PER_PART or self.num_pending_bytes >= BYTES_PER_PART:
            place, table = (self.own or self.make_own()) / f"{uuid.uuid4().hex}.parquet", self.pending_table()
            write_whole(place, lambda file: pq.write_table(table, file))
            self.places.append(place)
            self.pending, self.num_pending_bytes, self.saved_at = {}, 0, time.monotonic()

    def pending_table(self) -> pa.Table:
        rows = [row.reshape(-1).numpy() for row in self.pending.values()]
        indices = pa.array(list(self.pending), pa.int64())
        return pa.table({"index": indices, "feature": pa.array(rows, pa.list_(pa.float32()))})

    def remove(self) -> None:
        """Deletes this worker's folder, and those of runs cut off."""
        for folder, lock in self.folders.items():
            written_at = [place.stat().st_mtime for place in folder.iterdir()] if not lock else []
            if folder == self.own or time.time() - max(written_at, default=0) > STALE_S:
                remove_tree(folder)

    def close(self) -> None:
        """Leaves what is still there to others."""
        for lock in filter(None, self.folders.values()):
            lock.release(force=True)


def read_part(place: Place, columns: list[str] | None = None) -> pa.Table | None:
    """None where it is damaged, or gone, since another run of the same features has finished."""
    try:
        with pq.ParquetFile(place.open("rb")) as file:
            return file.read(columns)
    except (OSError, pa.ArrowInvalid):
        return None
