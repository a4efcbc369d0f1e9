"""Thumbnails of all images, a hundred a sheet: a page of ten thousand images loads a hundred files, not as many."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TypeAlias

from PIL import Image
from tqdm import tqdm

from plates.dataset import Dataset, Samples, in_threads
from plates.images import UnreadableImageError
from plates.looks import Look
from plates.report.predictions import encode_jpeg, make_thumbnail
from plates.rundir import write_atomically
from plates.storage import Place

SIDE = 160  # px of a sheet's cell; a multiple of 16, so that no JPEG block has pixels of two thumbnails
COLUMNS, PER_SHEET = 10, 100
GREY = (128, 128, 128)

Size: TypeAlias = tuple[int, int]  # width and height in pixels


def write_sheets(
    folder: Place, dataset: Dataset, splits: Sequence[Samples]
) -> Iterator[tuple[Look, Size] | UnreadableImageError]:
    """Writes 0.jpg, 1.jpg and so on, the splits' images in turn each in the cell of its number.

    Yields what was seen of each image and its thumbnail's size; or why it cannot be read, which leaves its cell grey.
    """

    def look(path: str) -> tuple[Look, Image.Image]:
        image, seen = dataset.source.read_and_look(path)
        return seen, make_thumbnail(image.permute(1, 2, 0).numpy(), SIDE)

    found = chain.from_iterable(in_threads(look, samples) for samples in splits)
    with tqdm(total=sum(map(len, splits)), desc="thumbnails", unit="image") as bar:
        for number, group in enumerate(iter(lambda: [*islice(found, PER_SHEET)], [])):
            sheet = draw_sheet([None if isinstance(one, UnreadableImageError) else one[1] for one in group])
            write_atomically(folder / f"{number}.jpg", lambda file, sheet=sheet: file.write_bytes(encode_jpeg(sheet)))
            bar.update(len(group))
            yield from (one if isinstance(one, UnreadableImageError) else (one[0], one[1].size) for one in group)


def draw_sheet(thumbnails: Sequence[Image.Image | None]) -> Image.Image:
    """Up to PER_SHEET thumbnails in rows of COLUMNS, each at the top left of its cell."""
    sheet = Image.new("RGB", (COLUMNS * SIDE, math.ceil(len(thumbnails) / COLUMNS) * SIDE), GREY)
    for cell, thumbnail in enumerate(thumbnails):
        if thumbnail:
            sheet.paste(thumbnail, (cell % COLUMNS * SIDE, cell // COLUMNS * SIDE))
    return sheet
