"""What is odd about the images of a data set: as a table, worst first, and as lines for people."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from plates.config import UserError
from plates.dataset import Dataset, Seen, Skipped
from plates.duplicates import find_sets
from plates.images import CUT_OFF, EMPTY_FILE
from plates.looks import LOOK, NUM_BITS
from plates.samples import Samples
from plates.sources import Source, SyntheticSource

# The last seven as cleanlab names them; a cell that does not apply is empty.
COLUMNS = ["path", "split", "issue", "is_label_issue", "label_score", "given_label", "predicted_label",
           "is_near_duplicate_issue", "near_duplicate_score", "near_duplicate_sets"]  # fmt: skip
KINDS = ("unreadable", "truncated", "empty", "missing_class", "class_name", "label", "exact_duplicate",
         "near_duplicate", "dropped", "tiny", "huge", "extreme_size", "exif_rotated")  # fmt: skip
LINES = {
    "cannot be read": KINDS[:3],
    "classes that a split lacks": ["missing_class"],
    "class names that differ by case or spaces alone": ["class_name"],
    "labels in doubt": ["label"],
    "duplicates left out of training": ["dropped"],
    "tiny, huge, or far from the others in size or shape": ["tiny", "huge", "extreme_size"],
    "stored rotated, taken upright": ["exif_rotated"],
}
TINY_SIDE, HUGE_PIXELS = 32, 50_000_000
EXTREME_AREA, EXTREME_ASPECT, FEWEST_TO_COMPARE = 16, 3, 8  # times the median, of at least so many images
MAX_CLASSES, MAX_NAMED = 8, 20
IMBALANCE = 3


@dataclass(frozen=True)
class Issues:
    """`table`: as data_issues.csv has it; `counts`: images by split and class; `lines`: the counts, then a line a
    kind of issue."""

    table: pd.DataFrame
    counts: dict[str, dict[str, int]]
    lines: list[str]


def find_issues(
    dataset: Dataset,
    seen: dict[str, Seen],
    skipped: Sequence[Skipped],
    dropped: pd.DataFrame | None = None,
    out_of_fold: pd.DataFrame | None = None,
    near: pd.DataFrame | None = None,
) -> Issues:
    """Args:
    seen, skipped: by split what was seen of the images as they were listed, and those that cannot be read.
    dropped: duplicates that were left out of training, as `drop_duplicates` tells them.
    out_of_fold: path, label, p_CLASS…: what a model said of labelled images that it was not trained on.
    near: near duplicates by their features, as `find_near` tells them.
    """
    unseen = {"test": Seen(dataset.test, np.zeros(len(dataset.test), LOOK))} if dataset.test else {}
    images = list_images(dataset.classes, seen | {split: one for split, one in unseen.items() if split not in seen})
    counts = count_images(images)
    parts = [
        pd.DataFrame({"path": [one.path], "split": [one.split], "issue": [name_unreadable(one.reason)]})
        for one in skipped
    ]
    duplicates = describe_duplicates(images)
    near = None if near is None else near[~near["path"].isin(duplicates["path"])]
    parts += [find_class_issues(dataset.classes, counts), find_odd_sizes(images), duplicates]
    parts += [part for part in (near, dropped, doubt_labels(out_of_fold, images)) if part is not None]
    table = pd.concat([pd.DataFrame(columns=COLUMNS, dtype=object), *(part.astype(object) for part in parts)])
    ranks = table["issue"].map({kind: rank for rank, kind in enumerate(KINDS)})
    table = table.iloc[np.argsort(ranks.to_numpy(int), kind="stable")].reset_index(drop=True)[COLUMNS]
    lines = [tell_counts(counts), *tell_issues(table, images), *tell_imbalance(counts)]
    if near is not None and len(near):
        lines.insert(1, f"by their features near to training images: {len(near)} ({name_first(near['path'])})")
    return Issues(table, counts, [*lines, *tell_unseen(images, skipped, dataset.source)])


def find_near(test: Seen, near: np.ndarray, train: Samples) -> pd.DataFrame:
    """Near duplicates of training images, by their features, among the test images that have no hash, as rows of
    data_issues.csv.

    Args:
        near: (N, 2) of the test images, the last of `Reference.compare`: how near, and the index, -1 of none.
        train: the images of its indices.
    """
    indices = np.flatnonzero((test.looks["width"] == 0) & (near[:, 1] >= 0))
    paths, others = (
        samples.take(chosen).table["path"].to_pandas()
        for samples, chosen in ((test.samples, indices), (train, near[indices, 1].astype(int)))
    )
    return pd.DataFrame(
        {"path": paths, "split": "test", "issue": "near_duplicate", "is_near_duplicate_issue": True,
         "near_duplicate_score": near[indices, 0], "near_duplicate_sets": others}
    )  # fmt: skip


def list_images(classes: Sequence[str], seen: dict[str, Seen]) -> pd.DataFrame:
    """A row an image: path, split, given_label (None where unknown), digest (a number, -1 of one that cannot be
    read), width, height (0 of one that was not decoded), is_rotated, and set and bits, as `find_sets` has them."""
    parts = []
    for split, one in seen.items():
        columns = one.samples.table.to_pandas()
        labels = columns["label"].fillna(-1).to_numpy(int)
        columns["given_label"] = np.array([*classes, None], object)[labels]
        kept = {name: one.looks[name] for name in ("width", "height", "is_rotated")}
        parts.append(columns.assign(split=split, **kept))
    images = pd.concat(parts, ignore_index=True).drop(columns="label")
    images["digest"] = pd.factorize(images["digest"])[0]
    digests, looks = images["digest"].to_numpy(), np.concatenate([one.looks for one in seen.values()])
    is_read = digests >= 0
    images["set"], images["bits"] = -1, np.inf
    images.loc[is_read, "set"], images.loc[is_read, "bits"] = find_sets(digests[is_read], looks[is_read])
    return images


def count_images(images: pd.DataFrame) -> dict[str, dict[str, int]]:
    """By split and class, of the test split without labels by split alone, under the name of no class."""
    names = images["given_label"].fillna("")
    return {
        str(split): {str(name): len(rows) for name, rows in of_split.groupby(names)}
        for split, of_split in images.groupby("split", sort=False)
    }


def name_unreadable(reason: str) -> str:
    return "empty" if reason == EMPTY_FILE else "truncated" if reason.startswith(CUT_OFF) else "unreadable"


def find_class_issues(classes: Sequence[str], counts: dict[str, dict[str, int]]) -> pd.DataFrame:
    """Names that differ by case and spaces alone, and classes that a labelled split lacks."""
    folded = pd.Series(["".join(name.split()).casefold() for name in classes], dtype=object)
    alike = [("train", "class_name", name) for name in np.array(classes, object)[folded.duplicated(keep=False)]]
    missing = [
        (split, "missing_class", name)
        for split, of_split in counts.items()
        for name in classes
        if "" not in of_split and of_split and name not in of_split
    ]
    return pd.DataFrame(alike + missing, columns=pd.Index(["split", "issue", "given_label"]))


def find_odd_sizes(images: pd.DataFrame) -> pd.DataFrame:
    known = images[images["width"] > 0]
    width, height = (known[name].to_numpy(float) for name in ("width", "height"))
    area, aspect = np.log(width * height), np.log(width / height)
    is_extreme = np.zeros(len(known), bool)
    if len(known) >= FEWEST_TO_COMPARE:
        is_extreme = abs(area - np.median(area)) > np.log(EXTREME_AREA)
        is_extreme |= abs(aspect - np.median(aspect)) > np.log(EXTREME_ASPECT)
    is_tiny, is_huge = np.minimum(width, height) < TINY_SIDE, width * height > HUGE_PIXELS
    kinds = {"tiny": is_tiny, "huge": is_huge, "extreme_size": is_extreme & ~is_tiny & ~is_huge}
    kinds["exif_rotated"] = known["is_rotated"].to_numpy(bool)
    return pd.concat([known.loc[is_odd, ["path", "split"]].assign(issue=kind) for kind, is_odd in kinds.items()])


def describe_duplicates(images: pd.DataFrame) -> pd.DataFrame:
    """A row an image and kind of duplicate: sets of contradicting labels first, then those across splits.

    The score is 0 of the same file, else 1 + the number of bits in which the hashes differ, over 1 + all bits.
    """
    sets = images[images["set"].duplicated(keep=False) & (images["set"] >= 0)].groupby("set", sort=False)
    parts = []
    for _, one in sorted(sets, key=lambda item: (-item[1]["given_label"].nunique(), -item[1]["split"].nunique())):
        for path, split, label, digest, bits in zip(
            *(one[name] for name in ("path", "split", "given_label", "digest", "bits")), strict=True
        ):
            is_same = (one["digest"] == digest).to_numpy()
            for kind, others in (("exact_duplicate", is_same & (one["path"] != path)), ("near_duplicate", ~is_same)):
                if others.any():
                    score = 0.0 if kind == "exact_duplicate" else (1 + bits) / (1 + NUM_BITS)
                    parts.append((path, split, kind, label, True, score, name_paths(one["path"][others])))
    columns = ["path", "split", "issue", "given_label", *COLUMNS[-3:]]
    return pd.DataFrame(parts, columns=pd.Index(columns))


def name_paths(paths: Sequence[str]) -> str:
    more = [f"and {len(paths) - MAX_NAMED} more"] * (len(paths) > MAX_NAMED)
    return "; ".join([*paths[:MAX_NAMED], *more])


def drop_duplicates(dataset: Dataset, seen: dict[str, Seen]) -> tuple[Dataset, pd.DataFrame]:
    """The data set with one of each set of duplicates in training, none of a set that val or test has one of; and
    what was dropped, as rows of data_issues.csv.

    Raises: UserError where no image of a class is left.
    """
    images = list_images(dataset.classes, seen)
    images["is_train"] = images["path"].isin(dataset.train.table["path"].to_pandas())
    images = images[images["set"] >= 0].sort_values(["is_train", "path"])
    kept = images.drop_duplicates("set").set_index("set")
    dropped = images[images["is_train"] & images["set"].duplicated()].sort_values("path")
    train = dataset.train.where(~dataset.train.table["path"].to_pandas().isin(dropped["path"]).to_numpy())
    for number, name in enumerate(dataset.classes):
        if number not in train.labels:
            raise UserError(f"--drop-duplicates: no image of class {name} is left in the training split")
    others = kept["path"].loc[dropped["set"]].to_numpy()
    rows = dropped[["path", "split", "given_label"]].assign(issue="dropped", near_duplicate_sets=others)
    return replace(dataset, train=train, val=train if dataset.val is dataset.train else dataset.val), rows


def doubt_labels(out_of_fold: pd.DataFrame | None, images: pd.DataFrame) -> pd.DataFrame | None:
    """Labels in doubt, worst first, by the off-diagonal of the confident joint (Northcutt et al., Confident Learning,
    2021), as cleanlab's filter_by="confident_learning": an image is confidently of the most probable of those classes
    whose probability reaches its mean over the images that have it as label. The score is the label's probability."""
    if out_of_fold is None:
        return None
    names = np.array([column[2:] for column in out_of_fold.columns if column.startswith("p_")], object)
    chances = out_of_fold[[f"p_{name}" for name in names]].to_numpy(float)  # (N, C)
    given = pd.Index(names).get_indexer(pd.Index(out_of_fold["label"]))
    own = chances[np.arange(len(given)), given]
    thresholds = np.array([own[given == number].mean() for number in range(len(names))])
    is_confident, guesses = chances >= thresholds, chances.argmax(1)
    confident = np.where(is_confident, chances, -1).argmax(1)
    is_doubtful = is_confident.any(1) & (confident != given) & (guesses != given)
    rows = pd.DataFrame({"path": out_of_fold["path"], "issue": "label", "is_label_issue": True, "label_score": own,
                         "given_label": names[given], "predicted_label": names[guesses]})  # fmt: skip
    rows["split"] = rows["path"].map(images.set_index("path")["split"])
    return rows[is_doubtful].sort_values("label_score", kind="stable")


def tell_counts(counts: dict[str, dict[str, int]]) -> str:
    parts = []
    for split, of_split in counts.items():
        named = [f"{name} {count}" for name, count in of_split.items() if name]
        if len(named) > MAX_CLASSES:
            named = [f"{len(named)} classes of {min(of_split.values())} to {max(of_split.values())}"]
        parts.append(f"{split} {sum(of_split.values())}" + f" ({', '.join(named)})" * bool(named))
    return f"images: {'; '.join(parts)}"


def tell_issues(table: pd.DataFrame, images: pd.DataFrame) -> list[str]:
    """One line a kind, with the worst of it."""
    lines = []
    for what, kinds in LINES.items():
        rows = table[table["issue"].isin(kinds)]
        if len(rows):
            lines.append(f"{what}: {len(rows)} ({name_first(rows['path'].fillna(rows['given_label']))})")
    groups = images[(images["set"] >= 0) & images["set"].duplicated(keep=False)].groupby("set")
    if len(groups):
        num_labels, num_splits = groups["given_label"].nunique(), groups["split"].nunique()
        worst = images[images["set"] == (num_labels + num_splits).idxmax()]
        told = [f"{len(groups)} set{'s' * (len(groups) > 1)} of {groups.size().sum()} images"]
        told += [f"{count} across splits" for count in [(num_splits > 1).sum()] if count]
        told += [f"{count} with different labels" for count in [(num_labels > 1).sum()] if count]
        lines.insert(0, f"duplicates: {', '.join(told)} ({name_first(worst['path'])})")
    return lines


def name_first(names: pd.Series) -> str:
    return ", ".join([*names.iloc[:3], *["…"] * (len(names) > 3)])


def tell_imbalance(counts: dict[str, dict[str, int]]) -> list[str]:
    labelled = pd.DataFrame([counts.get("train", {}), counts.get("val", {})]).sum()
    if not len(labelled) or labelled.min() * IMBALANCE >= labelled.max():
        return []
    ordered = labelled.sort_values()
    least, most = (f"{ordered.index[at]} {ordered.iloc[at]:.0f}" for at in (0, -1))
    return [f"classes are uneven: {least}, {most}; --class-weights auto weighs them alike"]


def tell_unseen(images: pd.DataFrame, skipped: Sequence[Skipped], source: Source) -> list[str]:
    """Nothing of drawings, of which no two are alike."""
    is_unseen = (images["digest"] >= 0) & (images["width"] == 0)
    num_unseen = (is_unseen & ~images["path"].isin([one.path for one in skipped])).sum()
    if not num_unseen or isinstance(source, SyntheticSource):
        return []
    told = "exact duplicates are told, and test images near to training ones by their features"
    return [f"not decoded: {num_unseen} images, of which {told}; plates check-data tells all"]
