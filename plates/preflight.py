"""What every node of a cluster must be able to do, tried before anything is trained."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from plates.address import is_in_cluster
from plates.cluster import Plan, this_node
from plates.config import UserError
from plates.dataset import Dataset
from plates.device import LEAST_ABLE_FIRST, best_precision, devices_here
from plates.images import UnreadableImageError
from plates.rundir import TRIAL_PREFIX, versions
from plates.sources import Source
from plates.storage import Place, remove_tree

PROBE_S = 60.0  # torch may have to be imported first
SHM = Path("/dev/shm")
MIN_SHM_BYTES = 1 << 30  # of a container: NCCL and Ray's object store share it, and Docker gives 64 MiB
SHARE = "give a folder that all nodes share, or a URI"


@dataclass(frozen=True)
class Probe:
    """What one node found; each problem is a sentence."""

    node: str
    device: str
    shm_bytes: int | None
    versions: dict[str, str]
    precision: str | None  # the best of its device, of several the least able one's; None where torch sees none
    problems: tuple[str, ...]


def check_nodes(plan: Plan, dataset: Dataset, run: Place, cache: Place | None = None) -> list[str]:
    """Tries every node that may get a worker, and the cache where it is needed also on this machine alone.

    Returns: the best precision of each node's devices, or of each device of this machine.

    Raises: UserError naming a node and what it cannot do.
    """
    if plan.num_workers and is_in_cluster():
        probes = probe_nodes(plan, dataset, run, cache)
        for probe in probes:
            if probe.problems:
                raise UserError(f"node {probe.node}: {'; '.join(probe.problems)}")
        return [probe.precision for probe in probes if probe.precision and probe.device == plan.device]
    if problems := try_cache(cache):
        raise UserError(problems[0])
    return [best_precision(device) for device in devices_here(plan.device)]


def probe_nodes(plan: Plan, dataset: Dataset, run: Place, cache: Place | None = None) -> list[Probe]:
    """A probe of each node with CPUs or GPUs; of this machine alone where there is no cluster."""
    try:
        with trial_folder(run) as folder:
            asked = (dataset.source, first_readable(dataset), folder, cache, versions())
            (folder / "driver").write_bytes(b"driver")
            return probe_on_ray(plan, asked, folder) if plan.num_workers else [probe_node(plan.device, *asked, False)]
    except OSError as error:
        raise UserError(f"--out {run}: cannot be written ({error.strerror or error})") from error


@contextmanager
def trial_folder(run: Place) -> Iterator[Place]:
    """A hidden folder in the run directory, which may be all that can be written; it goes, with what was made."""
    made = [path for path in (run, *run.parents) if not path.exists()] if isinstance(run, Path) else []
    folder = run / f"{TRIAL_PREFIX}{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        remove_tree(folder)
        for path in made:
            with suppress(OSError):  # not empty: another job has begun in it
                path.rmdir()


def try_cache(cache: Place | None) -> list[str]:
    """What is wrong with the folder of features, if anything; it stays, since nodes that share it try it at once."""
    if cache is None:
        return []
    try:
        (cache / "features").mkdir(parents=True, exist_ok=True)
        file = cache / "features" / f"{TRIAL_PREFIX}{uuid.uuid4().hex[:8]}"
        file.write_bytes(b"")
        file.unlink()
    except OSError as error:
        reason = error.strerror or error
        return [f"PLATES_CACHE {cache}: cannot be written ({reason}); set it to a folder or a URI that can"]
    return []


def first_readable(dataset: Dataset) -> str | None:
    """An image that the driver can read: what every node then must read too."""
    for sample in chain(dataset.train, dataset.test):
        with suppress(UnreadableImageError):
            dataset.source.read(sample.path)
            return sample.path
    return None


def probe_on_ray(plan: Plan, asked: tuple[Any, ...], folder: Place) -> list[Probe]:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    waiting = []
    for node in ray.nodes():
        has_gpu = node["Resources"].get(plan.resource or "GPU", 0) > 0
        if node["Alive"] and (has_gpu or node["Resources"].get("CPU", 0) > 0):
            device = plan.device if has_gpu else "cpu"
            # Asks for no GPU, which another job may be using, and sees all; its process ends with it, and its CUDA.
            task = ray.remote(num_cpus=0, max_retries=0, max_calls=1 if device == "cuda" else 0)(probe_node)
            task = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            waiting.append((node, device, task.remote(device, *asked, True)))  # pyright: ignore[reportCallIssue]
    probes = []
    for node, device, reference in waiting:
        try:
            probe: Probe = ray.get(reference, timeout=PROBE_S)
            if not (folder / probe.node).exists():
                unseen = f"what it writes into --out is not seen here; {SHARE}"
                probe = replace(probe, problems=(*probe.problems, unseen))
        except RayError as error:
            name = f"{node['NodeManagerHostname']}:{node['NodeID'][-8:]}"
            reason = str(error).strip().splitlines()[-1]
            problem = f"did not run the probe ({reason}); is this program installed there?"
            probe = Probe(name, device, None, {}, None, (problem,))
        probes.append(probe)
    return probes


def probe_node(
    device: str,
    source: Source,
    path: str | None,
    folder: Place,
    cache: Place | None,
    expected: dict[str, str],
    is_ray: bool,
) -> Probe:
    """Runs on a node: writes into --out and the cache, reads the driver's file and an image, compares versions."""
    node, problems = this_node(is_ray), []
    try:
        (folder / node).write_bytes(b"node")
        (folder / "driver").read_bytes()
    except OSError as error:
        problems.append(f"cannot use the driver's --out ({error.strerror or error}); {SHARE}")
    try:
        if path:
            source.read(path)
    except UnreadableImageError as error:
        problems.append(f"cannot read {path} of --data ({error}); {SHARE}")
    problems += try_cache(cache)
    found = versions()
    other = [f"{name} {found.get(name)}, the driver {expected[name]}" for name in expected
             if found.get(name) != expected[name]]  # fmt: skip
    if other:
        problems.append(f"has {', '.join(other)}; install the same versions on all nodes")
    if device == "cuda" and not torch.cuda.is_available():  # it would train on the CPU without a word
        seen = f"(CUDA_VISIBLE_DEVICES {os.environ.get('CUDA_VISIBLE_DEVICES')}); install a torch for its driver"
        problems.append(f"Ray has a GPU here and torch {torch.__version__} sees none {seen}")
    shm_bytes = shutil.disk_usage(SHM).total if SHM.is_dir() else None
    if device == "cuda" and shm_bytes is not None and shm_bytes < MIN_SHM_BYTES:
        problems.append(f"has {shm_bytes >> 20} MiB of /dev/shm; start its container with --shm-size=8g")
    precision = min(map(best_precision, devices_here(device)), key=LEAST_ABLE_FIRST.index, default=None)
    return Probe(node, device, shm_bytes, found, precision, tuple(problems))
