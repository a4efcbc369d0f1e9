import datetime
import io
import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from plates import cluster
from plates.address import check_address
from plates.cluster import Node, Plan, plan_job, plan_workers
from plates.config import UserError
from plates.device import num_usable_cpus

HEAD = Node(num_cpus=0, num_gpus=0)


@pytest.mark.parametrize(
    ("num_workers", "device", "nodes", "expected"),
    [
        ("auto", "auto", [Node(8, 0)], (1, "cpu", 8)),
        ("auto", "auto", [HEAD, Node(8, 0), Node(4, 0)], (2, "cpu", 4)),
        ("auto", "auto", [Node(32, 0), Node(2, 0)], (2, "cpu", 2)),
        ("auto", "auto", [HEAD, Node(4, 1), Node(8, 4)], (5, "cuda", 2)),
        ("auto", "cpu", [Node(4, 1)], (1, "cpu", 4)),
        (3, "auto", [Node(8, 0)], (3, "cpu", 2)),
        (3, "auto", [Node(4, 0), Node(2, 0)], (3, "cpu", 2)),
        (2, "cuda", [Node(4, 1), Node(4, 1)], (2, "cuda", 4)),
    ],
)
def test_workers_share_what_there_is(num_workers, device, nodes, expected):
    plan = plan_workers(num_workers, device, nodes)
    assert (plan.num_workers, plan.device, plan.cpus_per_worker) == expected
    assert str(plan.num_workers) in plan.line


@pytest.mark.parametrize(
    ("num_workers", "device", "nodes", "message"),
    [
        (3, "auto", [Node(2, 0)], "--num-workers 3: the cluster has 2 CPUs on 1 nodes"),
        (3, "auto", [Node(8, 2)], "--num-workers 3: the cluster has 2 GPUs"),
        ("auto", "cuda", [Node(8, 0)], "--device cuda: the cluster has no GPU"),
        ("auto", "auto", [HEAD], "no GPU and no CPU now; give the number"),
    ],
)
def test_what_the_cluster_lacks_is_said(num_workers, device, nodes, message):
    with pytest.raises(UserError, match=message):
        plan_workers(num_workers, device, nodes)


def test_the_flag_that_asked_is_named():
    with pytest.raises(UserError, match="--num-replicas 3: the cluster has 2 CPUs"):
        plan_workers(3, "auto", [Node(2, 0)], "--num-replicas")


def test_workers_of_nodes_of_different_sizes_reserve_the_smallest_and_use_their_own():
    assert plan_workers("auto", "cpu", [Node(8, 0), Node(4, 0)]).uses_whole_nodes
    assert "each the CPUs of its node" in plan_workers("auto", "cpu", [Node(8, 0), Node(4, 0)]).line
    for num_workers, nodes in (("auto", [Node(4, 0), Node(4, 0)]), ("auto", [Node(8, 1), Node(4, 1)]),
                               (2, [Node(8, 0), Node(4, 0)])):  # fmt: skip
        assert not plan_workers(num_workers, "auto", nodes).uses_whole_nodes


def test_a_gpu_worker_reserves_a_gpu_or_what_stands_for_it():
    plan = plan_workers("auto", "auto", [Node(4, 1)])
    assert (plan.backend, plan.resources_per_worker) == ("nccl", {"CPU": 4, "GPU": 1})
    rehearsal = replace(plan, device="cpu", backend="gloo", resource="MOCK_GPU")
    assert rehearsal.resources_per_worker == {"CPU": 4, "MOCK_GPU": 1}
    plan = plan_workers("auto", "cpu", [Node(4, 1)])
    assert (plan.backend, plan.resources_per_worker) == ("gloo", {"CPU": 4})


def test_one_machine_runs_in_this_process():
    plan = plan_job("auto", "cpu")
    assert (plan.num_workers, plan.device) == (0, "cpu")
    assert plan.cpus_per_worker == cluster.num_usable_cpus()
    assert isinstance(plan, Plan)


def test_this_process_takes_the_cpus_asked_for(monkeypatch):
    monkeypatch.setattr(cluster, "num_usable_cpus", lambda: 4)
    assert [plan_job(0, "cpu", wanted).cpus_per_worker for wanted in (None, 1, 4)] == [4, 1, 4]
    with pytest.raises(UserError, match="--cpus-per-worker 5: this process can have 4"):
        plan_job(0, "cpu", 5)


@pytest.mark.skipif(cluster.torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        plan_job(0, "cuda")


def test_an_address_without_a_cluster_is_named():
    """In a process of its own: another test's Ray would answer here."""
    command = [sys.executable, "-m", "ray_jobs.train", "--data", "synthetic:4"]
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "RAY_ADDRESS 127.0.0.1:1: no Ray cluster answers" in ended.stderr


@contextmanager
def head(host: str, credentials: grpc.ServerCredentials | None = None, token: str = "") -> Iterator[str]:
    """The address of a server that answers as a Ray head does to being asked whether it is alive."""

    def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
        if token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
        return b""

    server = grpc.server(ThreadPoolExecutor(1))
    methods = {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", methods)])
    address = f"{host}:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    yield f"{host}:{port}"
    server.stop(None)


def write_certificate(folder: Path) -> dict[str, str]:
    """A certificate of this machine's own for 127.0.0.1 and ::1; the variables by which Ray is told of it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.IPAddress(ipaddress.ip_address(host)) for host in ("127.0.0.1", "::1")]
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    certificate = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=True)
    certificate = certificate.add_extension(x509.BasicConstraints(True, None), critical=True).sign(
        key, hashes.SHA256()
    )
    pem = serialization.Encoding.PEM
    (folder / "certificate").write_bytes(certificate.public_bytes(pem))
    (folder / "key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    names = {"RAY_TLS_SERVER_CERT": "certificate", "RAY_TLS_SERVER_KEY": "key", "RAY_TLS_CA_CERT": "certificate"}
    return {"RAY_USE_TLS": "1"} | {variable: str(folder / file) for variable, file in names.items()}


@pytest.fixture
def no_ray_variables(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("plates.address.CONNECT_TIMEOUT_S", 1.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
@pytest.mark.parametrize("token", ["", "a-token"])
def test_a_head_is_found_at_names_and_addresses_of_both_kinds(host, token, no_ray_variables, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    with head(host, token=token) as address:
        if token:
            with pytest.raises(UserError, match="the cluster wants a token"):
                check_address(address)
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        check_address(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_head_behind_tls_is_asked_with_rays_certificates(host, no_ray_variables, monkeypatch, tmp_path):
    variables = write_certificate(tmp_path)
    certificate, key = (tmp_path / "certificate").read_bytes(), (tmp_path / "key").read_bytes()
    with head(host, grpc.ssl_server_credentials([(key, certificate)], certificate, True)) as address:
        with pytest.raises(UserError, match="no Ray cluster answers there"):
            check_address(address)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        check_address(address)
        monkeypatch.setenv("RAY_TLS_CA_CERT", "/no/such/file")
        with pytest.raises(UserError, match="RAY_TLS_CA_CERT /no/such/file: cannot be read"):
            check_address(address)
        monkeypatch.delenv("RAY_TLS_CA_CERT")
        with pytest.raises(UserError, match="RAY_TLS_CA_CERT is not set"):
            check_address(address)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({}, 64),
    ],
)
def test_a_containers_share_of_the_cpus_is_kept(files, expected, monkeypatch):
    """On a machine of 64 CPUs, whose kernel tells a share like this."""
    folder, real_open, real_exists = "/sys/fs/cgroup/", open, os.path.exists
    told = {folder + name: text for name, text in files.items()}
    monkeypatch.setattr("builtins.open", lambda file, *rest, **options: io.StringIO(told[file]) if file in told
                        else real_open(file, *rest, **options))  # fmt: skip
    monkeypatch.setattr(
        os.path, "exists", lambda path: path in told or (not str(path).startswith(folder) and real_exists(path))
    )
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert num_usable_cpus() == expected
