"""The device of a process: its switches, its precision, and how tensors get to it and back."""

import ctypes
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import joblib
import torch
from torch import Tensor, nn

from plates.backbones import find_backbone

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_ABLE_FIRST = ("fp32", "fp16", "bf16")  # what every device of a group computes well is what the first one does
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
CPU_BATCH_SIZE = 32
CUDA_BATCH_SIZE, CUDA_TRIAL_SIZE = 256, 8
NUM_BEHIND = 2  # batches that a device is ahead of the host that reads its results


def num_usable_cpus() -> int:
    """CPUs that this process may run on and its container has; a job's driver inherits OMP_NUM_THREADS=1 from Ray."""
    return joblib.cpu_count()


def set_up_process(device: torch.device, precision: str, num_threads: int) -> None:
    """Sets threads, TF32, cuDNN's choice of algorithms, and on CPUs how glibc keeps memory, once a worker.

    TF32 is off in fp32, in convolutions too, where torch has it on, and on in the lower precisions.
    """
    torch.set_num_threads(num_threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Tells glibc, where it is glibc, to keep what tensors free.

    Else blocks above 32 MiB go back to the kernel and are faulted in again at every layer: on 2 cores of an AMD EPYC
    EfficientNet-Lite0 in fp32 ran at 58-95 images/s so, and at 140 with this (torch 2.14, batch 32).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_TOP_PAD, 1 << 26)


def best_precision(device: torch.device) -> str:
    """The lowest precision that the device multiplies in hardware and that keeps a ResNet's predictions.

    bf16 on a CPU with AVX-512 BF16 or AMX and on CUDA from compute capability 8.0; else fp32 on CPUs, fp16 on CUDA.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def devices_here(kind: str) -> list[torch.device]:
    """Every device of a kind (cpu, cuda) of this machine."""
    return [torch.device(kind, index) for index in range(torch.cuda.device_count() if kind == "cuda" else 1)]


def decide_precision(asked: str, backbone: str, device: str, best: Sequence[str]) -> str:
    """The one precision of a group of workers: as --precision asks, for auto that of its least able device.

    A sensitive trunk stays in fp32 on CPUs. In bf16 EfficientNet-Lite0 gave 3 of 372 real photos another class than
    in fp32 (ResNet18: none), so on CUDA it takes fp16, with 3 more bits. Another model of timm takes bf16 there, or
    fp32: what leaves fp16's range is lost, what bf16 rounds is not.

    Args:
        device: cpu or cuda.
        best: `best_precision` of each device.
    """
    if asked != "auto":
        return asked
    least_able, found = min(best, key=LEAST_ABLE_FIRST.index), find_backbone(backbone)
    if not found.is_sensitive:
        return least_able
    if device == "cpu":
        return "fp32"
    return "fp16" if found.fits_fp16 else "bf16" if least_able == "bf16" else "fp32"


def find_batch_size(module: nn.Module, picture: Tensor) -> int:
    """Pictures that a device takes in one forward pass. On CPUs 32: more ran no faster.

    On CUDA what fits into half of the free memory, by the peak of a trial of 8 pictures like `picture` (3, S, S): a
    power of two, at most 256, with which timm's published rates are measured.
    """
    if picture.device.type != "cuda":
        return CPU_BATCH_SIZE
    torch.cuda.reset_peak_memory_stats(picture.device)
    before = torch.cuda.memory_allocated(picture.device)
    with torch.inference_mode():
        module(picture.expand(CUDA_TRIAL_SIZE, *picture.shape))
    num_bytes = torch.cuda.max_memory_allocated(picture.device) - before
    free_bytes, _ = torch.cuda.mem_get_info(picture.device)
    return largest_batch(num_bytes / CUDA_TRIAL_SIZE, free_bytes)


def largest_batch(bytes_per_image: float, free_bytes: int) -> int:
    """The largest power of two that takes at most half of the free memory, 1 to 256."""
    return 1 << max(0, int(min(CUDA_BATCH_SIZE, free_bytes / 2 / bytes_per_image)).bit_length() - 1)


def move(values: Tensor, device: torch.device) -> Tensor:
    """To the device, through pinned memory and without waiting for CUDA."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def read_behind(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each output on the CPU, handed on when the device has been given two more: it never waits for the host."""
    pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
    for output in outputs:
        copy = output.to(CPU, non_blocking=True)  # into pinned memory
        is_copied = torch.cuda.Event() if output.device.type == "cuda" else None
        if is_copied:
            is_copied.record()
        pending.append((copy, is_copied))
        if len(pending) > NUM_BEHIND:
            yield wait_for(*pending.popleft())
    yield from (wait_for(*copied) for copied in pending)


def wait_for(copy: Tensor, is_copied: torch.cuda.Event | None) -> Tensor:
    if is_copied:
        is_copied.synchronize()
    return copy
