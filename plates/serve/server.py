"""What runs on the cluster: replicas, each with a model and its HTTP side, and the driver that waits for the end."""

import asyncio
import hashlib
import json
import logging
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.metrics import Counter
from starlette.applications import Starlette

from plates.address import is_in_cluster, start_ray
from plates.checkpoint import Bundle
from plates.cluster import Plan, list_nodes, plan_workers, plural
from plates.config import TrainConfig, UserError
from plates.device import best_precision, decide_precision, set_up_process
from plates.features import Views
from plates.images import reading_threads
from plates.model import hash_weights
from plates.predict import UNSURE
from plates.rundir import versions
from plates.serve.app import build_app
from plates.serve.predictor import Answer, Predictor
from plates.tool_config import ServeConfig

BATCH_WAIT_S = 0.005  # for more images, before a batch that is not full is computed
REQUEST_TIMEOUT_S = 60.0
BATCHES_AT_WORK, BATCHES_WAITING = 2, 16  # of requests, of each replica and before all: one more gets 503
SHUTDOWN_POLL_S = 0.1  # of whether the last requests are answered; Serve's 2 s are waited where there are none, too
QUIET = {"log_level": "WARNING", "enable_access_log": False}


class Replica:
    """A model on the GPU or the CPUs that Ray gives it; without Serve's decorators, so that it is shipped by name."""

    def __init__(self, bundle: ray.ObjectRef, settings: TrainConfig, config: ServeConfig, plan: Plan) -> None:
        loaded: Bundle = ray.get(bundle)
        self.config, self.classes, self.version = config, loaded.classes, version_of(loaded)
        device = torch.device(plan.device)
        precision = decide_precision(config.precision, loaded.backbone, plan.device, [best_precision(device)])
        set_up_process(device, precision, plan.cpus_per_worker)
        self.predictor = Predictor(loaded, settings, device, precision)
        self.readers, computer = reading_threads(plan.cpus_per_worker), ThreadPoolExecutor(1)
        self.num_images = Counter("plates_images", "Images by the label that they got.", ("label",))

        @serve.batch(max_batch_size=config.max_batch_size, batch_wait_timeout_s=BATCH_WAIT_S)
        async def predict(images: list[Views]) -> list[Answer]:
            return await asyncio.get_running_loop().run_in_executor(computer, self.predictor.predict, images)

        self.predict = predict

    def __serve_build_asgi_app__(self) -> Starlette:
        return build_app(self.classify, self.version, self.config.token, self.config.max_body_mb * 10**6)

    async def classify(self, data: bytes, name: str, is_explained: bool) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        views = await loop.run_in_executor(self.readers, self.predictor.load, data, name)
        chances, quantile = await self.predict(views)
        probabilities = dict(zip(self.classes, chances, strict=True))
        best = max(probabilities, key=probabilities.__getitem__)
        label = best if probabilities[best] >= (self.config.abstain_below or 0) else UNSURE
        self.num_images.inc(tags={"label": label})
        answer = {"label": label, "probabilities": probabilities}
        if quantile is not None:
            answer["distance_quantile"] = quantile
        if is_explained:
            answer |= await loop.run_in_executor(self.readers, self.predictor.explain, data, name, best)
        return answer


def version_of(bundle: Bundle) -> dict[str, str]:
    """Of the checkpoint a hash of all that it says, and of this program."""
    described = hash_weights(dict(sorted(bundle.state.items()))) + json.dumps(bundle.info, sort_keys=True)
    return {"checkpoint": hashlib.sha256(described.encode()).hexdigest()[:12], "plates": versions()["plates"]}


def run_server(bundle: Bundle, settings: TrainConfig, config: ServeConfig) -> None:
    """Serves until Ctrl-C or SIGTERM. Raises: UserError where it cannot listen, or lacks the devices."""
    if not is_in_cluster():
        check_port(config)
    start_ray()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        raise UserError(f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}: Ray Serve runs there; serve shutdown ends it")
    plan = plan_workers(config.num_replicas, config.device, list_nodes(), "--num-replicas")
    http = {"host": config.host, "port": config.port, "request_timeout_s": REQUEST_TIMEOUT_S}
    try:
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=QUIET)
        deployment = serve.deployment(serve.ingress()(Replica), **list_options(plan, config))
        serve.run(deployment.bind(ray.put(bundle), settings, config, plan), name="plates", logging_config=QUIET)
        print(line_of(plan, config), flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        serve.shutdown()


def list_options(plan: Plan, config: ServeConfig) -> dict[str, Any]:
    """What a replica reserves, how many there are, and how many requests they take."""
    resources, num_at_once = plan.resources_per_worker, config.max_batch_size
    scale = {"min_replicas": 1, "max_replicas": plan.num_workers, "target_ongoing_requests": num_at_once}
    return {
        "ray_actor_options": {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)},
        "max_ongoing_requests": BATCHES_AT_WORK * num_at_once,
        "max_queued_requests": BATCHES_WAITING * num_at_once,
        "graceful_shutdown_wait_loop_s": SHUTDOWN_POLL_S,
        **({"autoscaling_config": scale} if config.num_replicas == "auto" else {"num_replicas": plan.num_workers}),
    }


def check_port(config: ServeConfig) -> None:
    """Raises: UserError where this machine cannot listen at the address."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else one that has just ended is in the way
            one.bind(address)
    except OSError as error:
        raise UserError(f"--host {config.host} --port {config.port}: {error.strerror}; give another") from error


def line_of(plan: Plan, config: ServeConfig) -> str:
    """Where it listens, on what it runs, and where its metrics are."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    at_most = "up to " if config.num_replicas == "auto" and plan.num_workers > 1 else ""
    each = f"{plural(plan.cpus_per_worker, 'CPU')}{' and a GPU' if plan.resource else ''}"
    replicas = f"{at_most}{plural(plan.num_workers, 'replica')} of {each}"
    nodes = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes() if node["Alive"]]
    metrics = ", ".join(f"http://{address}:{port}/metrics" for address, port in nodes)
    return f"listens at http://{host}:{config.port} with {replicas}; metrics at {metrics}; Ctrl-C ends it"
