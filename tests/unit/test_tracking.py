import json
import struct
import sys
from pathlib import Path

import pytest
from conftest import free_ports
from report_runs import make_run

from plates.config import UserError
from plates.tracking import check_tracker, log_run

ASKED = {"job": "train", "lr": 0.001, "epochs": 3, "backbone": "auto", "skip_unreadable": False, "resize": None}
CURVE = {1: 0.7, 3: 0.21234}  # of train/loss in the made run, whose second epoch is not finite


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "it's a run", ["cleaned", "dirty"])
    config = json.loads((run / "config.json").read_text()) | {"requested": ASKED}
    (run / "config.json").write_text(json.dumps(config))
    (run / "checkpoint").mkdir()
    for name in ("checkpoint/model.json", "checkpoint/model.safetensors", "report.html"):
        (run / name).write_text(name)
    return run


def read_events(file: Path) -> list:
    """By the layout of TFRecord: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard_has_curves_figures_and_settings_once(run: Path) -> None:
    for _ in range(2):  # as a run that was cut off after it had logged
        log_run(run, "tensorboard")
    (file,) = (run / "tensorboard").iterdir()
    assert "tfevents" in file.name
    values = [(event.step, value) for event in read_events(file) for value in event.summary.value]
    scalars = {(value.tag, step): value.simple_value for step, value in values if not value.HasField("metadata")}
    assert {step: value for (tag, step), value in scalars.items() if tag == "train/loss"} == pytest.approx(CURVE)
    assert scalars["final/val/accuracy", 0] == 0.875
    assert len(scalars) == len(values) - 3, "none twice, and three records of settings"
    hidden = b"".join(value.metadata.plugin_data.content for _, value in values if value.HasField("metadata"))
    for name in ("lr", "epochs", "backbone", "skip_unreadable", "final/val/accuracy"):
        assert name.encode() in hidden
    assert b"resize" not in hidden


def test_mlflow_goes_on_with_the_run_that_was_cut_off(run: Path, tmp_path: Path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    check_tracker("mlflow")
    (run / "report.html").rename(run / "kept")
    with pytest.raises(FileNotFoundError):
        log_run(run, "mlflow")
    (run / "kept").rename(run / "report.html")
    log_run(run, "mlflow")
    (logged,) = mlflow.search_runs(output_format="list")
    assert (logged.info.status, logged.info.run_name) == ("FINISHED", "it's a run")
    assert logged.data.params == {name: str(value) for name, value in ASKED.items() if value is not None}
    assert logged.data.metrics["final/val/accuracy"] == 0.875
    assert not [name for name in logged.data.metrics if "confusion" in name]
    history = mlflow.MlflowClient().get_metric_history(logged.info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == CURVE
    artifacts = mlflow.artifacts.download_artifacts(run_id=logged.info.run_id, dst_path=str(tmp_path / "got"))
    assert Path(artifacts, "checkpoint/model.safetensors").read_text() == "checkpoint/model.safetensors"
    log_run(run, "mlflow")
    assert len(mlflow.search_runs(output_format="list")) == 2, "a finished one is never written again"


def test_a_tracker_that_cannot_be_used_is_said_before_anything_starts(monkeypatch) -> None:
    check_tracker("tensorboard")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "mlflow", None)
        with pytest.raises(UserError, match="--log-to mlflow: is not installed; pip install"):
            check_tracker("mlflow")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(UserError, match=r"--log-to mlflow: http://127\.0\.0\.1:.*cannot be used"):
        check_tracker("mlflow")
