"""The section of what decided: pictures under their class activation maps, and the files of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from plates.report.predictions import NUM_EXTREME, encode_thumbnail
from plates.rundir import write_atomically
from plates.storage import Place

FOLDER = "explained"
MAX_WRONG, NUM_WRONG_SHOWN = 100, 24  # in files, and on a page
SIDE = 512  # of the files' pictures, in pixels
FOR, AGAINST = (235, 60, 20), (30, 100, 235)  # colours of what speaks for the predicted class, and against it
Look = Callable[[str, str], tuple[np.ndarray, np.ndarray]]


def explain_answers(answers: pd.DataFrame, look: Look, folder: Place | None) -> dict[str, Any] | None:
    """Explains the least confident answers and the wrong ones; with a folder the most confident ones, too. None where
    nothing can be shown.

    Args:
        answers: path, id, label, chance, and the true class, None where it is not known.
        look: the picture (H, W, 3) uint8 at a path, and its map (H, W) for a class's name.
        folder: where each is stored as ID_cam.jpg; None where the page alone has them.
    """
    ranked = answers.dropna(subset=["chance"]).sort_values("chance", kind="stable")
    wrong = ranked[ranked["true"].notna() & (ranked["true"] != ranked["label"])][::-1]
    picks = {"Least confident": ranked.index[:NUM_EXTREME]}
    if folder:
        picks["Most confident"] = ranked.index[::-1][:NUM_EXTREME]
    num_wrong = MAX_WRONG if folder else NUM_EXTREME
    picks["Wrong, the most confident first"] = wrong.index[:num_wrong]
    pictures = {}
    for index in dict.fromkeys(index for indices in picks.values() for index in indices):
        row = answers.loc[index]
        try:
            drawn = draw_map(*look(row["path"], row["label"]))
        except OSError:  # the section of predictions names what cannot be read now
            continue
        if folder:
            write_atomically(folder / f"{row['id']}_cam.jpg", lambda file, drawn=drawn: drawn.save(file, quality=88))
        known = f", is {row['true']}" if index in wrong.index else ""
        pictures[index] = {
            "uri": encode_thumbnail(np.asarray(drawn)),
            "alt": f"map over {row['path']}, predicted {row['label']}{known}",
            "title": f"{row['id']}{known}",
            "bars": [(row["label"], float(row["chance"]))],
        }
    if not pictures:
        return None
    grids = {
        title: [pictures[index] for index in indices if index in pictures][:NUM_WRONG_SHOWN]
        for title, indices in picks.items()
    }
    return {
        "grids": grids,
        "num_wrong": len(wrong),
        "max_wrong": MAX_WRONG,
        "folder": FOLDER if folder else None,
        "colours": {"for": FOR, "against": AGAINST},
    }


def draw_map(picture: np.ndarray, values: np.ndarray) -> Image.Image:
    """A grey copy of a picture (H, W, 3) uint8 with the values (H, W) over it, the more colour the larger they are
    beside the largest one."""
    image = Image.fromarray(picture).convert("L")
    image.thumbnail((SIDE, SIDE))
    shown = np.asarray(Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BOX))
    strength = 0.85 * (np.abs(shown) / (np.abs(shown).max() or 1.0))[..., None]  # (h, w, 1)
    colour = np.where(shown[..., None] > 0, FOR, AGAINST)
    return Image.fromarray((np.asarray(image)[..., None] * (1 - strength) + colour * strength).astype(np.uint8))
