"""The section of foreground boxes: what of an image a model sees that crops to it."""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import ImageDraw

from plates.foreground import foreground_box
from plates.report.predictions import encode_thumbnail, make_thumbnail
from plates.rundir import read_csv
from plates.storage import Place

NUM_BOXES = 8
SIDE = 176  # of the pictures, in pixels


def show_boxes(
    run: Place, config: dict[str, Any], read_image: Callable[[str], np.ndarray]
) -> list[dict[str, Any]] | None:
    """Pictures spread evenly over the labelled images, else the predicted ones; None where a model sees whole images.

    A picture that cannot be read is left out.
    """
    tables = [run / name for name in ("out_of_fold.csv", "predictions.csv") if (run / name).exists()]
    if config.get("crop") != "foreground" or not tables:
        return None
    paths = sorted(read_csv(tables[0], usecols=["path"], dtype=str, keep_default_na=False)["path"])
    pictures = []
    for index in np.linspace(0, len(paths) - 1, min(NUM_BOXES, len(paths))).round().astype(int):
        try:
            pictures.append(draw_box(paths[index], read_image(paths[index])))
        except OSError:
            continue
    return pictures


def draw_box(path: str, picture: np.ndarray) -> dict[str, Any]:
    """A thumbnail of a picture (H, W, 3) uint8 with its box, and the box's share of the area in words."""
    top, left, height, width = foreground_box(torch.tensor(picture).permute(2, 0, 1)).tolist()
    share = height * width / (picture.shape[0] * picture.shape[1])
    words = "whole image" if share == 1 else f"{share:.0%} of its area"
    image = make_thumbnail(picture, SIDE)
    across, down = image.width / picture.shape[1], image.height / picture.shape[0]
    corners = (left * across, top * down, (left + width) * across - 1, (top + height) * down - 1)
    draw = ImageDraw.Draw(image)
    for colour, line_px in (("black", 4), ("yellow", 2)):  # seen on light and on dark
        draw.rectangle(corners, outline=colour, width=line_px)
    name = PurePosixPath(path)
    return {
        "uri": encode_thumbnail(np.asarray(image), side=SIDE),
        "alt": f"{path} with its box: {words}",
        "title": f"{name.parent.name}/{name.stem}: {words}",
    }
