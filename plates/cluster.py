"""What the machine or the cluster has, and what a job will use of it."""

import socket
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch

from plates.address import is_in_cluster, start_ray
from plates.config import UserError, WorkerConfig
from plates.device import num_usable_cpus
from plates.ray_private import count_coming

FIRST_NODE_S = 20.0  # in which a cluster that has just started shows a node
AUTOSCALER_ANSWERS_S = 10.0  # in which an autoscaler that can help has nodes on their way
SECONDS_PER_TRY = 5  # in which Ray gives room that is free; it takes whole seconds


@dataclass(frozen=True)
class Plan:
    """Where a job runs: `num_workers` 0 is this process, without Ray.

    Each worker reserves its CPUs and, if that is not None, one of `resource`, which need not be a GPU: another name,
    with gloo and the CPU, rehearses a cluster of them. `uses_whole_nodes`: workers are spread over nodes of different
    sizes, reserve no more than the smallest has, and share all that their node has.
    """

    num_workers: int
    device: Literal["cpu", "cuda"]
    cpus_per_worker: int
    reason: str
    wait_for_nodes_s: float = WorkerConfig.wait_for_nodes_s
    backend: Literal["nccl", "gloo"] = "gloo"
    resource: str | None = None
    uses_whole_nodes: bool = False

    @classmethod
    def on(cls, device: Literal["cpu", "cuda"], num_workers: int, cpus_per_worker: int, reason: str) -> "Plan":
        """A plan with the backend and the resource of the device."""
        plan = cls(num_workers, device, cpus_per_worker, reason)
        return replace(plan, backend="nccl", resource="GPU") if device == "cuda" else plan

    @property
    def resources_per_worker(self) -> dict[str, float]:
        return {"CPU": float(self.cpus_per_worker)} | ({self.resource: 1.0} if self.resource else {})

    @property
    def line(self) -> str:
        if self.num_workers == 0:
            return f"runs in this process on {self.device} with {self.cpus_per_worker} CPU threads: {self.reason}"
        each = f"1 {self.resource} and " if self.resource else ""
        cpus = "the CPUs of its node" if self.uses_whole_nodes else f"{self.cpus_per_worker} CPUs"
        return f"runs on {self.num_workers} Ray workers, each {each}{cpus}: {self.reason}"


@dataclass(frozen=True)
class Node:
    num_cpus: int
    num_gpus: int


def plan_job(
    num_workers: Literal["auto"] | int,
    device: str,
    cpus_per_worker: int | None = None,
    wait_for_nodes_s: float = WorkerConfig.wait_for_nodes_s,
) -> Plan:
    """Decides the workers of a job; connects to Ray, or starts it here, where workers are wanted.

    Raises: UserError for a device or a number of workers that is not there.
    """
    has_many_gpus = device != "cpu" and torch.cuda.device_count() > 1
    if num_workers == 0 or (num_workers == "auto" and not is_in_cluster() and not has_many_gpus):
        plan, who = plan_here(device, num_workers), "this process"
    else:
        start_ray()
        nodes = list_nodes()
        if num_workers != "auto" and is_in_cluster():
            nodes = scale_up(num_workers, device, nodes, wait_for_nodes_s)
        plan = replace(plan_workers(num_workers, device, nodes), wait_for_nodes_s=wait_for_nodes_s)
        who = f"each of {plan.num_workers} workers"
    if cpus_per_worker is None:
        return plan
    if cpus_per_worker > plan.cpus_per_worker:
        raise UserError(f"--cpus-per-worker {cpus_per_worker}: {who} can have {plan.cpus_per_worker}")
    return replace(plan, cpus_per_worker=cpus_per_worker, uses_whole_nodes=False)


def plan_here(device: str, num_workers: Literal["auto"] | int) -> Plan:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    reason = "--num-workers 0" if num_workers == 0 else "one machine, no cluster, at most one GPU"
    return Plan.on(chosen, 0, num_usable_cpus(), reason)


def plan_workers(
    num_workers: Literal["auto"] | int, device: str, nodes: list[Node], flag: str = "--num-workers"
) -> Plan:
    """Workers for the nodes of a cluster: a pure function of what there is.

    flag: that asks for them.

    Raises: UserError naming what the cluster lacks.
    """
    num_cpus, num_gpus = sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)
    if device == "cuda" and not num_gpus:
        raise UserError(f"--device cuda: the cluster has no GPU ({len(nodes)} nodes, {num_cpus} CPUs)")
    chosen: Literal["cpu", "cuda"] = "cuda" if device != "cpu" and num_gpus else "cpu"
    sizes = [node.num_cpus for node in nodes if node.num_cpus]
    reason = f"{flag} {num_workers}"
    if num_workers == "auto" and chosen == "cpu":
        if not sizes:
            rule = "give the number to scale up to"
            raise UserError(f"{flag} auto: the cluster has no GPU and no CPU now; {rule}")
        plan = Plan.on("cpu", len(sizes), min(sizes), f"{reason}, one a node with CPUs of the cluster")
        return replace(plan, uses_whole_nodes=min(sizes) < max(sizes))
    if num_workers == "auto":
        num_workers, reason = num_gpus, f"{reason}, one a GPU of the cluster"
    cpus_per_worker = share_cpus(num_workers, chosen, nodes)
    if cpus_per_worker is None:
        room = f"{num_gpus} GPUs" if chosen == "cuda" else f"{num_cpus} CPUs"
        rule = "ask for at most that many"
        raise UserError(f"{flag} {num_workers}: the cluster has {room} on {len(nodes)} nodes; {rule}")
    return Plan.on(chosen, num_workers, cpus_per_worker, reason)


def share_cpus(num_workers: int, device: str, nodes: list[Node]) -> int | None:
    """The most CPUs that each of `num_workers` can have when all are placed; None where they cannot be placed."""
    most = max((node.num_cpus for node in nodes), default=0)
    return next((cpus for cpus in range(most, 0, -1) if count_slots(cpus, device, nodes) >= num_workers), None)


def count_slots(cpus_per_worker: int, device: str, nodes: list[Node]) -> int:
    """How many workers of so many CPUs, and of a GPU each where that is the device, the nodes can hold."""
    slots = [(node.num_cpus // cpus_per_worker, node.num_gpus) for node in nodes]
    return sum(min(by_cpus, by_gpus) if device == "cuda" else by_cpus for by_cpus, by_gpus in slots)


def scale_up(num_workers: int, device: str, nodes: list[Node], limit_s: float) -> list[Node]:
    """The nodes when the cluster has room for the workers, its autoscaler asked for what is missing.

    GPUs are asked for where the device may be one and the CPUs there are do not hold the workers. Where no node is on
    its way after some seconds, the nodes are returned as they are.
    """
    from ray.autoscaler.sdk import request_resources

    wanted = "cuda" if device != "cpu" and (device == "cuda" or any(node.num_gpus for node in nodes)) else "cpu"
    if share_cpus(num_workers, wanted, nodes):
        return nodes
    for kind in ("cuda", "cpu") if device == "auto" else (device,):
        request_resources(bundles=[{"CPU": 1, "GPU": 1} if kind == "cuda" else {"CPU": 1}] * num_workers)
        try:
            nodes = wait_for_nodes(num_workers, kind, limit_s)
        finally:
            request_resources(bundles=[])  # else it would hold the nodes for ever; from here on the job does
        if share_cpus(num_workers, kind, nodes):
            break
    return nodes


def wait_for_nodes(num_workers: int, device: str, limit_s: float) -> list[Node]:
    """Waits while nodes are on their way, and returns those alive then."""
    began_s = coming_s = time.monotonic()
    num_said = 0
    while True:
        time.sleep(1)
        nodes, num_coming, now_s = list_nodes(), count_coming(), time.monotonic()
        coming_s = now_s if num_coming else coming_s
        if num_coming not in (0, num_said):
            print(f"the cluster starts {num_coming} nodes for {num_workers} workers", flush=True)
            num_said = num_coming
        is_over = now_s - coming_s > AUTOSCALER_ANSWERS_S or now_s - began_s > limit_s
        if is_over or share_cpus(num_workers, device, nodes):
            return nodes


def find_room(plan: Plan, has_lost: bool = False) -> Plan:
    """The plan, on no more workers than the nodes alive can hold, as soon as that room is free.

    Waits while other jobs use it, and while nodes are on their way where no node is left that could hold a worker.
    Work that has lost workers goes on at once on as many as there is room for now, and waits only for the first.

    Raises: UserError where the room stays taken, or nothing is on its way.
    """
    from ray.util import placement_group, remove_placement_group

    began_s = coming_s = time.monotonic()
    has_said = False
    while True:
        num_slots = count_slots(plan.cpus_per_worker, "cuda" if plan.resource else "cpu", list_nodes(plan.resource))
        num_workers = max(1, min(plan.num_workers, num_slots))
        # Groups that wait for their room tell an autoscaler, too, what is wanted.
        bundles = [plan.resources_per_worker] * num_workers
        groups = [placement_group([bundle]) for bundle in bundles] if has_lost else [placement_group(bundles)]
        deadline_s = time.monotonic() + SECONDS_PER_TRY
        num_free = sum(group.wait(max(0, round(deadline_s - time.monotonic()))) for group in groups)
        for group in groups:
            remove_placement_group(group)
        if num_free:
            return replace(plan, num_workers=num_free if has_lost else num_workers)
        now_s = time.monotonic()
        room = f"{plural(1 if has_lost else num_workers, 'worker')} of {plural(plan.cpus_per_worker, 'CPU')}"
        room += f" and a {plan.resource}" if plan.resource else ""
        if num_slots or count_coming():
            coming_s = now_s
        elif now_s - coming_s > AUTOSCALER_ANSWERS_S:
            raise UserError(f"--num-workers {plan.num_workers}: no node has room for {room}, and none is on its way")
        limit = f"{plan.wait_for_nodes_s:g}"
        if now_s - began_s > plan.wait_for_nodes_s:
            rule = "wait longer, or ask for fewer or smaller workers"
            raise UserError(f"--wait-for-nodes-s {limit}: in that time there was no room for {room}; {rule}")
        if not has_said:
            why = "the cluster is busy" if num_slots else "the cluster has lost its nodes"
            print(f"{why}: waiting up to {limit} s for room for {room}", flush=True)
            has_said = True


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def list_nodes(resource: str | None = None) -> list[Node]:
    """Nodes alive now, with GPUs, or what stands for them; a cluster that has just started is given a moment to show
    one."""
    import ray

    deadline_s = time.monotonic() + FIRST_NODE_S
    while not (alive := [node for node in ray.nodes() if node["Alive"]]) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    sizes = [node["Resources"] for node in alive]
    return [Node(int(size.get("CPU", 0)), int(size.get(resource or "GPU", 0))) for size in sizes]


def this_node(is_ray: bool) -> str:
    """The host's name; on a Ray worker followed by the node's id, since nodes may share a name."""
    if not is_ray:
        return socket.gethostname()
    import ray

    return f"{socket.gethostname()}:{ray.get_runtime_context().get_node_id()[-8:]}"


def find_nodes() -> list[Node]:
    """The nodes of the cluster of RAY_ADDRESS, else this machine, where no Ray is started for it."""
    if not is_in_cluster():
        return [Node(num_usable_cpus(), torch.cuda.device_count())]
    start_ray()
    return list_nodes()
