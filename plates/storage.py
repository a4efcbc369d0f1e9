"""Places on a disk or behind a URI (s3://, gs://), by the part of pathlib that this program uses."""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, Literal, TypeAlias

from pyarrow import fs

from plates.config import UserError


@dataclass(frozen=True)
class UriPath:
    """A file or folder of an object store; pyarrow.fs reads and writes it.

    A folder exists where something lies under it, and a file is written whole or not at all, as the store does it.
    Credentials and regions come from the environment, as pyarrow finds them.
    """

    base: str  # SCHEME://BUCKET/KEY without a slash at its end; a key may hold any character
    query: str = ""  # options of the store's connection
    known_type: fs.FileType | None = field(default=None, compare=False)  # of a listing, which saves a request

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.base.partition("://")[2])

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parent(self) -> "UriPath":
        return UriPath(self.base.rpartition("/")[0], self.query)

    def __truediv__(self, part: str) -> "UriPath":
        return UriPath(f"{self.base}/{part}", self.query)

    def __str__(self) -> str:
        return f"{self.base}?{self.query}" if self.query else self.base

    def __lt__(self, other: "UriPath") -> bool:
        return self._pure < other._pure

    def absolute(self) -> "UriPath":
        return self

    def relative_to(self, other: "UriPath") -> PurePosixPath:
        return self._pure.relative_to(other._pure)

    def _open_store(self) -> tuple[fs.FileSystem, str]:
        scheme, _, path = self.base.partition("://")
        return connect(f"{scheme}://{path.partition('/')[0]}", self.query), path

    def _type(self) -> fs.FileType:
        if self.known_type is None:
            store, path = self._open_store()
            return store.get_file_info(path).type
        return self.known_type

    def exists(self) -> bool:
        return self._type() != fs.FileType.NotFound

    def is_dir(self) -> bool:
        return self._type() == fs.FileType.Directory

    def iterdir(self) -> Iterator["UriPath"]:
        store, path = self._open_store()
        for info in store.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            yield UriPath(f"{self.base}/{info.base_name}", self.query, info.type)

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        store, path = self._open_store()
        return store.open_input_file(path)  # pyright: ignore[reportReturnType]

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            self.upload(Path(file.name))

    def upload(self, file: Path) -> None:
        """Writes what a file of this machine holds.

        In one call of Arrow's, which Ctrl-C does not interrupt: a stream that is closed on the way out, by an
        exception or by being forgotten, puts what it has of the file in the place of the whole.
        """
        store, path = self._open_store()
        fs.copy_files(str(file), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=store)

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
        with suppress(FileNotFoundError) if missing_ok else nullcontext():
            store.delete_file(path)


Place: TypeAlias = Path | UriPath


@functools.cache
def connect(root: str, query: str) -> fs.FileSystem:
    """One connection a bucket and process."""
    return fs.FileSystem.from_uri(f"{root}?{query}" if query else root)[0]


def place_of(flag: str, text: str) -> Place:
    """The place that a setting names: a URI, or an absolute path on this machine.

    Raises: UserError where it is not named in UTF-8 or cannot be looked up, or the URI holds credentials, is of an
        unknown kind, or its store does not answer.
    """
    is_uri, rest = "://" in text, text.partition("://")[2]
    if is_uri and ("@" in rest.partition("/")[0] or "secret_key=" in text or "access_key=" in text):
        raise UserError(f"{flag}: credentials do not belong in a URI; set them in the environment")
    base, _, query = text.partition("?")
    try:
        place = UriPath(base.rstrip("/"), query) if is_uri else Path(text).expanduser().absolute()
        str(place).encode()
        place.exists()
    except RuntimeError as error:  # no such home
        raise UserError(f"{flag} {text}: {str(error).rstrip('.')}; give the folder itself") from error
    except UnicodeEncodeError as error:  # tables, JSON and the report hold UTF-8 alone
        raise UserError(f"{flag} {text!a}: its name is not UTF-8; rename it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {text}: cannot be reached ({str(error).splitlines()[0]})") from error
    return place


def remove_tree(place: Place) -> None:
    """Deletes a folder and all in it, where it exists; several may delete it at once."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    else:
        store, path = place._open_store()
        with suppress(FileNotFoundError):
            store.delete_dir(path)
