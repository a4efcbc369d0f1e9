"""What runs on each worker, from the first image to the last prediction, and what the group hands back."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plates.checkpoint import Bundle, rebuild_model
from plates.cluster import this_node
from plates.device import set_up_process
from plates.model import Classifier, build_classifier
from plates.reference import Reference
from plates.samples import Samples
from plates.timing import Phases, device_name, rate
from plates.train_loop.end_to_end import train_end_to_end
from plates.train_loop.frozen import labelled_features, make_reference, train_head
from plates.train_loop.group import Worker, broadcast, gather, share_of
from plates.train_loop.shared import SharedFeatures
from plates.train_loop.task import Predicted, Task, Trained
from plates.transforms import draw_views


@dataclass(frozen=True)
class Features:
    """What many heads are fitted on: (V, N, F) of the training views; (M, F) of the validation split, each image's
    mean over its views; and, with such features in the place of logits, the test split."""

    train: Tensor
    val: Tensor
    test: Predicted


@dataclass(frozen=True)
class Searched:
    """The features of the task itself; the (V, N, F) of each pass, None of one that was left out; and the seconds
    that are likely for a trial on a thread, by its number of views, and for predicting one view of the test split at
    the largest size among the passes."""

    of_task: Features
    of_passes: list[Tensor | None]
    trial_s: dict[int, float]
    time_to_predict_s: float


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


def train(task: Task, worker: Worker, *, has_reference: bool = True) -> Trained | None:
    """Trains, and predicts the test split, on one worker of the group. Every worker takes part; rank 0 returns the
    result, the others None.

    has_reference: whether the model is to be kept, with training images to compare others with.
    """
    clock = Clock(task, worker)
    model = build_model(task)
    if task.config.trainable == "head":
        shared = SharedFeatures(task, worker, model.trunk)
        with clock.phases.measure("train"):
            fitted = train_head(task, worker, model, shared)
    else:
        fitted = train_end_to_end(task, worker, model, clock.phases)
        shared = SharedFeatures(task, worker, model.trunk, is_trained=True)
    with clock.phases.measure("train"):
        reference = make_reference(task, shared) if has_reference else None
    predicted = predict_test(clock, shared, model, fitted.num_images, reference)
    if predicted is None or fitted.val_logits is None:
        return None
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return Trained(state, fitted.history, fitted.val_logits, predicted, fitted.has_reused_features, fitted.figures)


def predict(bundle: Bundle, task: Task, worker: Worker) -> Predicted | None:
    """Predicts the test split with a bundle's model; rank 0 returns the result, the others None."""
    clock = Clock(task, worker)
    model = rebuild_model(bundle)
    shared = SharedFeatures(task, worker, model.trunk, is_trained=task.config.trainable != "head")
    is_new = not bundle.reference and task.dataset.train  # a sweep's, whose features are stored
    reference = make_reference(task, shared) if is_new else bundle.reference
    return predict_test(clock, shared, model, 0, reference)


def compute_features(task: Task, worker: Worker) -> Features | None:
    """The trunk's features alone, for many heads; rank 0 returns them."""
    clock = Clock(task, worker)
    model = build_model(task)
    shared = SharedFeatures(task, worker, model.trunk)
    with clock.phases.measure("train"):
        train, val, _ = labelled_features(task, shared)
        reference = make_reference(task, shared)
    num_images = len(share_of(range(len(task.dataset.train)), worker)) * len(task.config.train_views)
    test = predict_test(clock, shared, model, num_images, reference, has_head=False)
    if train is None or val is None or test is None:
        return None
    return Features(train[:], val[:].mean(0), test)


def compute_passes(
    passes: Sequence[Task],
    deadline: float,
    time_trials: Callable[[Tensor], dict[int, float]],
    task: Task,
    worker: Worker,
) -> Searched | None:
    """The features that a search needs: the task's own, as `compute_features` has them, and those of each pass, from
    cheap to expensive, but for what would not be done by the deadline with the trials of all passes so far and the
    prediction of the test split after it.

    deadline: seconds since the epoch, on the clock of rank 0.
    time_trials: from a pass's features the seconds on a thread of its trials, by their number of views; of the others
        the first pass's stand, which have as many images, views and features.
    """
    start_s = time.perf_counter()
    found = compute_features(replace(task, dataset=replace(task.dataset, test=Samples.of())), worker)
    seconds_per_pixel = (time.perf_counter() - start_s) / count_pixels(task, task.dataset.train)
    trunk, features, largest = build_model(task).trunk, list[Tensor | None](), task.preprocessing.image_size
    trial_s, num_done = dict[int, float](), 0
    for one in passes:
        num_pixels, size = count_pixels(one, one.dataset.train), one.preprocessing.image_size
        ends_at = time.time() + seconds_per_pixel * (num_pixels + size**2 * len(task.dataset.test))
        ends_at += max(0.0, *trial_s.values(), (num_done + 1) * sum(trial_s.values()) / sum(worker.threads))
        features.append(None)
        if broadcast(ends_at < deadline):
            start_s, largest = time.perf_counter(), max(largest, size)
            train, _, _ = labelled_features(one, SharedFeatures(one, worker, trunk))
            seconds_per_pixel = max(seconds_per_pixel, (time.perf_counter() - start_s) / num_pixels)
            num_done += 1
            if train is not None:
                features[-1] = train[:]
                trial_s = trial_s or time_trials(features[-1])
    return found and Searched(found, features, trial_s, seconds_per_pixel * largest**2 * len(task.dataset.test))


def count_pixels(task: Task, samples: Samples) -> int:
    """That the trunk sees of the samples' training views."""
    return task.preprocessing.image_size**2 * len(task.config.train_views) * len(samples)


def predict_test(
    clock: Clock,
    shared: SharedFeatures,
    model: Classifier,
    num_train_images: int,
    reference: Reference | None,
    *,
    has_head: bool = True,
) -> Predicted | None:
    """The last part of every loop: the test split through the trunk, each worker its share, and the head on it.

    has_head: without it the features stand in the place of the logits.
    """
    num_before, steady_rate = shared.num_computed, clock.worker.pace.steady_rate()  # of training alone
    with clock.phases.measure("inference"):
        stored, is_read, seen = shared.complete_test()
        found = shared.logits(model.head, stored) if has_head else shared.on_rank_0(stored)
        as_is = stored.every(len(shared.task.config.eval_views))
        compared = shared.of_rows(reference.compare, 3, as_is) if reference else None
    timings = clock.gather_rows(num_train_images, shared.num_computed - num_before, steady_rate)
    if found is None:
        return None
    num_columns = model.head.out_features if has_head else model.head.in_features
    outputs, of_all = (torch.full((len(is_read), num), torch.nan) for num in (num_columns, 3))
    if len(found):  # none has no columns
        by_view = found[:].unflatten(0, (int(is_read.sum()), -1))
        outputs[torch.from_numpy(is_read)] = by_view.mean(1)
    if compared is None:
        return Predicted(outputs, shared.errors, timings, seen)
    of_all[torch.from_numpy(is_read)] = compared
    return Predicted(outputs, shared.errors, timings, seen, reference, of_all)


def build_model(task: Task) -> Classifier:
    """The task's classifier before training."""
    weights, size = task.weights, task.preprocessing.image_size
    num_classes, seed = len(task.dataset.classes), task.config.seed
    return build_classifier(weights.backbone, weights.state, num_classes, seed, size, task.config.readout)


def draw_examples(task: Task, num_examples: int = 16) -> list[tuple[np.ndarray, str]]:
    """First views of training images spread over the split: (S, S, 3) uint8 as the model sees them, class name."""
    dataset, preprocessing, drawing = task.dataset, task.preprocessing, task.drawing
    num_views = len(task.config.train_views)
    step = max(1, len(dataset.train) // num_examples)
    examples = []
    for sample in dataset.train[: step * num_examples : step]:
        image, number = dataset.source.read(sample.path), task.config.train_views[len(examples) % num_views]
        pictures = draw_views(image, [number], drawing.seed, sample.path, preprocessing, is_turned=drawing.is_turned)
        examples.append((pictures[0], dataset.classes[sample.label or 0]))
    return examples
