"""Folders of images, found as users arrange them."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from plates.config import UserError
from plates.images import IMAGE_SUFFIXES
from plates.rules import DATA_KINDS
from plates.shards import holds_images
from plates.storage import Place

LITTER = {"__MACOSX", "lost+found"}
PACKED_SUFFIXES = {".zip", ".csv", ".parquet"}
Kind: TypeAlias = Literal["splits", "images", "archive", "shards", "table"]


def find_data(place: Place, needs_train: bool) -> tuple[Kind, Place]:
    """What kind of data is at a place, and where: a folder is looked through while it wraps but one.

    splits: a folder with train/ or test/ in it; images: any other. A folder is its only archive, or its shards, where
    nothing else is in it; where it must have training images, its only table that names them.

    Raises: UserError where there is nothing, or nothing of a known kind.
    """
    if not place.is_dir():
        if place.exists() and place.suffix.lower() in PACKED_SUFFIXES:
            return kind_of(place), place
        reason = "is a file of another kind" if place.exists() else "no such folder or file"
        raise UserError(f"--data {place}: {reason}; give {DATA_KINDS}")
    folder, tables = place, []
    while True:
        folders, images, packed = look_into(folder, Counter())
        if any(child.name in ("train", "test") for child in folders):
            return "splits", folder
        tables += [file for file in packed if file.suffix.lower() == ".csv" and names_images(file)]
        if not folders and not images:
            archives = [file for file in packed if file.suffix.lower() == ".zip"]
            if any(file.suffix == ".parquet" for file in packed):
                return "shards", folder
            if len(archives) == 1:
                return "archive", archives[0]
        if len(folders) != 1 or images:
            return ("table", tables[0]) if needs_train and len(tables) == 1 else ("images", place)
        folder = folders[0]


def kind_of(file: Place) -> Kind:
    if file.suffix.lower() == ".zip":
        return "archive"
    return "shards" if file.suffix.lower() == ".parquet" and holds_images(file) else "table"


def names_images(table: Place) -> bool:
    """Whether the header of a CSV has the columns of one."""
    with table.open("rb") as file:
        return {b"path", b"label"} <= {*file.read(1000).partition(b"\n")[0].strip().split(b",")}


def look_into(folder: Place, left_out: Counter[str]) -> tuple[list[Place], list[Place], list[Place]]:
    """The folders in a folder, without links back to it or to one above it, the images in it, and packed files.

    left_out: takes how much of what kind was passed by; files by suffix.
    """
    folders, images, packed = [], [], []
    children = sorted(cast(Iterable[Any], folder.iterdir()))
    if not children:
        left_out["empty folder(s)"] += 1
    for child in children:
        if child.name.startswith(".") or child.name in LITTER:
            left_out["hidden folder(s)" if child.is_dir() else "hidden file(s)"] += 1
        elif not child.is_dir():
            suffix = child.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                images.append(child)
                continue
            left_out[suffix] += 1
            packed += [child] if suffix in PACKED_SUFFIXES else []
        elif not (
            isinstance(folder, Path) and child.is_symlink() and folder.resolve().is_relative_to(child.resolve())
        ):
            folders.append(child)
    return folders, images, packed


def tell_left_out(left_out: Counter[str]) -> str:
    """What was not looked at, in one line; empty where that is nothing."""
    found = [(what, n) for what, n in left_out.most_common() if n]
    kinds = [f"{what or 'without one'} {n}" for what, n in found if what[:1] in ("", ".")]
    told = [(what, n) for what, n in found if what[:1] not in ("", ".")]
    if kinds:
        num_files = left_out.total() - sum(n for _, n in told)
        told.insert(0, (f"file(s) of other kinds ({', '.join(kinds)})", num_files))
    line = ", ".join(f"{n} {what.replace('(s)', 's' * (n != 1))}" for what, n in told)
    return line and f"not looked at: {line}"


def find_images(folder: Place, root: Place, left_out: Counter[str]) -> list[str]:
    """Paths of the images under `folder`, relative to `root`, with forward slashes, sorted; each folder once."""
    found: list[str] = []
    pending, seen = [folder] if folder.is_dir() else [], set[Place]()
    while pending:
        folder = pending.pop()
        real = folder.resolve() if isinstance(folder, Path) else folder
        if real not in seen:
            seen.add(real)
            folders, images, _ = look_into(folder, left_out)
            pending += reversed(folders)
            found += [printable(cast(Any, image).relative_to(root).as_posix()) for image in images]
    return sorted(found)


def printable(path: str) -> str:
    """With \\xNN for what is not UTF-8, as tables, JSON and terminals are; no file can be read by such a path."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
