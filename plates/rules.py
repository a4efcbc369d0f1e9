"""What settings must be, and what is said where they are not."""

import ipaddress
import re
from collections.abc import Callable
from math import inf
from typing import Any, Literal, cast, get_args

Difficulty = Literal["easy", "hard"]

DEFAULT_NUM_SYNTHETIC = 40  # as many labelled images as the published data set
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # of a class: 32-bit floats have room for their quotients
KAGGLE = r"kaggle:[\w-]+(/[\w-]+)?"
READOUT = r"last/(avg|max|token|patches)|(pre|stage[1-9]\d*)/(avg|max)"


class UserError(Exception):
    """A mistake that the user can mend: its message names the setting, its value and the rule."""


# All that --data may name.
DATA_KINDS = (
    "synthetic[:N[:easy|hard]], a folder with train/CLASS/*, a .zip of one, kaggle:NAME, kaggle:OWNER/NAME, "
    "a .csv or .parquet table of path,label[,split], or a folder of Parquet shards"
)


def is_drawn(data: str) -> bool:
    """Whether --data asks for drawings, and does not name a folder such as synthetic_plates."""
    return data.partition(":")[0] == "synthetic"


def parse_drawn(data: str) -> tuple[int, Difficulty] | None:
    """(number of labelled plates, difficulty) of synthetic[:N[:easy|hard]]; None of what does not follow that."""
    found = re.fullmatch(f"synthetic(?::([0-9]+)(?::({'|'.join(get_args(Difficulty))}))?)?", data)
    num_labelled = int(found[1] or DEFAULT_NUM_SYNTHETIC) if found else 0
    return (num_labelled, cast(Difficulty, found[2] or "easy")) if found and num_labelled >= 4 else None


def is_readout(readout: str) -> bool:
    """Whether every part of it, joined by +, names a stage and a pooling, none twice."""
    parts = readout.split("+")
    return all(re.fullmatch(READOUT, part) for part in parts) and len({*parts}) == len(parts)


def parse_class_weights(class_weights: str) -> dict[str, float] | None:
    """The weights by class of NAME=W,…; None of what does not follow that. A name may hold commas and =."""
    found = re.findall(r"(.+?)=([0-9.eE+-]+)(?:,|$)", class_weights)
    if ",".join(map("=".join, found)) != class_weights or len(dict(found)) < len(found):
        return None
    try:
        weights = {name: float(weight) for name, weight in found}
    except ValueError:
        return None
    return weights if all(LEAST_WEIGHT <= weight <= MOST_WEIGHT for weight in weights.values()) else None


def is_loopback(host: str) -> bool:
    """Whether it is reached from this machine alone; of a name that is not localhost nobody knows."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


AT_LEAST_1 = ("cpus_per_worker", "epochs", "step_size", "global_batch_size", "num_views", "num_trials", "cv_repeats",
              "repeats", "tta", "budget_s", "max_batch_size", "max_body_mb")  # fmt: skip
# By setting, in whichever job it is: what its value must be, unless it is None, and what is said where it is not.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("data", bool, f"give {DATA_KINDS}"),
    (
        "data",
        lambda data: not is_drawn(data) or parse_drawn(data) is not None,
        "drawn plates are synthetic[:N[:easy|hard]], N a whole number of at least 4",
    ),
    (
        "data",
        lambda data: not data.startswith("kaggle:") or bool(re.fullmatch(KAGGLE, data)),
        "give kaggle:NAME of a competition or kaggle:OWNER/NAME of a data set, as in its address",
    ),
    ("out", bool, "give a directory, or leave the flag out"),
    ("run", bool, "give the directory of a run"),
    ("checkpoint", bool, "give RUN/checkpoint"),
    ("host", bool, "give an address of this machine"),
    ("port", lambda port: 1 <= port <= 65535, "must be 1 to 65535"),
    ("token", bool, "give one, or leave the flag out"),
    ("num_replicas", lambda count: count == "auto" or count >= 1, "must be auto, 1 or more"),
    ("weights", bool, "give imagenet, none or a file"),
    ("num_workers", lambda count: count == "auto" or count >= 0, "must be auto, 0 or more"),
    *((name, lambda value: value >= 0, "must be at least 0") for name in ("wait_for_nodes_s", "cache_gb")),
    ("lr", lambda lr: 0 < lr < inf, "must be a number above 0"),
    ("gamma", lambda gamma: 0 < gamma <= 1, "must be above 0 and at most 1"),
    ("image_size", lambda size: 32 <= size <= 4096, "must be 32 to 4096"),
    ("readout", is_readout, "give last/avg, last/max, pre/max, stage3/avg or the like, several joined by +"),
    (
        "class_weights",
        lambda weights: weights in ("none", "auto") or bool(parse_class_weights(weights)),
        "give none, auto or NAME=W,NAME=W,… with each W from 0.000001 to 1000000 and no class twice",
    ),
    ("abstain_below", lambda chance: 0.5 <= chance <= 1, "must be 0.5 to 1"),
    ("seed", lambda seed: 0 <= seed < 2**32, "must be 0 to 4294967295"),
    ("folds", lambda count: count >= 2, "must be at least 2"),
    *((name, lambda count: count >= 1, "must be at least 1") for name in AT_LEAST_1),
)


class Config:
    """Checks its settings by the rules above. Raises: UserError naming the flag, its value and the rule."""

    def __post_init__(self) -> None:
        for name, is_met, rule in RULES:
            value = getattr(self, name, None)
            if value is not None and not is_met(value):
                shown = "is empty" if value == "" else value
                raise UserError(f"--{name.replace('_', '-')} {shown}: {rule}")
