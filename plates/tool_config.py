"""Settings of the jobs around training, and of all jobs by their names."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from plates.config import (
    BenchmarkConfig,
    DataConfig,
    Device,
    NumWorkers,
    Precision,
    PredictConfig,
    TrainConfig,
    TuneConfig,
)
from plates.rules import Config, UserError, is_loopback


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """Predict images that are sent over HTTP, from a checkpoint, until Ctrl-C; a page to try it is at /.

    plates serve --checkpoint RUN/checkpoint, and then
    curl -F image=@PHOTO.jpg http://127.0.0.1:8000/predict
    """

    checkpoint: str
    """RUN/checkpoint of a finished training run."""
    host: str = "127.0.0.1"
    """Address to listen on, in a cluster its head node's; one beyond this machine demands a token."""
    port: int = 8000
    """Port to listen on."""
    token: str | None = None
    """What a request must bring as Authorization: Bearer TOKEN [default: PLATES_TOKEN, which ps does not show]."""
    num_replicas: NumWorkers = "auto"
    """Copies of the model. auto: by the number of requests, at most one a GPU (or CPU node) that there is now."""
    device: Device = "auto"
    """Where tensors live. auto: cuda where Ray has a GPU."""
    precision: Precision = "auto"
    """Of the trunk. auto: bf16 where the device computes it, fp16 on older GPUs, else fp32."""
    max_batch_size: int = 32
    """Images, of any requests, that a replica computes at once."""
    max_body_mb: int = 20
    """Limit in MB of a request."""
    abstain_below: float | None = None
    """Probability, 0.5 to 1, below which the label is unsure."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "token", self.token or os.environ.get("PLATES_TOKEN") or None)
        if not self.token and not is_loopback(self.host):
            raise UserError(f"--host {self.host}: reaches beyond this machine; set --token or PLATES_TOKEN")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Write a checkpoint, its preprocessing included, as one file that runs without this package.

    It takes images (B, H, W, 3) and gives probabilities, and is compared with the checkpoint before it is kept:
    plates export --checkpoint RUN/checkpoint --format onnx
    """

    checkpoint: str
    """RUN/checkpoint of a finished training run."""
    format: Literal["onnx", "torch", "timm"] = "onnx"
    """onnx, for ONNX Runtime; torch, for torch.export.load; timm, a folder for timm.create_model, of the model
    without its preprocessing."""
    out: str | None = None
    """File, of timm folder [default: model.onnx, model.pt2 or timm in the checkpoint]."""


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


@dataclass(frozen=True, kw_only=True)
class CheckDataConfig(DataConfig):
    """Tell what is odd about a data set: files that cannot be read, duplicates, above all across its splits, odd
    sizes, classes. A page and data_issues.csv; nothing is changed.

    plates check-data --data PHOTOS
    """

    skip_unreadable: bool = False
    """Changes nothing here: images that cannot be read are always told, and end the job with exit code 3."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Config):
    """Write one page of every image by class and split, to search and to sort, with what a run says of it.

    plates show --run runs/mine
    """

    run: str | None = None
    """Run directory whose predictions and data issues are shown, those that are wrong first."""
    data: str | None = None
    """Images, as of the other jobs [default: RUN's, else synthetic]."""
    out: str | None = None
    """Directory of the page [default: RUN/show, else runs/show-TIME]. A finished one is never overwritten."""
    seed: int | None = None
    """Seed of the drawings and the views [default: RUN's, else 0]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run and self.out is None:
            base, mark, query = self.run.partition("?") if "://" in self.run else (self.run, "", "")
            object.__setattr__(self, "out", f"{base.rstrip('/')}/show{mark}{query}")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """Lay finished runs of train, tune and predict side by side: settings, figures, times, curves, predictions.

    plates compare runs/a runs/b
    """

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN RUN …")]
    """Run directories or URIs."""
    out: str | None = None
    """Directory of the comparison [default: runs/compare-TIME]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) < 2:
            raise UserError(f"RUN {''.join(self.runs) or 'is missing'}: give at least two runs")


JOB_CONFIGS = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
    "benchmark": BenchmarkConfig,
    "show": ShowConfig,
    "check": CheckConfig,
    "check-data": CheckDataConfig,
    "compare": CompareConfig,
}
JobConfig = DataConfig | ExportConfig | ServeConfig | ShowConfig | CheckConfig | CompareConfig
