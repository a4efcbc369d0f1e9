"""Every setting, once: the dataclasses that become the flags."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from plates.backbones import BACKBONES, OWN_READOUT, find_backbone
from plates.rules import Config, UserError, is_drawn

Backbone = Annotated[str, tyro.conf.arg(metavar="|".join(["auto", *BACKBONES, "timm/NAME"]))]
Trainable = Literal["head", "layer4", "all"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Crop = Literal["none", "foreground"]
Resize = Literal["squash", "border", "center"]
Augment = Literal["crop", "dihedral", "both"]
ClassWeights = Annotated[str, tyro.conf.arg(metavar="none|auto|NAME=W,NAME=W")]
Tracker = Literal["tensorboard", "mlflow"]
NumWorkers = Annotated[Literal["auto"] | int, tyro.conf.arg(metavar="auto|N")]

# The published loop is run in full where all its epochs are predicted, from its first ones, to take no longer.
PUBLISHED_LIMIT_S, NUM_PUBLISHED_EPOCHS = 180.0, 3

NUM_SYMMETRIES = 8  # rotations by quarter turns and mirrorings of a square, the identity among them

EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_SOME_UNREADABLE = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    data: str = "synthetic"
    """Images: synthetic[:N[:easy|hard]] (N drawn plates, easy by default); a folder with train/CLASS/*, optional
    val/CLASS/*, test/** (scored where it is test/CLASS/*); a .zip of one; kaggle:NAME (a competition) or
    kaggle:OWNER/NAME (a data set); a .csv or .parquet table of path,label[,split]; or Parquet shards, of plates
    prepare or Hugging Face. Places are paths or URIs (s3://, gs://)."""
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
    cache_gb: float = 20.0
    """Limit in GB of the features stored on a disk, at the end of a run: the least recently used go, none in use."""
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
    """Different augmented views of each image, reused in turn over the epochs [default: one an epoch; 8 of --augment
    dihedral or --head logistic]."""

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

    readout: str = OWN_READOUT
    """What the head reads, PART/POOLING, several joined by +. Parts: last, pre (before a final convolution), stage1
    and so on; avg or max of each. last/avg is the trunk's own output; of a ViT also last/token, last/patches."""
    crop: Crop = "none"
    """foreground: only the box of what is not background, where that is plain; else the whole image."""
    resize: Resize | None = None
    """From an image to a square: squash, border (padded), center (cut) [default: squash; of timm/NAME its own]."""
    augment: Augment = "crop"
    """Views to train on: random resized crops and flips; the 8 rotations and mirrorings (dihedral); or both."""
    tta: int = 1
    """Views of --augment that a prediction averages, the image as it is first; costs as many passes of the trunk."""
    drop_duplicates: bool = False
    """Train on one of each set of images that are or look the same, and on none that val or test has, too."""
    head: Literal["adam", "logistic"] = "adam"
    """adam: by the schedule of --lr; logistic: L2-regularised, to convergence, its strength by cross-validation."""
    class_weights: ClassWeights = "none"
    """How much an image counts in the loss, by class. auto: as much less as its class has more training images;
    NAME=W: as given, 1 of a class not named."""
    log_to: Tracker | None = None
    """Curves, figures and settings also go, at the end, to tensorboard (OUT/tensorboard), or to mlflow
    (MLFLOW_TRACKING_URI, else MLflow's default) with report and checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "logistic" and self.trainable != "head":
            raise UserError(f"--head logistic: trains the head alone, not --trainable {self.trainable}")
        if self.augment == "dihedral":
            for flag, count in (("--tta", self.tta), ("--num-views", self.num_views or 1)):
                if count > NUM_SYMMETRIES:
                    raise UserError(f"{flag} {count}: --augment dihedral has {NUM_SYMMETRIES} views")

    @property
    def train_views(self) -> range:
        """The numbers of the views to train on: from 0 those that are drawn, from -1 down the symmetries."""
        if self.augment == "dihedral":
            return range(-1, -1 - (self.num_views or NUM_SYMMETRIES), -1)
        return range(self.num_views or (NUM_SYMMETRIES if self.head == "logistic" else self.epochs))

    @property
    def eval_views(self) -> list[int]:
        """The numbers of the views that validation and prediction average; -1 is the image as it is."""
        return [*range(-1, -1 - self.tta, -1)] if self.augment == "dihedral" else [-1, *range(self.tta - 1)]


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Search the best model for a folder by cross-validation, retrain it on all labelled images, report.

    What the other flags say, by default the published recipe, is always among the trials, as the baseline:
    plates tune --data PHOTOS --out runs/sweep
    """

    search: Literal["recipe", "all"] | None = None
    """recipe: lr, step_size and gamma; all: beside them what the head sees (image size, crop, views, readout) and
    logistic regression [default: all; recipe where more than the head is trained]."""
    budget_s: float = 600.0
    """Seconds for a search of all: what of it would take longer is left out, and named."""

    num_trials: int = 64
    """Schedules tried, the baseline included."""
    folds: int = 5
    """Folds of the stratified cross-validation."""
    cv_repeats: int = 4
    """Repetitions of the cross-validation, each with other folds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        search = self.search or ("all" if self.trainable == "head" else "recipe")
        object.__setattr__(self, "search", search)
        if search == "all" and self.trainable != "head":
            raise UserError(f"--search all: trains the head alone; --trainable {self.trainable} has --search recipe")
        if self.head == "logistic":
            raise UserError("--head logistic: the baseline of a sweep is trained by adam; --search all tries both")


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
    tta: int | None = None
    """Views that a prediction averages [default: as the checkpoint was trained with]."""
    abstain_below: float | None = None
    """An image gets the label unsure where its most probable class has less than this probability, 0.5 to 1, but for
    submission.csv [default: every image gets a class]."""
    explain: bool = False
    """Show what decided: in explained/ and the report the least and the most confident images, and wrong ones, under
    the map of what speaks for the predicted class."""
    skip_unreadable: bool = False
    """Changes nothing here: images to predict that cannot be read are always left out, listed in skipped.csv, and
    end the job with exit code 3."""
