"""Experiment trackers: a run's curves, figures and settings in TensorBoard or MLflow, from the run's files alone."""

import json
import os
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from plates.config import Tracker, UserError
from plates.report.text import is_number
from plates.rundir import read_csv, write_atomically
from plates.storage import Place

EVENTS_FILE = "tensorboard/events.out.tfevents.plates"  # one, which a run that is taken up again writes anew
ARTIFACTS = ("config.json", "report.html", "checkpoint/model.json", "checkpoint/model.safetensors")


@dataclass(frozen=True)
class Record:
    """What is logged of a run; figures that are not finite, and counts by pairs of classes, are left out."""

    curves: dict[int, dict[str, float]]  # by epoch
    figures: dict[str, float]  # final/NAME of metrics.json
    settings: dict[str, Any]  # as they were asked for


def check_tracker(tracker: Tracker | None) -> None:
    """Raises: UserError where MLflow is asked for and not installed, or its store cannot be used."""
    if tracker != "mlflow":
        return
    if find_spec("mlflow") is None:
        raise UserError("--log-to mlflow: is not installed; pip install 'plates[mlflow]'")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it asks a dead server for minutes
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.search_experiments(max_results=1)
    except (ImportError, MlflowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--log-to mlflow: {mlflow.get_tracking_uri()} cannot be used ({reason})") from error


def log_run(run: Place, tracker: Tracker) -> None:
    """Logs a run whose files are all there. One that was logged in part before is made whole, not logged twice."""
    rows = read_csv(run / "history.csv").to_dict("records")
    metrics, config = (json.loads((run / name).read_text()) for name in ("metrics.json", "config.json"))
    record = Record(
        {row["epoch"]: {str(name): v for name, v in row.items() if name != "epoch" and is_number(v)} for row in rows},
        {f"final/{name}": v for name, v in metrics.items() if is_number(v) and "/confusion/" not in name},
        {name: value for name, value in config["requested"].items() if value is not None},
    )
    (log_to_mlflow if tracker == "mlflow" else log_to_tensorboard)(run, record)


def log_to_tensorboard(run: Place, record: Record) -> None:
    from tensorboardX.summary import hparams, scalar
    from tensorboardX.writer import FileWriter

    def write(file: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            writer = FileWriter(folder)
            for summary in hparams(record.settings, record.figures):
                writer.add_summary(summary)
            for epoch, values in [*record.curves.items(), (0, record.figures)]:
                for name, value in values.items():
                    writer.add_summary(scalar(name, value), epoch)
            writer.close()
            (events,) = Path(folder).iterdir()
            file.write_bytes(events.read_bytes())

    write_atomically(run / EVENTS_FILE, write)


def log_to_mlflow(run: Place, record: Record) -> None:
    """Into the experiment of MLFLOW_EXPERIMENT_NAME, else the default; its tag `plates.run` says which run it is."""
    import mlflow

    place = quote(str(run), safe="/:")  # a filter has no way to escape both kinds of quotes
    mine = f"tags.`plates.run` = '{place}' AND attributes.status != 'FINISHED'"
    unfinished = mlflow.search_runs(filter_string=mine, max_results=1, output_format="list")
    run_id = unfinished[0].info.run_id if unfinished else None
    with (
        tempfile.TemporaryDirectory() as folder,
        mlflow.start_run(run_id, run_name=run.name, tags={"plates.run": place}),
    ):
        for name in ARTIFACTS:
            file = Path(folder, name)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes((run / name).read_bytes())
        mlflow.log_artifacts(folder)
        mlflow.log_params(record.settings)
        for epoch, values in [*record.curves.items(), (0, record.figures)]:
            mlflow.log_metrics(values, step=epoch)
