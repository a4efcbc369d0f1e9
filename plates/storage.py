"""Places on a disk or behind a URI (s3://, gs://), by the part of pathlib that this program uses."""

import functools
import io
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, Literal, TypeAlias

from pyarrow import fs

from plates.config import UserError


class UriPath:
    """A file or folder of an object store; pyarrow.fs reads and writes it.

    A folder exists where something lies under it, and a file is written whole or not at all, as the store does it.
    Credentials and regions come from the environment, as pyarrow finds them.
    """

    def __init__(self, uri: str, file_type: fs.FileType | None = None) -> None:
        self.uri = uri
        self._known_type = file_type  # of a listing, which saves a request

    @property
    def _base(self) -> str:
        return self.uri.partition("?")[0].rstrip("/")

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self._base.partition("://")[2])

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parent(self) -> "UriPath":
        return self._with_base(self._base.rpartition("/")[0])

    def __truediv__(self, part: str) -> "UriPath":
        return self._with_base(f"{self._base}/{part}")

    def _with_base(self, base: str, file_type: fs.FileType | None = None) -> "UriPath":
        _, mark, query = self.uri.partition("?")
        return UriPath(f"{base}{mark}{query}", file_type)

    def __str__(self) -> str:
        return self.uri

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UriPath) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __lt__(self, other: "UriPath") -> bool:
        return self._pure < other._pure

    def absolute(self) -> "UriPath":
        return self

    def relative_to(self, other: "UriPath") -> PurePosixPath:
        return self._pure.relative_to(other._pure)

    def _open_store(self) -> tuple[fs.FileSystem, str]:
        scheme, _, rest = self.uri.partition("://")
        store = connect(f"{scheme}://{rest.partition('/')[0].partition('?')[0]}", self.uri.partition("?")[2])
        return store, self._base.partition("://")[2]

    def _type(self) -> fs.FileType:
        if self._known_type is None:
            store, path = self._open_store()
            return store.get_file_info(path).type
        return self._known_type

    def exists(self) -> bool:
        return self._type() != fs.FileType.NotFound

    def is_dir(self) -> bool:
        return self._type() == fs.FileType.Directory

    def iterdir(self) -> Iterator["UriPath"]:
        store, path = self._open_store()
        for info in store.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            yield self._with_base(f"{self._base}/{info.base_name}", info.type)

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        store, path = self._open_store()
        return store.open_input_file(path)  # pyright: ignore[reportReturnType]

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        self.write_from(io.BytesIO(data))

    def write_from(self, source: BinaryIO) -> None:
        """Writes what is left to read in an open file, a piece at a time."""
        store, path = self._open_store()
        with store.open_output_stream(path) as file:
            shutil.copyfileobj(source, file)

    def touch(self) -> None:
        self.write_bytes(self.read_bytes())

    def stat(self) -> SimpleNamespace:
        """`st_mtime` in seconds since the epoch, 0 where there is no file."""
        store, path = self._open_store()
        changed = store.get_file_info(path).mtime
        return SimpleNamespace(st_mtime=changed.timestamp() if changed else 0.0)

    def mkdir(self, **_: Any) -> None:
        """Folders of an object store come with their files."""

    def unlink(self, missing_ok: bool = False) -> None:
        store, path = self._open_store()
        if not missing_ok or self.exists():
            store.delete_file(path)


Place: TypeAlias = Path | UriPath


@functools.cache
def connect(root: str, query: str) -> fs.FileSystem:
    """One connection a bucket and process."""
    return fs.FileSystem.from_uri(f"{root}?{query}" if query else root)[0]


def place_of(flag: str, text: str) -> Place:
    """The place that a setting names: a URI, or an absolute path on this machine.

    Raises: UserError where the URI holds credentials, is of an unknown kind, or its store does not answer.
    """
    if "://" not in text:
        return Path(text).expanduser().absolute()
    rest = text.partition("://")[2]
    if "@" in rest.partition("/")[0] or "secret_key=" in text or "access_key=" in text:
        raise UserError(f"{flag}: credentials do not belong in a URI; set them in the environment")
    place = UriPath(text)
    try:
        place.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {text}: cannot be reached ({str(error).splitlines()[0]})") from error
    return place


def remove_tree(place: Place) -> None:
    """Deletes a folder and all in it, where it exists."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    elif place.exists():
        store, path = place._open_store()
        store.delete_dir(path)
