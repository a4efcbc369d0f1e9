"""The section of predicted images: some spread evenly, the most and the least confident ones."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from plates.storage import Place

NUM_BARS = 3  # classes whose probabilities a picture shows
ROWS_PER_PIECE = 500
MAX_TOTALS = 20
FAR = 0.95  # of distance_quantile
NUM_SPREAD, NUM_EXTREME = 24, 8  # pictures of a grid


def show_predictions(path: Place, read_image: Callable[[str], np.ndarray]) -> dict[str, Any] | None:
    """None where predictions.csv is absent or has no rows."""
    table = read_predictions(path) if path.exists() else pd.DataFrame()
    if table.empty:
        return None
    table = table.sort_values("path", ignore_index=True)
    ranked = table["chance_0"].dropna().sort_values(ascending=False, kind="stable").index.tolist()
    even = np.linspace(0, len(table) - 1, min(NUM_SPREAD, len(table))).round().astype(int).tolist()
    picks = {"Evenly spaced by path": even, "Most confident": ranked[:NUM_EXTREME]}
    picks["Least confident"] = ranked[::-1][:NUM_EXTREME]
    far = table.get("distance_quantile", pd.Series(dtype=float)).sort_values(ascending=False, kind="stable")
    title = f"Farther from the training images than {FAR:.0%} of these from each other"
    picks[title] = far[far > FAR].index[:NUM_EXTREME].tolist()
    pictures, missing = {}, {}
    for index in dict.fromkeys(index for indices in picks.values() for index in indices):
        row = table.loc[index]
        try:
            thumbnail = encode_thumbnail(read_image(row["path"]))
        except OSError as error:
            missing[row["path"]] = str(error)
            continue
        alt = f"test image {row['id']}, predicted {row['label']}"
        bars = [(row[f"name_{nth}"], row[f"chance_{nth}"]) for nth in range(NUM_BARS) if f"name_{nth}" in table]
        pictures[index] = {"uri": thumbnail, "alt": alt, "title": row["id"], "bars": bars}
    grids = {title: [pictures[index] for index in picks[title] if index in pictures] for title in picks}
    totals = table["label"].value_counts()
    return {"grids": grids, "missing": missing, "images": len(table),
            "totals": totals.head(MAX_TOTALS).to_dict(), "num_labels": len(totals)}  # fmt: skip


def read_predictions(path: Place) -> pd.DataFrame:
    """predictions.csv as path, id, label, distance_quantile where there is one, and name_K, chance_K: the label, then
    the next most probable classes; so also out_of_fold.csv, which has no id and the true labels.

    Read a piece at a time, since the probabilities of very many classes would fill the memory. Texts stay texts, so
    that an id such as 0001 or a class named NA keeps its spelling.
    """
    parts = []
    texts = dict.fromkeys(("path", "id", "label"), str)
    data = io.BytesIO(path.read_bytes())
    # Only an empty cell is a missing number; of a model that diverged all are.
    for piece in pd.read_csv(data, dtype=texts, keep_default_na=False, na_values=[""], chunksize=ROWS_PER_PIECE):
        names = np.array([column[2:] for column in piece.columns if column.startswith("p_")], dtype=object)
        chances = piece[[f"p_{name}" for name in names]].to_numpy(dtype=float)  # (rows, C)
        rows = np.arange(len(piece))
        keys = -chances
        of_label = pd.Index(names).get_indexer(pd.Index(piece["label"]))  # -1 of the label unsure
        keys[rows[of_label >= 0], of_label[of_label >= 0]] = -np.inf  # before all others
        part = piece[[name for name in (*texts, "distance_quantile") if name in piece]]
        for nth, column in enumerate(np.argsort(keys, axis=1, kind="stable")[:, :NUM_BARS].T):
            part = part.assign(**{f"name_{nth}": names[column], f"chance_{nth}": chances[rows, column]})
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def encode_thumbnail(picture: np.ndarray, *, side: int = 176) -> str:
    """Return a uint8 picture (H, W, 3) as the data URI of a JPEG at most `side` pixels wide and high."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(make_thumbnail(picture, side))).decode("ascii")


def make_thumbnail(picture: np.ndarray, side: int) -> Image.Image:
    """A uint8 picture (H, W, 3) at most `side` pixels wide and high, never enlarged."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side))
    return image


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=76, optimize=True)
    return buffer.getvalue()
