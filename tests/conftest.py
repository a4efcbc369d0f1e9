"""What tests share: real photos where they are, small folders of pictures, one local Ray."""

import os
import random
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
pytest_plugins = ["table_of_passes"]  # a second conftest.py would be imported under the same name as this one


@pytest.fixture(scope="session")
def photos() -> Path:
    """The real photos: $PLATES_PHOTOS, else ../shared/platesv2 beside the checkout."""
    folder = Path(os.environ.get("PLATES_PHOTOS", ROOT.parent / "shared" / "platesv2"))
    if not folder.is_dir():
        pytest.skip(f"no photos at {folder}; set PLATES_PHOTOS")
    return folder.resolve()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that another test or the user computed may be reused."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("PLATES_CACHE", str(cache))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return cache


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small tensors: where other work keeps the cores busy, two threads took ten times as long as one."""
    import torch
    from threadpoolctl import threadpool_limits

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(num_threads)


def write_picture(path: Path, seed: int, height: int = 40, width: int = 56) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of 9 + 8 labelled and 7 test pictures of differing sizes: numbers that nothing divides."""
    root = tmp_path / "data"
    for index in range(9):
        write_picture(root / "train" / "cleaned" / f"{index}.jpg", index, 40 + index, 56)
    for index in range(8):
        write_picture(root / "train" / "dirty" / f"{index}.png", 100 + index, 56, 40 + index)
    for index in range(7):
        write_picture(root / "test" / f"{index}.jpg", 200 + index)
    return root


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 40 labelled plates of the embedded data set and 12 to predict, each drawn once."""
    from plates.dataset import load_dataset, merge_labelled

    root, dataset = tmp_path_factory.mktemp("drawn"), merge_labelled(load_dataset("synthetic:40", 0))
    for sample in [*dataset.train, *dataset.test[:12]]:
        path = (root / sample.path).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dataset.source.read_bytes(sample.path))
    return str(root)


@pytest.fixture(scope="session", autouse=True)
def no_ray_is_left() -> Iterator[None]:
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture
def local_ray() -> None:
    """Ray on this machine with 2 CPUs, shared by the tests until one shuts it down to start another."""
    import logging

    import ray

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, object_store_memory=200_000_000, logging_level=logging.ERROR)


@contextmanager
def rights_of_nobody() -> Iterator[None]:
    """Root may list everything."""
    me = os.geteuid()
    os.seteuid(65534 if me == 0 else me)
    try:
        yield
    finally:
        os.seteuid(me)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at now, below those that the system hands out by itself."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) and port not in ports:
                ports.append(port)
    return ports


def wait_for_port(port: int, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with socket.socket() as one:
            if not one.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens at port {port}")
