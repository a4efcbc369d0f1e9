"""Data, run directory, checkpoint and cache in a real S3 server on loopback."""

import hashlib
import io
import json
import logging
import os
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs
from test_store import run_beside
from test_train import CONFIG, assert_same, train_on

from plates import storage
from plates.cluster import Plan
from plates.dataset import load_dataset
from plates.preflight import probe_nodes
from plates.rundir import find_run, write_atomically
from plates.sources import FolderSource
from plates.storage import UriPath, place_of
from ray_jobs import compare, predict, show, train, tune

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
    assert train.main([*flags, "--log-to", "tensorboard", "--out", f"{bucket}/b"]) == 0
    assert [place.suffix for place in UriPath(f"{bucket}/b/tensorboard").iterdir()] == [".plates"]
    assert json.loads(UriPath(f"{bucket}/b/config.json").read_text())["has_reused_features"]
    again = ["--checkpoint", f"{bucket}/a/checkpoint", "--data", f"{bucket}/wrapped/photos/test"]
    assert predict.main([*again, "--precision", "fp32", "--num-workers", "0", "--out", f"{bucket}/again"]) == 0
    again = read_csv(f"{bucket}/again/predictions.csv")
    assert list(again["id"]) == list(there["id"])
    assert abs(again["p_dirty"] - there["p_dirty"]).max() < 1e-5
    assert show.main(["--run", f"{bucket}/a"]) == show.main(["--run", str(tmp_path / "here")]) == 0
    sheet = UriPath(f"{bucket}/a/show/thumbnails/0.jpg").read_bytes()
    assert sheet == (tmp_path / "here" / "show" / "thumbnails" / "0.jpg").read_bytes()
    assert '"folder":null' in UriPath(f"{bucket}/a/show/index.html").read_text()
    assert compare.main([str(tmp_path / "here"), f"{bucket}/a", "--out", f"{bucket}/compared"]) == 0
    said = capfd.readouterr()
    assert "Test images: 7 shared, runs disagree on 0" in said.out
    assert read_csv(f"{bucket}/compared/compare.csv")["run"].tolist() == [str(tmp_path / "here"), f"{bucket}/a"]
    assert "testing-secret" not in said.out + said.err


def test_an_archive_and_a_table_in_s3_are_the_folder(folder, bucket, tmp_path, monkeypatch):
    """The archive unpacked into a cache in S3, too; an unpacking that was cut off there is begun again."""
    monkeypatch.setenv("PLATES_CACHE", f"{bucket}/cache")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, f"wrapped/{file.relative_to(folder)}")
    data = (tmp_path / "photos.zip").read_bytes()
    UriPath(f"{bucket}/photos.zip").write_bytes(data)
    unpacked = UriPath(f"{bucket}/cache/archives/{hashlib.sha256(data).hexdigest()}/wrapped")
    (unpacked / "test" / "0.jpg").write_bytes(b"half")
    rows = [f"{file.relative_to(folder)},{file.parent.name}" for file in folder.glob("train/*/*.*")]
    (folder / "table.csv").write_text("\n".join(["path,label", *rows]))
    upload(folder, f"{bucket}/photos")
    here, there, table = (
        load_dataset(str(place), 0) for place in (folder, f"{bucket}/photos.zip", f"{bucket}/photos/table.csv")
    )
    assert (here.train, here.val, here.test) == (there.train, there.val, there.test)
    assert (here.train, here.val) == (table.train, table.val)
    for sample in (*here.train, *here.test):
        assert there.source.read_bytes(sample.path) == (folder / sample.path).read_bytes()
    assert table.source.check("train/dirty/1.png") == here.source.check("train/dirty/1.png")
    (unpacked / "test" / "0.jpg").unlink()
    assert len(load_dataset(f"{bucket}/photos.zip", 0).test) == 6  # not unpacked again


def test_two_runs_of_the_same_features_in_s3_both_end_right(folder, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("PLATES_CACHE", f"{bucket}/shared-cache")
    config = replace(CONFIG, data=str(folder))
    first, second = run_beside(config, tmp_path, monkeypatch)
    assert_same(first, second, tolerance=1e-6)
    assert all(place.suffix == ".arrow" for place in walk(UriPath(f"{bucket}/shared-cache")))
    monkeypatch.setattr(FolderSource, "read", None)  # a third one reads no image again
    assert_same(first, train_on(0, config, tmp_path / "c"), tolerance=1e-6)


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
        few = ["--num-trials", "3", "--folds", "2", "--cv-repeats", "1", "--num-workers", "0", "--search", "recipe"]
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


@pytest.mark.parametrize("after_s", [0.02, 0.1, 0.2])
def test_an_interrupted_write_leaves_the_old_object_or_the_whole_new_one(after_s, bucket):
    """Ctrl-C somewhere in an upload of several parts."""
    place, old, new = UriPath(f"{bucket}/run/state"), b"old", bytes(40 << 20)
    place.write_bytes(old)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            write_atomically(
                place, lambda file: file.write_bytes(new) and signal.setitimer(signal.ITIMER_REAL, after_s)
            )
            time.sleep(1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert place.read_bytes() in (old, new)


def test_several_delete_one_folder_at_once(bucket):
    barrier = threading.Barrier(4)

    def remove(folder: UriPath) -> None:
        barrier.wait()
        storage.remove_tree(folder)

    with ThreadPoolExecutor(4) as pool:
        for index in range(10):
            folder = UriPath(f"{bucket}/parts-{index}")
            for name in "abcd":
                (folder / name).write_bytes(b"part")
            list(pool.map(remove, [folder] * 4))
            assert not folder.exists()


def test_any_character_of_a_key_comes_back_from_a_listing(bucket):
    folder, names = UriPath(f"{bucket}/odd"), ["what?.jpg", "a#b.jpg", "50%.jpg", "a b.jpg", "é.jpg", "a+b&c=d.jpg"]
    for name in names:
        (folder / name).write_bytes(name.encode())
    found = sorted(folder.iterdir())
    assert [place.name for place in found] == sorted(names)
    assert [place.read_text() for place in found] == sorted(names)
    assert [str(place.relative_to(folder)) for place in found] == sorted(names)


def test_options_of_a_connection_stay_with_its_places(bucket, monkeypatch):
    address = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    folder = place_of("--out", f"{bucket}/optional/?scheme=http&endpoint_override={address}")
    (folder / "b?c").write_bytes(b"here")
    assert str(folder).startswith(f"{bucket}/optional?scheme=http")
    assert [place.read_text() for place in folder.iterdir()] == ["here"]


def test_the_home_of_nobody_is_said(capsys):
    assert train.main(["--data", "~no-such-user-here/photos", "--num-workers", "0"]) == 2
    assert "--data ~no-such-user-here/photos: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--data", "--out", "--weights"])
def test_a_place_that_cannot_be_named_or_looked_up_is_one_line(flag, tmp_path, monkeypatch, capsys):
    """Before anything is computed: the report, tables and Arrow take UTF-8 alone."""
    monkeypatch.chdir(tmp_path)
    names = {os.fsdecode(b"caf\xe9"): "its name is not UTF-8; rename it", "x" * 300: "File name too long"}
    for name, reason in names.items():
        assert train.main(["--num-workers", "0", flag, name]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"plates train: {flag} ")
        assert reason in message


def test_a_preflight_in_s3_leaves_no_file(bucket):
    run, cache = UriPath(f"{bucket}/preflight/run"), UriPath(f"{bucket}/preflight/cache")
    (probe,) = probe_nodes(Plan(0, "cpu", 1, "test"), load_dataset("synthetic:8", 0), run, cache)
    assert probe.problems == ()
    assert list(walk(UriPath(f"{bucket}/preflight"))) == []
    assert find_run(str(run), "train", CONFIG) == run
