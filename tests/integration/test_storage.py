"""Data, run directory, checkpoint and cache in a real S3 server on loopback."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from plates import storage
from plates.storage import UriPath, place_of
from ray_jobs import predict, train, tune

SMALL = ["--backbone", "resnet18", "--weights", "none", "--image-size", "32", "--epochs", "2", "--precision", "fp32"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket; credentials and address are in the environment, as users have them."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    storage.connect.cache_clear()
    store = fs.S3FileSystem(allow_bucket_creation=True, endpoint_override=f"http://{host}:{port}")
    store.create_dir("plates-test")
    yield "s3://plates-test"
    server.stop()
    storage.connect.cache_clear()


def upload(folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            UriPath(f"{uri}/{path.relative_to(folder).as_posix()}").write_bytes(path.read_bytes())


def read_csv(uri: str) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(UriPath(uri).read_bytes()))


def test_a_run_from_s3_to_s3_is_the_run_on_this_disk(folder, bucket, tmp_path, monkeypatch, capfd):
    upload(folder, f"{bucket}/wrapped/photos")
    assert train.main([*SMALL, "--data", str(folder), "--out", str(tmp_path / "here")]) == 0
    monkeypatch.setenv("PLATES_CACHE", f"{bucket}/cache")
    flags = [*SMALL, "--data", f"{bucket}/wrapped", "--num-workers", "0"]
    assert train.main([*flags, "--out", f"{bucket}/a"]) == 0
    here, there = pd.read_csv(tmp_path / "here" / "predictions.csv"), read_csv(f"{bucket}/a/predictions.csv")
    pd.testing.assert_frame_equal(here, there)
    local = {path.relative_to(tmp_path / "here").as_posix() for path in (tmp_path / "here").rglob("*.*")}
    remote = {str(path.relative_to(UriPath(f"{bucket}/a"))) for path in walk(UriPath(f"{bucket}/a"))}
    assert remote == local
    assert train.main([*flags, "--out", f"{bucket}/a"]) == 2
    assert "holds a finished run" in capfd.readouterr().err
    assert train.main([*flags, "--out", f"{bucket}/b"]) == 0
    assert json.loads(UriPath(f"{bucket}/b/config.json").read_text())["has_reused_features"]
    again = ["--checkpoint", f"{bucket}/a/checkpoint", "--data", f"{bucket}/wrapped/photos/test"]
    assert predict.main([*again, "--precision", "fp32", "--num-workers", "0", "--out", f"{bucket}/again"]) == 0
    again = read_csv(f"{bucket}/again/predictions.csv")
    assert list(again["id"]) == list(there["id"])
    assert abs(again["p_dirty"] - there["p_dirty"]).max() < 1e-5
    said = capfd.readouterr()
    assert "testing-secret" not in said.out + said.err


def walk(place: UriPath) -> Iterator[UriPath]:
    for child in place.iterdir():
        if child.is_dir():
            yield from walk(child)
        else:
            yield child


@pytest.mark.slow
def test_ray_workers_and_a_sweep_write_to_s3(folder, bucket, capfd):
    """In Ray started here and now, whose workers have the environment with the server's address."""
    import ray

    upload(folder, f"{bucket}/photos")
    ray.shutdown()
    try:
        flags = [*SMALL, "--data", f"{bucket}/photos"]
        assert train.main([*flags, "--num-workers", "2", "--trainable", "layer4", "--out", f"{bucket}/two"]) == 0
        few = ["--num-trials", "3", "--folds", "2", "--cv-repeats", "1", "--num-workers", "0"]
        assert tune.main([*flags, *few, "--out", f"{bucket}/sweep"]) == 0
    finally:
        ray.shutdown()
    assert len(read_csv(f"{bucket}/two/timing.csv")) == 3
    assert len(read_csv(f"{bucket}/sweep/trials.csv")) == 3
    for name in ("two", "sweep"):
        assert not [path for path in UriPath(f"{bucket}/{name}").iterdir() if path.name.startswith(".")]


def test_what_is_wrong_with_a_uri_is_said(bucket, capsys):
    cases = {
        "s3://no-such-bucket-here/photos": "no such folder",
        "s3://key:secret@plates-test/photos": "credentials do not belong in a URI",
        "gopher://plates-test/photos": "cannot be reached",
    }
    for uri, message in cases.items():
        assert train.main(["--data", uri, "--num-workers", "0"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert "secret@" not in said
    assert isinstance(place_of("--out", "runs/a"), Path)
