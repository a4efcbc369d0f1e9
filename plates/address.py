"""Whether a Ray cluster answers at an address, asked before Ray itself would wait for one."""

import os
import socket
from pathlib import Path

from plates.config import UserError
from plates.ray_private import ask_alive

CONNECT_TIMEOUT_S = 5.0


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
