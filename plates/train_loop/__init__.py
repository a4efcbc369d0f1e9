"""What runs on each worker, from the first image to the last prediction, and what the group hands back."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plates.checkpoint import Bundle, rebuild_model
from plates.cluster import this_node
from plates.dataset import Dataset
from plates.device import set_up_process
from plates.model import Classifier, build_classifier
from plates.timing import Phases, device_name, rate
from plates.train_loop.end_to_end import train_end_to_end
from plates.train_loop.frozen import labelled_features, train_head
from plates.train_loop.group import Worker, gather, share_of
from plates.train_loop.shared import SharedFeatures
from plates.train_loop.task import Predicted, Task, Trained
from plates.transforms import Preprocessing, draw_view, to_picture, view_batch


@dataclass(frozen=True)
class Features:
    """What many heads are fitted on: (V, N, F) of the training views, (M, F) of the validation split, (T, F) of the
    test split, not a number where `errors` says by path why an image cannot be read; and one timing row a worker."""

    train: Tensor
    val: Tensor
    test: Tensor
    errors: dict[str, str]
    timings: list[dict[str, Any]]


class Clock:
    """A worker's seconds by phase."""

    def __init__(self, task: Task, worker: Worker) -> None:
        """Where a worker's work begins."""
        self.worker = worker
        self.startup_s = time.time() - task.submitted_at
        set_up_process(worker.device, task.precision, worker.num_threads)
        self.phases = Phases(worker.device)

    def gather_rows(
        self, num_train_images: int, num_predicted: int, steady_rate: float | None
    ) -> list[dict[str, Any]]:
        """Each worker's row of timing.csv, and how many training images it computed, on rank 0; all take part."""
        seconds, worker = self.phases.seconds, self.worker
        row = {
            "rank": worker.rank,
            "node": this_node(worker.is_ray),
            "device": worker.device.type,
            "device_name": device_name(worker.device),
            "startup_s": self.startup_s,
            **{f"{phase}_s": seconds[phase] for phase in ("data", "train", "inference")},
            "train_images_per_sec": rate(num_train_images, seconds["train"]),
            "inference_images_per_sec": rate(num_predicted, seconds["inference"]),
            "num_train_images": num_train_images,
            "steady_images_per_sec": steady_rate,
        }
        return gather(row)


def train(task: Task, worker: Worker) -> Trained | None:
    """Trains, and predicts the test split, on one worker of the group. Every worker takes part; rank 0 returns the
    result, the others None."""
    clock = Clock(task, worker)
    model = build_model(task)
    if task.config.trainable == "head":
        shared = SharedFeatures(task, worker, model.trunk)
        with clock.phases.measure("train"):
            fitted = train_head(task, worker, model, shared)
    else:
        fitted = train_end_to_end(task, worker, model, clock.phases)
        shared = SharedFeatures(task, worker, model.trunk, is_trained=True)
    predicted = predict_test(clock, shared, model, fitted.num_images)
    if predicted is None or fitted.val_logits is None:
        return None
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return Trained(
        state, fitted.history, fitted.val_logits, predicted, fitted.has_reused_features, fitted.num_skipped_steps
    )


def predict(bundle: Bundle, task: Task, worker: Worker) -> Predicted | None:
    """Predicts the test split with a bundle's model; rank 0 returns the result, the others None."""
    clock = Clock(task, worker)
    model = rebuild_model(bundle)
    shared = SharedFeatures(task, worker, model.trunk, is_trained=task.config.trainable != "head")
    return predict_test(clock, shared, model, num_train_images=0)


def compute_features(task: Task, worker: Worker) -> Features | None:
    """The trunk's features alone, for many heads; rank 0 returns them."""
    clock = Clock(task, worker)
    model = build_model(task)
    shared = SharedFeatures(task, worker, model.trunk)
    with clock.phases.measure("train"):
        train, val, _ = labelled_features(task, shared)
    num_images = len(share_of(range(len(task.dataset.train)), worker)) * (task.config.num_views or task.config.epochs)
    test = predict_test(clock, shared, model, num_images, has_head=False)
    if train is None or val is None or test is None:
        return None
    return Features(train[:], val[:], test.logits, test.errors, test.timings)


def predict_test(
    clock: Clock, shared: SharedFeatures, model: Classifier, num_train_images: int, *, has_head: bool = True
) -> Predicted | None:
    """The last part of every loop: the test split through the trunk, each worker its share, and the head on it.

    has_head: without it the features stand in the place of the logits.
    """
    num_before, steady_rate = shared.num_computed, clock.worker.pace.steady_rate()  # of training alone
    with clock.phases.measure("inference"):
        stored, is_read = shared.complete_test()
        rows = shared.logits(model.head, stored) if has_head else shared.on_rank_0(stored)
    timings = clock.gather_rows(num_train_images, shared.num_computed - num_before, steady_rate)
    if rows is None:
        return None
    num_columns = model.head.out_features if has_head else model.head.in_features
    outputs = torch.full((len(is_read), num_columns), torch.nan)
    if len(rows):  # none has no columns
        outputs[torch.from_numpy(is_read)] = rows[:]
    return Predicted(outputs, shared.errors, timings)


def build_model(task: Task) -> Classifier:
    """The task's classifier before training."""
    weights, size = task.weights, task.preprocessing.image_size
    return build_classifier(weights.backbone, weights.state, len(task.dataset.classes), task.config.seed, size)


def draw_examples(
    dataset: Dataset, preprocessing: Preprocessing, seed: int, num_examples: int = 16
) -> list[tuple[np.ndarray, str]]:
    """First views of training images spread over the split: (S, S, 3) uint8 as the model sees them, class name."""
    step = max(1, len(dataset.train) // num_examples)
    examples = []
    for sample in dataset.train[: step * num_examples : step]:
        image = dataset.source.read(sample.path)
        view = draw_view(seed, 0, sample.path, image.shape[1], image.shape[2])
        model_input = view_batch([image], [view], preprocessing)[0]
        examples.append((to_picture(model_input, preprocessing), dataset.classes[sample.label or 0]))
    return examples
