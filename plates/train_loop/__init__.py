"""What runs on each worker: the ways of training, and what the group hands back."""

import time
from typing import Any

import numpy as np

from plates.cluster import this_node
from plates.dataset import Dataset
from plates.device import set_up_process
from plates.features import Features
from plates.model import Classifier, build_classifier
from plates.timing import Phases, device_name, rate
from plates.train_loop.end_to_end import train_end_to_end
from plates.train_loop.frozen import shared_features, train_head
from plates.train_loop.group import Worker, gather, shard
from plates.train_loop.task import Task, Trained
from plates.transforms import Preprocessing, draw_view, to_picture, view_batch


def train(task: Task, worker: Worker) -> Trained | None:
    """Trains on one worker of the group. Every worker takes part; rank 0 returns the result, the others None."""
    startup_s = time.time() - task.submitted_at
    set_up_process(worker.device, task.precision, worker.num_threads)
    phases = Phases(worker.device)
    model = build_model(task)
    way = train_head if task.config.trainable == "head" else train_end_to_end
    fitted = way(task, worker, model, phases)
    timings = gather(time_worker(worker, startup_s, phases, fitted.num_images))
    if worker.rank:
        return None
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return Trained(
        state, fitted.history, fitted.val_logits, timings, fitted.has_reused_features, fitted.num_skipped_steps
    )


def compute_features(task: Task, worker: Worker) -> tuple[Features, list[dict[str, Any]]] | None:
    """The trunk's features alone, for many heads; rank 0 returns them, and a timing row a worker."""
    startup_s = time.time() - task.submitted_at
    set_up_process(worker.device, task.precision, worker.num_threads)
    phases = Phases(worker.device)
    model = build_model(task)
    with phases.measure("train"):
        features, _ = shared_features(task, worker, model)
    num_images = len(shard(task.dataset.train, worker)) * (task.config.num_views or task.config.epochs)
    timings = gather(time_worker(worker, startup_s, phases, num_images))
    return (features, timings) if features is not None else None


def build_model(task: Task) -> Classifier:
    """The task's classifier before training."""
    weights, size = task.weights, task.preprocessing.image_size
    return build_classifier(weights.backbone, weights.state, len(task.dataset.classes), task.config.seed, size)


def time_worker(worker: Worker, startup_s: float, phases: Phases, num_images: int) -> dict[str, Any]:
    """This worker's row of timing.csv, without its prediction; and how many training images it computed."""
    return {
        "rank": worker.rank,
        "node": this_node(worker.is_ray),
        "device": worker.device.type,
        "device_name": device_name(worker.device),
        "startup_s": startup_s,
        "data_s": phases.seconds["data"],
        "train_s": phases.seconds["train"],
        "train_images_per_sec": rate(num_images, phases.seconds["train"]),
        "num_train_images": num_images,
        "steady_images_per_sec": worker.pace.steady_rate(),
    }


def draw_examples(
    dataset: Dataset, preprocessing: Preprocessing, seed: int, num_examples: int = 16
) -> list[tuple[np.ndarray, str]]:
    """First views of training images spread over the split: (S, S, 3) uint8 as the model sees them, class name."""
    step = max(1, len(dataset.train) // num_examples)
    examples = []
    for sample in dataset.train[::step][:num_examples]:
        image = dataset.source.read(sample.path)
        view = draw_view(seed, 0, sample.path, image.shape[1], image.shape[2])
        model_input = view_batch([image], [view], preprocessing)[0]
        examples.append((to_picture(model_input, preprocessing), dataset.classes[sample.label or 0]))
    return examples
