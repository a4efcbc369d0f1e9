"""Folders of images, found as users arrange them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from plates.config import UserError
from plates.images import IMAGE_SUFFIXES
from plates.storage import Place

LITTER = {"__MACOSX", "lost+found"}


def find_root(folder: Place) -> Place | None:
    """The folder with train/ or test/ in it: this one, or one that it wraps alone. Raises: UserError."""
    if not folder.is_dir():
        raise UserError(f"--data {folder}: {'is a file; give a folder' if folder.exists() else 'no such folder'}")
    while True:
        folders, images = look_into(folder)
        if any(child.name in ("train", "test") for child in folders):
            return folder
        if len(folders) != 1 or images:
            return None
        folder = folders[0]


def look_into(folder: Place) -> tuple[list[Place], list[Place]]:
    """The folders in a folder, without links back to it or to one above it, and the images in it."""
    folders, images = [], []
    for child in sorted(cast(Iterable[Any], folder.iterdir())):
        if child.name.startswith(".") or child.name in LITTER:
            continue
        if not child.is_dir():
            images += [child] if child.suffix.lower() in IMAGE_SUFFIXES else []
        elif not (
            isinstance(folder, Path) and child.is_symlink() and folder.resolve().is_relative_to(child.resolve())
        ):
            folders.append(child)
    return folders, images


def find_images(folder: Place, root: Place) -> list[str]:
    """Paths of the images under `folder`, relative to `root`, with forward slashes, sorted; each folder once."""
    found: list[str] = []
    pending, seen = [folder] if folder.is_dir() else [], set[Place]()
    while pending:
        folder = pending.pop()
        real = folder.resolve() if isinstance(folder, Path) else folder
        if real not in seen:
            seen.add(real)
            folders, images = look_into(folder)
            pending += reversed(folders)
            found += [printable(cast(Any, image).relative_to(root).as_posix()) for image in images]
    return sorted(found)


def printable(path: str) -> str:
    """With \\xNN for what is not UTF-8, as tables, JSON and terminals are; no file can be read by such a path."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
