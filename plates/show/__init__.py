"""One page of every image of a data set, to search, to sort and to enlarge, that needs no server."""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from plates import report
from plates.config import TrainConfig
from plates.data_issues import find_issues
from plates.dataset import Dataset, Samples, Seen, Skipped
from plates.images import UnreadableImageError
from plates.looks import Look
from plates.model import preprocessing_of
from plates.report.predictions import encode_thumbnail
from plates.rundir import write_atomically
from plates.show.findings import NAMES, SCORES, Run, add_issues, add_predictions, read_issues
from plates.show.sheets import COLUMNS, PER_SHEET, SIDE, Size, write_sheets
from plates.sources import FolderSource
from plates.storage import Place
from plates.transforms import Preprocessing, draw_views

SPLITS = ("train", "val", "test")
NUM_EXAMPLES, NUM_VIEWS = 6, 8  # training images whose views are shown, and how many of each
VIEW_SIDE = 112  # px

Looked: TypeAlias = tuple[Look, Size] | UnreadableImageError  # as `write_sheets` yields it


def write_page(out: Place, dataset: Dataset, run: Run | None, *, title: str, seed: int) -> list[Skipped]:
    """Writes index.html and the folder thumbnails/; returns the images that cannot be read.

    Args:
        run: whose findings are shown beside the images.
        seed: of the training views.
    """
    splits = [getattr(dataset, split) for split in SPLITS]
    images = list_images(splits, dataset.classes)
    looked = [*write_sheets(out / "thumbnails", dataset, splits)]
    skipped = [
        Skipped(path, split, str(one))
        for path, split, one in zip(images["path"], images["split"], looked, strict=True)
        if isinstance(one, UnreadableImageError)
    ]
    images = add_predictions(images, run.place) if run else images
    issues = find_issues(dataset, sort_looks(splits, looked), skipped).table
    images = add_issues(images, pd.concat([issues, read_issues(run.place)]) if run else issues)
    page = render_page(
        describe(images, looked, dataset),
        title=title,
        run=run.place.name if run else None,
        counts={split: len(samples) for split, samples in zip(SPLITS, splits, strict=True) if samples},
        num_unreadable=len(skipped),
        views=show_views(dataset, {item.path for item in skipped}, run.model if run else {}, seed),
    )
    write_atomically(out / "index.html", lambda file: file.write_text(page, encoding="utf-8"))
    return skipped


def list_images(splits: Sequence[Samples], classes: Sequence[str]) -> pd.DataFrame:
    """path, split and label, a row an image; an unknown label is missing."""
    samples = [(split, sample) for split, listed in zip(SPLITS, splits, strict=True) for sample in listed]
    labels = [None if sample.label is None else classes[sample.label] for _, sample in samples]
    paths = [sample.path for _, sample in samples]
    return pd.DataFrame({"path": paths, "split": [split for split, _ in samples], "label": labels}, dtype=object)


def sort_looks(splits: Sequence[Samples], looked: Sequence[Looked]) -> dict[str, Seen]:
    """What was seen of each split's images, which are looked at in turn."""
    looks = iter([Look(b"") if isinstance(one, UnreadableImageError) else one[0] for one in looked])
    seen = {}
    for split, samples in zip(SPLITS, splits, strict=True):
        own = [*islice(looks, len(samples))]
        if own:
            digests = [look.digest or None for look in own]
            seen[split] = Seen(samples.with_digests(digests), np.array([look.kept for look in own]))
    return seen


def describe(images: pd.DataFrame, looked: Sequence[Looked], dataset: Dataset) -> dict[str, Any]:
    """What the script shows, as columns in the images' order; a class or a split is its number in a list."""
    predicted = images["predicted"].dropna() if "predicted" in images else ()
    names = [*dict.fromkeys([*dataset.classes, *predicted])]
    root = dataset.source.root if isinstance(dataset.source, FolderSource) else None
    unread = {index: str(one) for index, one in enumerate(looked) if isinstance(one, UnreadableImageError)}
    sizes = [
        None if isinstance(one, UnreadableImageError) else [one[0].kept[["width", "height"]].item(), one[1]]
        for one in looked
    ]
    columns = [column for column in ("probability", "loss", *SCORES) if column in images]
    return {
        "path": images["path"].tolist(),
        "split": number_in(SPLITS, images["split"]),
        "label": number_in(names, images["label"]),
        "predicted": number_in(names, images.get("predicted", images["label"].map(lambda _: None))),
        "sizes": sizes,
        "reason": unread,
        **{name: lists_in(images.get(name, ())) for name in NAMES},
        "figures": {name: round_column(images[name]) for name in columns if images[name].notna().any()},
        "classes": names,
        "splits": SPLITS,
        "folder": root.as_uri() if isinstance(root, Path) else None,
        "sheets": {"side": SIDE, "columns": COLUMNS, "count": PER_SHEET},
    }


def number_in(names: Sequence[str], column: pd.Series) -> list[int | None]:
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers.get(name) for name in column]


def lists_in(column: Iterable[Any]) -> dict[int, list[str]]:
    """By row, without those that are missing or empty."""
    return {row: found for row, found in enumerate(column) if isinstance(found, list) and found}


def round_column(column: pd.Series) -> list[float | None]:
    """To 6 digits, which keep the certainties near 1 apart; None where it is not finite."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in column.astype(float)]


def show_views(dataset: Dataset, unreadable: set[str], model: dict[str, Any], seed: int) -> dict[str, Any]:
    """Views of training images spread over the split, as a model saw them by its model.json, else by default."""
    settings = {name: model[name] for name in ("augment", "num_views") if name in model}
    config, known = TrainConfig(**settings, seed=seed), model.get("preprocessing")
    seen = Preprocessing.from_dict(known) if known else preprocessing_of("resnet18", None)
    readable = [sample for sample in dataset.train if sample.path not in unreadable]
    examples, is_turned = [], config.augment == "both"
    for index in np.linspace(0, len(readable) - 1, min(NUM_EXAMPLES, len(readable))).round().astype(int):
        path, label = readable[index].path, dataset.classes[readable[index].label or 0]
        numbers = config.train_views[:NUM_VIEWS]
        pictures = draw_views(dataset.source.read(path), numbers, seed, path, seen, is_turned=is_turned)
        uris = [encode_thumbnail(picture, side=VIEW_SIDE) for picture in pictures]
        examples.append({"title": f"{label}: {path}", "path": path, "uris": uris})
    return {"examples": examples, "augment": config.augment, "image_size": seen.image_size, "is_own": bool(model)}


def render_page(described: dict[str, Any], **context: Any) -> str:
    """The page's HTML, with the data that its script shows and, in its policy, that script's hash."""
    here = Path(__file__).parent
    loader = jinja2.FileSystemLoader([here, Path(report.__file__).parent])  # the report's style
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    script = (here / "show.js").read_text(encoding="utf-8")
    context["digest"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    data = Markup(text.replace("<", "\\u003c"))  # nothing in it can end the element that holds it
    return pages.get_template("show.html.j2").render(**context, script=Markup(script), data=data)
