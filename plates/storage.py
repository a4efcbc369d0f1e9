"""Places on a disk or behind a URI (s3://, gs://), by the part of pathlib that this program uses."""

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeAlias

import platformdirs
from pyarrow import fs

from plates.config import UserError


@dataclass(frozen=True, order=True)
class UriPath:
    """A file or folder of an object store, by pyarrow.fs, which finds credentials and regions in the environment.

    A folder exists where something lies under it, and a file is written whole or not at all, as the store does it.
    """

    base: str  # SCHEME://BUCKET/KEY without a slash at its end; a key may hold any character
    query: str = ""  # options of the store's connection
    known_type: fs.FileType | None = field(default=None, compare=False)  # of a listing, which saves a request

    @property
    def name(self) -> str:
        return self.base.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "UriPath":
        return UriPath(self.base.rpartition("/")[0], self.query)

    def __truediv__(self, part: str) -> "UriPath":
        return UriPath(f"{self.base}/{part}", self.query)

    def __str__(self) -> str:
        return f"{self.base}?{self.query}" if self.query else self.base

    def relative_to(self, other: "UriPath") -> PurePosixPath:
        return PurePosixPath(self.base).relative_to(PurePosixPath(other.base))

    @property
    def path(self) -> str:
        """BUCKET/KEY, as the store takes it."""
        return self.base.partition("://")[2]

    @property
    def store(self) -> fs.FileSystem:
        scheme, _, path = self.base.partition("://")
        return connect(f"{scheme}://{path.partition('/')[0]}", self.query)

    def info(self) -> fs.FileInfo:
        return self.store.get_file_info(self.path)

    def exists(self) -> bool:
        return (self.known_type or self.info().type) != fs.FileType.NotFound

    def is_dir(self) -> bool:
        return (self.known_type or self.info().type) == fs.FileType.Directory

    def iterdir(self) -> Iterator["UriPath"]:
        for info in self.store.get_file_info(fs.FileSelector(self.path, allow_not_found=True)):
            yield UriPath(f"{self.base}/{info.base_name}", self.query, info.type)

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        return self.store.open_input_file(self.path)  # pyright: ignore[reportReturnType]

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

        One call of Arrow's, which Ctrl-C does not interrupt: a stream that an exception closes stores half a file.
        """
        fs.copy_files(str(file), self.path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=self.store)

    def changed_at_s(self) -> float:
        """When it was written, in seconds since the epoch; 0 where there is no file."""
        return (self.info().mtime_ns or 0) / 1e9

    def mkdir(self, **_: Any) -> None:
        """Folders of an object store come with their files."""

    def unlink(self, missing_ok: bool = False) -> None:
        with suppress(FileNotFoundError) if missing_ok else nullcontext():
            self.store.delete_file(self.path)


Place: TypeAlias = Path | UriPath


@functools.cache
def connect(root: str, query: str) -> fs.FileSystem:
    """One connection a bucket and process."""
    return fs.FileSystem.from_uri(f"{root}?{query}" if query else root)[0]


def place_of(flag: str, text: str) -> Place:
    """The URI, or absolute path on this machine, that a setting names.

    Raises: UserError where it is not named in UTF-8, cannot be looked up, or holds credentials.
    """
    is_uri, rest = "://" in text, text.partition("://")[2]
    if is_uri and ("@" in rest.partition("/")[0] or "secret_key=" in text or "access_key=" in text):
        raise UserError(f"{flag}: credentials do not belong in a URI; set them in the environment")
    base, _, query = text.partition("?")
    try:
        named = UriPath(base.rstrip("/"), query) if is_uri else Path(text).expanduser().absolute()
        str(named).encode()
        named.exists()
    except RuntimeError as error:  # no such home
        raise UserError(f"{flag} {text}: {str(error).rstrip('.')}; give the folder itself") from error
    except UnicodeEncodeError as error:  # tables, JSON and the report hold UTF-8 alone
        raise UserError(f"{flag} {text!a}: its name is not UTF-8; rename it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {text}: cannot be reached ({str(error).splitlines()[0]})") from error
    return named


def cache_root() -> Place:
    """PLATES_CACHE, a path or a URI, else the user's cache folder; absolute, since workers run elsewhere."""
    return place_of("PLATES_CACHE", os.environ.get("PLATES_CACHE") or platformdirs.user_cache_dir("plates"))


def remove_tree(folder: Place) -> None:
    """Deletes a folder and all in it, where it exists; several may delete it at once."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            folder.store.delete_dir(folder.path)
