"""Every setting, once: the dataclasses that become the flags."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any, Literal, cast, get_args

import tyro

from plates.backbones import BACKBONES, find_backbone

Backbone = Annotated[str, tyro.conf.arg(metavar="|".join(["auto", *BACKBONES, "timm/NAME"]))]
Trainable = Literal["head", "layer4", "all"]
Device = Literal["auto", "cpu", "cuda"]
Difficulty = Literal["easy", "hard"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
NumWorkers = Annotated[Literal["auto"] | int, tyro.conf.arg(metavar="auto|N")]

# The published loop is run in full where all its epochs are predicted, from its first ones, to take no longer.
PUBLISHED_LIMIT_S, NUM_PUBLISHED_EPOCHS = 180.0, 3

DEFAULT_NUM_SYNTHETIC = 40  # as many labelled images as the published data set

EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_SOME_UNREADABLE = 0, 1, 2, 3


class UserError(Exception):
    """A mistake that the user can mend: its message names the setting, its value and the rule."""


def is_drawn(data: str) -> bool:
    """Whether --data asks for drawings, and does not name a folder such as synthetic_plates."""
    return data.partition(":")[0] == "synthetic"


def parse_drawn(data: str) -> tuple[int, Difficulty] | None:
    """(number of labelled plates, difficulty) of synthetic[:N[:easy|hard]]; None of what does not follow that."""
    found = re.fullmatch(f"synthetic(?::([0-9]+)(?::({'|'.join(get_args(Difficulty))}))?)?", data)
    num_labelled = int(found[1] or DEFAULT_NUM_SYNTHETIC) if found else 0
    return (num_labelled, cast(Difficulty, found[2] or "easy")) if found and num_labelled >= 4 else None


AT_LEAST_1 = ("cpus_per_worker", "epochs", "step_size", "global_batch_size", "num_views", "num_trials", "cv_repeats",
              "repeats")  # fmt: skip
# By setting, in whichever job it is: what its value must be, unless it is None, and what is said where it is not.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("data", bool, "give synthetic, synthetic:N or a folder"),
    (
        "data",
        lambda data: not is_drawn(data) or parse_drawn(data) is not None,
        "drawn plates are synthetic[:N[:easy|hard]], N a whole number of at least 4",
    ),
    ("out", bool, "give a directory, or leave the flag out"),
    ("checkpoint", bool, "give RUN/checkpoint"),
    ("weights", bool, "give imagenet, none or a file"),
    ("num_workers", lambda count: count == "auto" or count >= 0, "must be auto, 0 or more"),
    ("wait_for_nodes_s", lambda time_s: time_s >= 0, "must be at least 0"),
    ("lr", lambda lr: 0 < lr < inf, "must be a number above 0"),
    ("gamma", lambda gamma: 0 < gamma <= 1, "must be above 0 and at most 1"),
    ("image_size", lambda size: 32 <= size <= 4096, "must be 32 to 4096"),
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


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    data: str = "synthetic"
    """Images: synthetic[:N[:easy|hard]] (N drawn plates, easy by default), a folder with train/CLASS/*, optional
    val/CLASS/*, test/**, one that plates prepare packed, or a URI (s3://, gs://) of either."""
    out: str | None = None
    """Run directory [default: runs/JOB-TIME]. A finished or a different run in it is never overwritten."""
    skip_unreadable: bool = False
    """Go on without labelled images that cannot be read; they are listed in skipped.csv."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(Config):
    num_workers: NumWorkers = "auto"
    """Ray workers; 0 runs in this process. auto: one a GPU (or CPU node) in a cluster, else by this machine."""
    device: Device = "auto"
    """Where tensors live. auto: cuda where torch sees it."""
    precision: Precision = "auto"
    """Of the trunk. auto: bf16 where the device computes it, fp16 on older GPUs, else fp32."""
    cpus_per_worker: int | None = None
    """CPU cores of each Ray worker, or of this process [default: an equal share of what there is]."""
    wait_for_nodes_s: float = 1200.0
    """Seconds that a job waits on a cluster for nodes that start and for room that other jobs take."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    backbone: Backbone = "auto"
    """Trunk, timm/NAME any of timm's. auto: resnet18 where its weights can be had, else efficientnet_lite0."""
    weights: str = "imagenet"
    """Trunk weights: imagenet (of timm/NAME what timm has), none (random), or a .pth or .safetensors file of the
    backbone."""
    trainable: Trainable = "head"
    """What is trained: the new head, the last stage and the head (layer4), or all."""
    epochs: int = 100
    """Passes over the training images."""
    lr: float = 1e-3
    """Adam's learning rate at the start."""
    step_size: int = 7
    """StepLR: epochs between two cuts of the learning rate."""
    gamma: float = 0.1
    """StepLR: factor of each cut."""
    global_batch_size: int = 8
    """Images an optimizer step, summed over all workers."""
    image_size: int | None = None
    """Side of the square that the model sees, in pixels [default: 224; of timm/NAME its own]."""
    seed: int = 0
    """Seed of the head, the order, the views and the drawings."""
    num_views: int | None = None
    """Different augmented views of each image, reused in turn over the epochs [default: one an epoch]."""

    def __post_init__(self) -> None:
        try:
            own = find_backbone("resnet18" if self.backbone == "auto" else self.backbone).image_size
        except ValueError as error:
            raise UserError(f"--backbone {self.backbone}: {error}") from error
        size = own if self.image_size is None else self.image_size
        object.__setattr__(self, "image_size", size)  # as resolved, for config.json and all that reads it
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig, WorkerConfig, DataConfig):
    """Fine-tune a classifier, predict the test split, write a report.

    With no flags it trains on drawn plates on this machine. A folder of photos:
    plates train --data PHOTOS --out runs/mine
    """


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Sweep lr, step_size and gamma by cross-validation, retrain the winner on all labelled images, report.

    The schedule of --lr, --step-size and --gamma is always among the trials, as the baseline:
    plates tune --data PHOTOS --out runs/sweep
    """

    num_trials: int = 64
    """Schedules tried, the baseline included."""
    folds: int = 5
    """Folds of the stratified cross-validation."""
    cv_repeats: int = 4
    """Repetitions of the cross-validation, each with other folds."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(ModelConfig, DataConfig):
    """Run the same training and inference on each device and number of workers, as one table.

    Every row is a process of its own with an empty cache, beside the published loop on each device, which is
    extrapolated from its first epochs where all would take more than 3 minutes:
    plates benchmark --data synthetic:2000 --num-views 2 --worker-counts 1 2
    """

    devices: tuple[Literal["cpu", "cuda"], ...] = ()
    """Devices to compare [default: what there is]."""
    worker_counts: tuple[int, ...] = ()
    """Numbers of Ray workers [default: powers of two up to what there is]; one process without Ray comes on top."""
    repeats: int = 3
    """Runs of each row, in interleaved order."""
    scaling: Literal["strong", "weak"] = "strong"
    """strong: the same work on more workers; weak: N workers get N times the drawn plates and of the global batch, so
    that the images a worker and step stay the same, and lr times the square root of N (Malladi et al., 2022)."""
    precision: Precision = "auto"
    """Of the trunk, in all rows but the published loop, which is fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (least := min(self.worker_counts, default=1)) < 1:
            raise UserError(f"--worker-counts {least}: must be at least 1")
        if self.scaling == "weak" and not is_drawn(self.data):
            raise UserError(f"--scaling weak: needs --data synthetic:N, whose size can grow, not {self.data}")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(WorkerConfig, DataConfig):
    """Predict a test split, or a plain folder of images, from a checkpoint alone."""

    checkpoint: str
    """RUN/checkpoint of a finished training run."""
    skip_unreadable: bool = False
    """Changes nothing here: images to predict that cannot be read are always left out, listed in skipped.csv, and
    end the job with exit code 3."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(DataConfig):
    """Check, split and pack a data set into Parquet shards, for more images than fit into memory or into folders.

    plates prepare --data PHOTOS --out PACKED && plates train --data PACKED
    """

    num_workers: NumWorkers = "auto"
    """Ray workers; 0 packs in this process."""
    seed: int = 0
    """Seed of the drawings."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Config):
    """Check what a job would run on, and that every node can do its part: a table, exit code 2 where one cannot.

    plates check --address HOST:6379 --num-workers 8 --data /nfs/PHOTOS --out /nfs/runs/a
    """

    address: str | None = None
    """Ray cluster, HOST:PORT [default: RAY_ADDRESS, else this machine]."""
    data: str = "synthetic"
    """Images that every node must be able to read."""
    out: str | None = None
    """Run directory of the job to come, in which every node must be able to write [default: here]."""
    num_workers: NumWorkers = "auto"
    """Ray workers of the job to come."""
    device: Device = "auto"
    """Their device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address and "://" in self.address:
            raise UserError(f"--address {self.address}: give HOST:PORT, or plates submit check --address URL")


JOB_CONFIGS = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "predict": PredictConfig,
    "benchmark": BenchmarkConfig,
    "check": CheckConfig,
}
JobConfig = DataConfig | CheckConfig
