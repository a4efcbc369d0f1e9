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


def show_predictions(
    path: Place, read_image: Callable[[str], np.ndarray], *, spread: int = 24, extreme: int = 8
) -> dict[str, Any] | None:
    """None where predictions.csv is absent or has no rows."""
    table = read_predictions(path) if path.exists() else pd.DataFrame()
    if table.empty:
        return None
    table = table.sort_values("path", ignore_index=True)
    paths, ids, labels = (table[column].tolist() for column in ("path", "id", "label"))
    stated = table["chance_0"].to_numpy()
    ranked = [int(row) for row in np.argsort(-stated, kind="stable") if np.isfinite(stated[row])]
    even = np.unique(np.linspace(0, len(table) - 1, min(spread, len(table))).round().astype(int)).tolist()
    pictures, missing = {}, {}
    for row in dict.fromkeys([*even, *ranked[:extreme], *ranked[-extreme:]]):
        try:
            thumbnail = encode_thumbnail(read_image(paths[row]))
        except OSError as error:
            missing[paths[row]] = str(error)
            continue
        alt = f"test image {ids[row]}, predicted {labels[row]}"
        shown = [place for place in range(NUM_BARS) if f"name_{place}" in table]
        bars = [(table.at[row, f"name_{place}"], table.at[row, f"chance_{place}"]) for place in shown]
        pictures[row] = {"uri": thumbnail, "alt": alt, "title": ids[row], "bars": bars}
    picks = {"Evenly spaced by path": even, "Most confident": ranked[:extreme]}
    picks["Least confident"] = ranked[::-1][:extreme]
    grids = {title: [pictures[row] for row in rows if row in pictures] for title, rows in picks.items()}
    totals = table["label"].value_counts()
    return {"name": "predictions", "grids": grids, "missing": missing, "images": len(table),
            "totals": totals.head(MAX_TOTALS).to_dict(), "num_labels": len(totals)}  # fmt: skip


def read_predictions(path: Place) -> pd.DataFrame:
    """predictions.csv as path, id, label, and name_K, chance_K: the label, then the next most probable classes.

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
        labels = pd.Index(names).get_indexer(pd.Index(piece["label"]))
        keys = -chances
        keys[np.arange(len(piece)), labels] = -np.inf  # before all others
        ranked = np.argsort(keys, axis=1, kind="stable")[:, :NUM_BARS]
        columns = [(place, names[ranked[:, place]]) for place in range(ranked.shape[1])]
        named = {f"name_{place}": name for place, name in columns}
        named |= {f"chance_{place}": chances[np.arange(len(piece)), ranked[:, place]] for place, _ in columns}
        parts.append(piece[["path", "id", "label"]].assign(**named))
    return pd.concat(parts, ignore_index=True)


def encode_thumbnail(picture: np.ndarray, *, side: int = 176) -> str:
    """Return a uint8 picture (H, W, 3) as the data URI of a JPEG at most `side` pixels wide and high."""
    image, buffer = Image.fromarray(np.ascontiguousarray(picture)), io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, format="JPEG", quality=76, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
