"""Jobs sent to a real cluster, a head of its own with token authentication: logs, exit codes and refusals."""

import http.server
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from conftest import ROOT, free_ports, wait_for_port

SUBMIT = [sys.executable, "-m", "ray_jobs", "submit"]
SMALL = ["--data", "synthetic:8", "--backbone", "resnet18", "--weights", "none", "--image-size", "32", "--epochs"]
NO_TOKEN = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
NO_TOKEN["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's driver is the PATH's python


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A head with 2 CPUs on free ports: its `address` and `token`, and the environment `env` of a client."""
    folder, token = tmp_path_factory.mktemp("cluster"), "0123456789abcdef" * 4
    (folder / "token").write_text(token)
    env = NO_TOKEN | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    names = ["port", "dashboard-port", "ray-client-server-port", "dashboard-agent-grpc-port",
             "dashboard-agent-listen-port", "metrics-export-port"]  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    # Sockets lie in this folder, and their paths are limited to 107 bytes.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as session:
        head = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--include-dashboard=true", "--disable-usage-stats", "--num-cpus=2",
             "--object-store-memory=200000000", f"--temp-dir={session}", *[f"--{k}={v}" for k, v in ports.items()]],
            env=env | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "PLATES_CACHE": str(folder / "cache")},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_for_port(ports["dashboard-port"])
        yield SimpleNamespace(address=address, token=token, env=env, gcs=f"127.0.0.1:{ports['port']}")
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)


def run(command: list[str], env: dict[str, str] = NO_TOKEN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_a_job_runs_and_its_log_comes_back(cluster, tmp_path):
    out = tmp_path / "a run"
    flags = [*SMALL, "1", "--num-workers", "1", "--out", str(out)]
    done = run([*SUBMIT, "train", "--address", cluster.address, *flags], cluster.env)
    assert done.returncode == 0, done.stderr
    assert "runs on 1 Ray workers" in done.stdout
    assert f"report: {out / 'report.html'}\nrun directory: {out}\n" in done.stdout
    assert {"report.html", "predictions.csv", "checkpoint"} <= {path.name for path in out.iterdir()}


def test_a_mistake_that_only_the_cluster_sees_ends_with_2(cluster, tmp_path):
    missing = str(tmp_path / "missing")
    done = run([*SUBMIT, "train", "--address", cluster.address, "--data", missing, "--out", missing], cluster.env)
    assert done.returncode == 2, done.stderr
    assert f"plates train: --data {missing}: no such folder" in done.stdout


@pytest.mark.slow
def test_a_job_that_stays_pending_is_stopped(cluster, tmp_path):
    flags = ["--pending-timeout", "0", "--out", str(tmp_path)]
    done = run([*SUBMIT, "train", "--address", cluster.address, *flags], cluster.env)
    assert done.returncode == 1, done.stderr
    job, headers = (
        f"{cluster.address}/api/jobs/{done.stdout.split()[0]}",
        {"Authorization": f"Bearer {cluster.token}"},
    )
    while (status := requests.get(job, headers=headers, timeout=5).json()["status"]) in ("PENDING", "RUNNING"):
        time.sleep(0.5)
    assert status == "STOPPED"


@pytest.mark.slow
def test_ctrl_c_without_a_terminal_leaves_the_job(cluster, tmp_path):
    flags = [*SMALL, "100000", "--num-workers", "0", "--out", str(tmp_path / "a")]
    following = subprocess.Popen(
        [*SUBMIT, "train", "--address", cluster.address, *flags],
        env=cluster.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert any("runs in this process" in line for line in following.stdout or [])
    following.send_signal(signal.SIGINT)
    _, message = following.communicate(timeout=30)
    assert following.returncode == 1
    assert run(shlex.split(message.partition("stop it with: ")[2]), cluster.env).returncode == 0


def test_ctrl_c_at_a_terminal_asks_and_does_what_is_answered(cluster, tmp_path):
    terminal, its_end = pty.openpty()
    flags = [*SMALL, "100000", "--num-workers", "0", "--out", str(tmp_path / "a")]
    following = subprocess.Popen(
        [*SUBMIT, "train", "--address", cluster.address, *flags],
        env=cluster.env, stdin=its_end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log, questions = following.stdout, following.stderr
    assert log is not None
    assert questions is not None
    assert any("runs in this process" in line for line in log)
    for answer in (b"c\n", b"s\n"):
        following.send_signal(signal.SIGINT)
        while "[c]ontinue: " not in (asked := os.read(questions.fileno(), 1000).decode()):
            assert asked, "the client ended without a question"
        assert following.poll() is None
        os.write(terminal, answer)
        time.sleep(2)  # else the next Ctrl-C is an answer to this question
    message = following.communicate(timeout=60)[1]
    assert following.returncode == 1, message
    assert "STOPPED" in message


@pytest.mark.slow
def test_ray_itself_can_send_a_job(cluster, tmp_path):
    job = ["python", "-m", "ray_jobs.train", *SMALL, "1", "--num-workers", "0", "--out", str(tmp_path / "a")]
    done = run(["ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--", *job], cluster.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "a" / "report.html").is_file()


@pytest.mark.parametrize(
    ("variables", "cause"),
    [({}, "Missing authentication token"), ({"RAY_AUTH_TOKEN": "another"}, "Invalid authentication token"),
     ({"RAY_AUTH_TOKEN_PATH": "/no/such/file"}, "/no/such/file")],
)  # fmt: skip
def test_a_missing_or_wrong_token_ends_with_2(variables, cause, cluster):
    env = NO_TOKEN | variables | ({"RAY_AUTH_MODE": "token"} if variables else {})
    done = run([*SUBMIT, "train", "--address", cluster.address, "--out", "/runs/a"], env)
    assert done.returncode == 2
    assert cause in done.stderr
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in done.stderr


def test_an_address_without_such_a_cluster_ends_with_2(tmp_path):
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "version").write_text('{"ray_version": "2.9.3"}')
    files = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    mute = socket.create_server(("127.0.0.1", 0))
    with mute, http.server.ThreadingHTTPServer(("127.0.0.1", 0), files) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        ports = [*free_ports(1), mute.getsockname()[1], other.server_port]
        for port, cause in zip(ports, ["refused", "timed out", "the cluster runs Ray 2.9.3"], strict=True):
            done = run([*SUBMIT, "train", "--address", f"http://127.0.0.1:{port}", "--out", "/runs/a"])
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert cause in done.stderr
        other.shutdown()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train", "--out is missing"), ("train --out runs/a", "--out runs/a"), ("fly --out /runs/a", "'fly'"),
        ("train --out /runs/a --data photos", "--data photos"), ("train --out /runs/a --epoch 3", "--epoch"),
        ("predict --out /runs/a --checkpoint a", "--checkpoint a"), ("--address h:1 tune --out /runs/a", "http://"),
    ],
)  # fmt: skip
def test_what_can_be_refused_here_is_not_sent(argv, message):
    done = run([*SUBMIT, *argv.split()])
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_driver_offers_its_token_and_says_where_it_has_none(cluster, tmp_path):
    """Without plates submit: RAY_ADDRESS names the head itself."""
    check = [sys.executable, "-m", "ray_jobs", "check", "--address", cluster.gcs, "--out", str(tmp_path / "a")]
    home = NO_TOKEN | {"HOME": str(tmp_path)}
    for env, message in (
        (home, "the cluster wants a token"),
        (home | {"RAY_AUTH_TOKEN": "0" * 64}, "the cluster wants another token"),
    ):
        done = run(check, env)
        assert done.returncode == 2
        assert message in done.stderr
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(cluster.token)
    done = run(check, home)
    assert done.returncode == 0, done.stderr
    assert "none" in done.stdout
