"""Ray's start, or the way to a cluster, which is asked whether it answers before Ray itself would wait for it."""

import logging
import os
import signal
import socket
import threading
from importlib import import_module
from pathlib import Path

from plates.config import PredictConfig, TrainConfig, TuneConfig, UserError
from plates.ray_private import PREEMPTION_WATCHER, ask_alive, require
from plates.rules import is_drawn

CONNECT_TIMEOUT_S = 5.0
IMPORTED_EARLY = ("plates.job", "sklearn.metrics", "matplotlib.figure")  # the last two for figures and plots


def is_in_cluster() -> bool:
    """A job's driver, or a shell whose RAY_ADDRESS names a cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


def start_ray() -> None:
    """Connects to the cluster of RAY_ADDRESS, else starts Ray on this machine. Raises: UserError."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    check_address(address)
    import ray

    require("ray.autoscaler", "ray.experimental")
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address == "local":
            raise
        raise UserError(f"RAY_ADDRESS {address}: no Ray cluster answers there ({error})") from error
    if address == "local":
        os.environ.setdefault(PREEMPTION_WATCHER, "0")  # this machine alone will not be taken back
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own there, which aborts


def start_ray_early(config: TrainConfig | PredictConfig) -> None:
    """Where the flags ask for workers, and for a sweep, starts Ray while a thread imports what a job needs: each
    takes seconds of a core. Where there is no such data, that is left to be told first.

    Raises: UserError as `start_ray`.
    """
    has_workers = is_in_cluster() if config.num_workers == "auto" else config.num_workers > 0
    may_exist = is_drawn(config.data) or ":" in config.data or os.access(config.data, os.R_OK)
    if may_exist and (has_workers or isinstance(config, TuneConfig)):
        threading.Thread(target=lambda: [import_module(name) for name in IMPORTED_EARLY]).start()
        start_ray()


def check_address(address: str) -> None:
    """Makes sure that a cluster at HOST:PORT lets us in, with its token where it wants one. Raises: UserError.

    Ray itself would try for minutes, and offers a token only where RAY_AUTH_MODE says so when it is imported.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "://" in address:
        return
    import grpc

    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        certificates = read_certificates()
        status = ask_alive(address, None, certificates, CONNECT_TIMEOUT_S)
        if status == grpc.StatusCode.UNAUTHENTICATED:
            token = find_token()
            if not token or ask_alive(address, token, certificates, CONNECT_TIMEOUT_S) != grpc.StatusCode.OK:
                wanted = "another token than this one" if token else "a token"
                rule = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
                raise UserError(f"RAY_ADDRESS {address}: the cluster wants {wanted}; {rule}")
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        elif status != grpc.StatusCode.OK:
            raise UserError(f"RAY_ADDRESS {address}: no Ray cluster answers there ({status.name})")
    except OSError as error:
        raise UserError(f"RAY_ADDRESS {address}: no Ray cluster answers there ({error})") from error


def read_certificates() -> list[bytes] | None:
    """The authority's certificate, our key and ours, as Ray's TLS settings name them, if any. Raises: UserError."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    certificates = []
    for name in ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT"):
        path = os.environ.get(name)
        if not path:
            raise UserError(f"{name} is not set: RAY_USE_TLS needs the paths of the certificates and the key")
        try:
            certificates.append(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"{name} {path}: cannot be read ({error.strerror})") from error
    return certificates


def find_token() -> str | None:
    """The token for a cluster, where Ray looks for it."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else None)
