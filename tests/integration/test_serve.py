"""A server on real Ray Serve, a process of its own: its answers, its batches, what it refuses and how it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import requests
from conftest import ROOT, free_ports

from ray_jobs import predict, serve, train

pytest.importorskip("fastapi")

TOKEN = "only for those who know it"
SMALL = ["--backbone", "resnet18", "--weights", "none", "--image-size", "64", "--epochs", "2", "--num-workers", "0"]
SEEN = ["--augment", "dihedral", "--tta", "2", "--num-views", "2", "--precision", "fp32"]
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def server(folder, tmp_path) -> Iterator[SimpleNamespace]:
    """Of a model of `folder`: its `url`, the address `metrics`, its `process`, and the `checkpoint`."""
    assert train.main([*SMALL, *SEEN, "--data", str(folder), "--out", str(tmp_path / "run")]) == 0
    checkpoint, port = tmp_path / "run" / "checkpoint", free_ports(1)[0]
    flags = ["--checkpoint", str(checkpoint), "--port", str(port), "--precision", "fp32", "--max-body-mb", "1",
             "--abstain-below", "0.52"]  # fmt: skip
    env = os.environ | {"PLATES_TOKEN": TOKEN, "RAY_metrics_report_interval_ms": "500"}
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen([sys.executable, "-m", "ray_jobs", "serve", *flags], cwd=ROOT, env=env,
                                   stdout=subprocess.PIPE, stderr=errors, text=True)  # fmt: skip
        try:
            assert process.stdout
            line = next((line for line in process.stdout if line.startswith("listens at ")), "")
            found = re.search(r"listens at (\S+) with 1 replica of .*; metrics at (\S+);", line)
            assert found, (tmp_path / "errors").read_text()
            yield SimpleNamespace(url=found[1], metrics=found[2], process=process, checkpoint=checkpoint)
        finally:
            process.terminate()
            process.wait(timeout=60)


def read_metrics(url: str, name: str) -> float:
    """The sum of a metric's values over all its tags."""
    found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", requests.get(url, timeout=10).text, re.MULTILINE)
    return sum(map(float, found))


def test_a_server_from_its_start_to_its_end(server, folder, tmp_path, capsys):
    out, url = tmp_path / "predicted", server.url
    assert predict.main(["--checkpoint", str(server.checkpoint), "--data", str(folder), "--out", str(out),
                         "--num-workers", "0", "--precision", "fp32", "--abstain-below", "0.52"]) == 0  # fmt: skip
    expected = pd.read_csv(out / "predictions.csv").set_index("path")

    def ask(path: str) -> dict:
        files = {"image": (path, (folder / path).read_bytes())}
        answer = requests.post(f"{url}/predict", files=files, headers=HEADERS, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    # the same answers as those of `plates predict`, of many clients at once
    num_requests = 42
    with ThreadPoolExecutor(21) as clients:
        answers = [*clients.map(ask, [*expected.index] * (num_requests // len(expected)))]
    for answer in answers:
        (one,) = answer["predictions"]
        row = expected.loc[one["name"]]
        assert one["label"] == row["label"]
        assert one["distance_quantile"] == pytest.approx(row["distance_quantile"], abs=1e-3)
        for name, chance in one["probabilities"].items():
            assert chance == pytest.approx(row[f"p_{name}"], abs=1e-5)
    several = [("image", (path, (folder / path).read_bytes())) for path in expected.index]
    together = requests.post(f"{url}/predict", files=several, headers=HEADERS, timeout=60).json()["predictions"]
    assert [one["name"] for one in together] == [*expected.index]
    assert [one["label"] for one in together] == [*expected["label"]]

    # batches were formed, and are counted
    deadline_s = time.monotonic() + 30
    num_images = num_requests + len(expected)
    while read_metrics(server.metrics, "ray_plates_images_total") < num_images and time.monotonic() < deadline_s:
        time.sleep(0.5)
    assert read_metrics(server.metrics, "ray_plates_images_total") == num_images
    assert 0 < read_metrics(server.metrics, "ray_serve_actual_batch_size_count") < 0.7 * num_images

    # what is refused
    assert requests.post(f"{url}/predict", data=b"x", timeout=60).status_code == 401
    assert requests.post(f"{url}/predict", data=b"x", headers=HEADERS, timeout=60).json() == {"error": "not an image"}

    def endless() -> Iterator[bytes]:
        for _ in range(300):
            sent.append(100_000)
            yield bytes(100_000)
            time.sleep(0.01)

    sent: list[int] = []
    with suppress(requests.ConnectionError):  # it has answered and closed while this goes on sending
        assert requests.post(f"{url}/predict", data=endless(), headers=HEADERS, timeout=60).status_code == 413
    assert sum(sent) < 20_000_000
    large = requests.post(f"{url}/predict", data=bytes(1_000_001), headers=HEADERS, timeout=60)
    assert (large.status_code, large.json()) == (413, {"error": "the request has more than 1 MB"})

    # health, the page, and a port that is taken
    assert requests.get(f"{url}/healthz", timeout=60).json() == {"status": "ok", "version": answers[0]["version"]}
    assert requests.get(f"{url}/-/healthz", timeout=60).status_code == 200
    assert 'id="token"' in requests.get(url, timeout=60).text
    flags = ["--checkpoint", str(server.checkpoint), "--port", url.rpartition(":")[2]]
    capsys.readouterr()
    assert serve.main(flags) == 2
    assert "Address already in use; give another" in capsys.readouterr().err
    shutil.rmtree(server.checkpoint)  # it is read no more

    # the end
    assert ask(expected.index[0])["version"] == answers[0]["version"]
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert family
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
    assert not psutil.wait_procs(family, timeout=30)[1]
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path, capsys):
    assert serve.main(["--checkpoint", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message == f"plates serve: --checkpoint {tmp_path}: holds no model.json; give RUN/checkpoint\n"
