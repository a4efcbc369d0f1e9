"""The frozen trunk: features computed by all workers once, the head fitted on them by rank 0."""

from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import chain

import pyarrow as pa
import torch

from plates.dataset import row_groups
from plates.device import fits
from plates.features import (
    Features,
    FrozenTrunk,
    compute_eval,
    compute_views,
    features_key,
    load_features,
    save_features,
)
from plates.head import HeadSettings, fit_heads
from plates.model import Classifier
from plates.parts import Parts, read_part
from plates.storage import Place
from plates.timing import Phases
from plates.train_loop.group import Worker, all_gather, broadcast, gather, labels_of, progress, shard, tell_left
from plates.train_loop.task import Fitted, Task

MAX_TRIES = 3  # to gather the parts of all workers


def train_head(task: Task, worker: Worker, model: Classifier, phases: Phases) -> Fitted:
    """The head alone: the group computes the trunk's features once, rank 0 fits the head on them.

    With the trunk frozen this is the same head as training end to end over the same views, to rounding.
    """
    config, dataset = task.config, task.dataset
    with phases.measure("train"):
        features, is_reused = shared_features(task, worker, model)
        history: list[dict[str, float]] = []
        val_logits = torch.zeros(0)
        if features is not None:
            settings = HeadSettings(
                lr=config.lr, step_size=config.step_size, gamma=config.gamma, indices=range(len(dataset.train))
            )
            device = worker.device if fits(features.train, worker.device) else torch.device("cpu")
            labels, val_labels = labels_of(dataset.train), labels_of(dataset.val)
            heads = fit_heads(
                features.train.to(device),
                labels.to(device),
                [settings],
                (model.head.weight.detach().to(device), model.head.bias.detach().to(device)),
                epochs=config.epochs,
                global_batch_size=config.global_batch_size,
                seed=config.seed,
                groups=row_groups(dataset.source, dataset.train),
                evaluation=(features.val.to(device), val_labels.to(device)),
            )
            model.head.load_state_dict({"weight": heads.weight[0], "bias": heads.bias[0]})
            val_logits = heads.logits(features.val)[0]
            history = heads.history(0)
    num_images = len(shard(dataset.train, worker)) * config.epochs
    return Fitted(history, val_logits, num_images, is_reused)


def shared_features(task: Task, worker: Worker, model: Classifier) -> tuple[Features | None, bool]:
    """All features on rank 0 (None on the others), stored or computed now, each worker its share of the images.

    Returns: the features, and whether they, or a part of them, were stored before.
    """
    config, dataset = task.config, task.dataset
    num_views = config.num_views or config.epochs
    described = {
        "backbone": task.weights.backbone,
        "seed": config.seed,
        "num_views": num_views,
        "precision": task.precision,
        "device": worker.device.type,
    }
    key = features_key(task.digests, (dataset.train, dataset.val), task.weights.state, task.preprocessing, described)
    path = task.cache_root / "features" / f"{key}.npy"
    shape = (num_views, len(dataset.train), len(dataset.val))
    stored = load_features(path, *shape) if worker.rank == 0 else None
    if broadcast(stored is not None):
        tell_left(task.run, 0, worker)
        return stored, True
    trunk = FrozenTrunk(model.trunk, task.preprocessing, worker.device, task.precision, worker.pace)
    with closing(Parts(task.cache_root / "features", key)) as parts:
        is_continued = compute_parts(task, worker, trunk, parts)
        for _ in range(MAX_TRIES):
            stored = store_whole(parts, worker, path, shape)
            if broadcast(stored is not None):
                parts.remove()
                return stored, is_continued
            compute_parts(task, worker, trunk, parts)  # what is damaged, or gone with another run of the same
    raise FileNotFoundError(f"{path}: cannot be stored and read back whole; run again")


def store_whole(parts: Parts, worker: Worker, path: Place, shape: tuple[int, int, int]) -> Features | None:
    """On rank 0 the features, stored from all workers' parts or by another run of the same ones; None where parts are
    missing. Every worker takes part."""
    tables = gather_parts(parts)
    if worker.rank:
        deque(tables, maxlen=0)
        return None
    with suppress(FileNotFoundError):
        save_features(path, tables, *shape)
    return load_features(path, *shape)


def compute_parts(task: Task, worker: Worker, trunk: FrozenTrunk, parts: Parts) -> bool:
    """Computes this worker's share of the rows that no worker has, training images first, and lists as its own the
    parts that it alone or first sees; whether any worker had some."""
    config, dataset = task.config, task.dataset
    found = parts.find()
    seen = all_gather({index for indices in (*found.values(), parts.pending) for index in indices})
    known, claimed = set[int]().union(*seen), set[int]().union(*seen[: worker.rank])
    parts.places = [place for place, indices in found.items() if not claimed.issuperset(indices)]
    num_train = len(dataset.train)
    samples = [*dataset.train, *dataset.val]
    tell_left(task.run, len(samples) - len(known), worker)
    missing_train = shard([i for i in range(num_train) if i not in known], worker)
    missing_val = shard([i for i in range(num_train, len(samples)) if i not in known], worker)
    views = compute_views(
        trunk,
        dataset.source,
        [samples[i] for i in missing_train],
        config.seed,
        config.num_views or config.epochs,
    )
    bar = progress(views, len(missing_train), f"features in {task.precision}", "image", worker)
    evals = compute_eval(trunk, dataset.source, [samples[i].path for i in missing_val])
    for index, row in zip([*missing_train, *missing_val], chain(bar, evals), strict=True):
        parts.add(index, row)
    return bool(known)


def gather_parts(parts: Parts) -> Iterator[pa.Table]:
    """All workers' parts on rank 0, one of each worker at a time; every worker takes part to the end."""
    reads = [*(partial(read_part, place) for place in parts.places), parts.pending_table]
    for turn in range(max(all_gather(len(reads)))):
        tables = gather(reads[turn]() if turn < len(reads) else None)
        yield from (table for table in tables if table is not None and len(table))
