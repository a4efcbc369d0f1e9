"""Data sets as they are handed around: from Kaggle, and unpacked from .zip files into the cache, once."""

import hashlib
import json
import shutil
import stat
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from plates.config import UserError
from plates.folders import LITTER, PACKED_SUFFIXES
from plates.images import IMAGE_SUFFIXES
from plates.rundir import write_atomically, write_json
from plates.storage import Place, cache_root, remove_tree

# Of what an archive may unpack to, that no small file fills a disk: images are compressed already.
MAX_MEMBERS, MAX_UNPACKED_BYTES, MAX_RATIO, MIN_LIMIT_BYTES = 3_000_000, 400 << 30, 100, 1 << 30
CHUNK_BYTES = 1 << 20
TOKEN = (
    "make a token at https://www.kaggle.com/settings/api and put it into ~/.kaggle/access_token or KAGGLE_API_TOKEN, "
    "or set KAGGLE_USERNAME and KAGGLE_KEY"
)


def download(data: str) -> Path:
    """The folder in which kagglehub keeps what kaggle:NAME or kaggle:OWNER/NAME names; only what is new is fetched.

    Raises: UserError saying what to do where it cannot be had.
    """
    try:
        import kagglehub
        from kagglehub.exceptions import UnauthenticatedError
    except ImportError as error:
        raise UserError(f"--data {data}: needs kagglehub: pip install kagglehub") from error
    name = data.removeprefix("kaggle:")
    fetch = kagglehub.dataset_download if "/" in name else kagglehub.competition_download
    try:
        return Path(fetch(name))
    except UnauthenticatedError as error:
        raise UserError(f"--data {data}: needs a Kaggle account; {TOKEN}") from error
    except Exception as error:  # of requests, of kagglehub, of a damaged kaggle.json, of a download that was cut off
        raise UserError(f"--data {data}: {explain(error, name)}") from error


def explain(error: Any, name: str) -> str:
    """Why Kaggle did not give the data, and what to do."""
    is_competition = "/" not in name
    page = f"https://www.kaggle.com/{'c' if is_competition else 'datasets'}/{name}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"Kaggle does not know the token that it was given; {TOKEN}"
    if status == 403:
        rules = f"accept the rules at {page}/rules" if is_competition else f"see {page} for who may have it"
        return f"Kaggle does not let this account have it; {rules}; without a token, {TOKEN}"
    if status == 404:
        return f"Kaggle has none of that name; see {page}"
    if isinstance(error, OSError) and status is None and error.errno is None:  # of requests
        return f"Kaggle cannot be reached ({type(error).__name__}); download it elsewhere, and give its .zip"
    return f"cannot be had from Kaggle ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]}); try again"


def unpack(archive: Place, left_out: Counter[str]) -> Place:
    """Unpacks images and tables of a .zip into the cache, by its SHA-256; the folder, once all of it is there.

    left_out: takes how much of what kind was not unpacked.
    Raises: UserError where it is damaged, or holds what no data set does.
    """
    try:
        with on_disk(archive) as file:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            folder, finished = (cache_root() / "archives" / name for name in (digest, f"{digest}.json"))
            finished.parent.mkdir(parents=True, exist_ok=True)
            is_on_disk = isinstance(folder, Path)
            # In an object store two at once write the same files, each of them whole.
            with FileLock(f"{folder}.lock") if is_on_disk else nullcontext():
                if not finished.exists():
                    if is_on_disk:
                        remove_tree(folder)  # of an unpacking that was cut off
                    write_json(finished, extract(file, folder))
                left_out.update(json.loads(finished.read_text()))
            return folder
    except UserError as error:
        raise UserError(f"--data {archive}: {error}") from error
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename}" if error.filename else error
        raise UserError(f"--data {archive}: cannot be unpacked ({reason}); PLATES_CACHE says where to") from error
    except Exception as error:  # readers of damaged files raise what they like: BadZipFile, zlib.error, EOFError, ...
        raise UserError(f"--data {archive}: is damaged, or no .zip ({error}); get it again") from error


@contextmanager
def on_disk(file: Place) -> Iterator[Path]:
    """The file, or a passing copy of one in an object store, where each small read is a request."""
    if isinstance(file, Path):
        yield file
        return
    with tempfile.NamedTemporaryFile(suffix=".zip") as copy, file.open() as stored:
        shutil.copyfileobj(stored, copy, CHUNK_BYTES)
        copy.flush()
        yield Path(copy.name)


def extract(file: Path, folder: Place) -> Counter[str]:
    """Writes the members that may be images or tables; how much of what kind was passed by.

    Raises: UserError for an archive that is not safe to unpack.
    """
    limit = min(MAX_UNPACKED_BYTES, max(MIN_LIMIT_BYTES, MAX_RATIO * file.stat().st_size))
    passed_by: Counter[str] = Counter()
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        wanted = {member: path for member in members if (path := safe_path(member, passed_by))}
        if len(members) > MAX_MEMBERS or sum(member.file_size for member in wanted) > limit:
            raise UserError(f"unpacks to more than {limit >> 20} MiB or {MAX_MEMBERS} files; unpack it by hand")
        if not wanted:
            raise UserError("holds no images")
        for member, path in tqdm(wanted.items(), desc="unpacking", unit="file"):
            write_atomically(folder / path, partial(copy_member, archive, member))
    return passed_by


def copy_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> None:
    """No more of it than its header says, which zipfile counts."""
    with archive.open(member) as packed, file.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, CHUNK_BYTES)


def safe_path(member: zipfile.ZipInfo, passed_by: Counter[str]) -> str | None:
    """Where to write a member, below the folder; None of what is not unpacked. Raises: UserError."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"its member {member.filename!r} lies outside of its folder")
    if any(part.startswith(".") or part in LITTER for part in path.parts):
        passed_by["hidden file(s)"] += 1
    elif path.suffix.lower() not in IMAGE_SUFFIXES | PACKED_SUFFIXES:
        passed_by[path.suffix.lower()] += 1
    elif stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(f"its member {member.filename!r} is a link")
    elif member.flag_bits & 1:
        raise UserError("is encrypted; unpack it by hand")
    else:
        return str(path)
    return None
