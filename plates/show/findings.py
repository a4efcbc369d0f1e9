"""What a run says of images: its predictions, those of held-out images, and what a data check found."""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from plates.checkpoint import INFO_FILE
from plates.config import UserError
from plates.rundir import CONFIG_FILE, read_csv
from plates.storage import Place, place_of

ROWS_PER_PIECE = 500
# Columns of data_issues.csv: numbers 0-1, the lower, the more doubtful; and texts, one a row of an image.
SCORES, NAMES = ("label_score", "near_duplicate_score"), ("issue", "near_duplicate_sets")
LEAST_CHANCE = float(np.finfo(np.float32).smallest_subnormal)  # below it a probability is written as 0


@dataclass(frozen=True)
class Run:
    """A run directory, its data set and seed, and model.json of the checkpoint that it made or used, else {}."""

    place: Place
    data: str
    seed: int
    model: dict[str, Any]


def read_run(place: Place) -> Run:
    """Raises: UserError where it is not the directory of a run."""
    try:
        config = json.loads((place / CONFIG_FILE).read_text())
        used = config.get("checkpoint")
        file = (place_of("--checkpoint", used) if used else place / "checkpoint") / INFO_FILE
        model = json.loads(file.read_text()) if file.exists() else {}
        return Run(place, config["data"], model.get("seed", config.get("seed", 0)), model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--run {place}: holds no {CONFIG_FILE} of a run; give the directory of one") from error


def add_predictions(images: pd.DataFrame, run: Place) -> pd.DataFrame:
    """A table of path and label with what the run says beside them: predicted, probability and loss; what is not
    known is missing."""
    by_path, files = images.set_index("path")["label"], ("out_of_fold.csv", "predictions.csv")
    judged = [read_chances(run / name, by_path) for name in files if (run / name).exists()]
    found = pd.concat(judged) if judged else pd.DataFrame(columns=["path", "predicted", "probability", "loss"])
    return images.merge(found.drop_duplicates("path"), "left", "path")


def read_issues(run: Place) -> pd.DataFrame:
    """data_issues.csv, which alone knows labels in doubt and the duplicates that a run left out; empty without it."""
    file, texts = run / "data_issues.csv", dict.fromkeys(("path", *NAMES), str)
    return read_csv(file, dtype=texts, keep_default_na=False, na_values=[""]) if file.exists() else pd.DataFrame()


def add_issues(images: pd.DataFrame, issues: pd.DataFrame) -> pd.DataFrame:
    """A table of path and more with SCORES, and NAMES as lists, of rows as data_issues.csv has them beside it."""
    by_path = issues.dropna(subset="path").groupby("path")
    columns = {name: by_path[name].min().astype(float) for name in SCORES}
    columns |= {name: by_path[name].agg(lambda texts: [*dict.fromkeys(texts.dropna())]) for name in NAMES}
    return images.assign(**{name: images["path"].map(column) for name, column in columns.items()})


def read_chances(file: Place, labels: pd.Series) -> pd.DataFrame:
    """Of each row: path, the most probable class, its probability, and -log of the true class's, where it is known.

    A piece at a time, since the probabilities of very many classes would fill the memory.

    labels: the true classes by path.
    """
    parts, data = [], io.BytesIO(file.read_bytes())
    # Only an empty cell is a missing number; of a model that diverged all are.
    options: dict[str, Any] = {"dtype": {"path": str}, "keep_default_na": False, "na_values": [""]}
    for piece in pd.read_csv(data, chunksize=ROWS_PER_PIECE, **options):
        columns = [column for column in piece.columns if column.startswith("p_")]
        names, chances = (
            pd.Index([column[2:] for column in columns]),
            piece[columns].to_numpy(dtype=float),
        )  # (rows, C)
        rows, best = np.arange(len(piece)), chances.argmax(1)
        true = names.get_indexer(pd.Index(piece["path"].map(labels)))
        losses = -np.log(np.maximum(chances[rows, true], LEAST_CHANCE))
        part = piece[["path"]].assign(predicted=names[best].astype(object), probability=chances[rows, best])
        parts.append(part.assign(loss=np.where(true >= 0, losses, np.nan))[np.isfinite(chances).all(1)])
    return pd.concat(parts)
