"""Where the time went: phases of a process, synchronised with its device."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


class Phases:
    """Seconds by phase name; a phase may be entered many times, and phases do not nest."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start_s = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds[name] += time.perf_counter() - start_s


def synchronize(device: torch.device | None) -> None:
    """Waits for queued CUDA work, which a clock would otherwise not see."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def process_age_s() -> float:
    """Seconds since this process was started, interpreter and imports included."""
    return time.time() - psutil.Process().create_time()


def rate(count: int, time_s: float) -> float | None:
    """Items per second; None where nothing was timed."""
    return count / time_s if count and time_s > 0 else None
