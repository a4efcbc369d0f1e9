"""The frozen trunk: features computed by all workers once, the head fitted on them by rank 0."""

from math import nan

import torch

from plates.features import (
    Features,
    FrozenTrunk,
    compute_eval,
    compute_views,
    features_key,
    load_features,
    save_features,
)
from plates.head import Heads, HeadSettings, fit_heads
from plates.model import Classifier, dtype_name
from plates.timing import Phases
from plates.train_loop.group import Worker, broadcast, gather, interleave, labels_of, progress, shard, stack_rows
from plates.train_loop.task import Fitted, Task


def train_head(task: Task, worker: Worker, model: Classifier, dtype: torch.dtype, phases: Phases) -> Fitted:
    """The head alone: the group computes the trunk's features once, rank 0 fits the head on them.

    With the trunk frozen this is the same head as training end to end over the same views, to rounding.
    """
    config, dataset = task.config, task.dataset
    with phases.measure("train"):
        features, is_reused = shared_features(task, worker, model, dtype)
        history: list[dict[str, float]] = []
        val_logits = torch.zeros(0)
        if features is not None:
            settings = HeadSettings(
                lr=config.lr, step_size=config.step_size, gamma=config.gamma, indices=range(len(dataset.train))
            )
            heads = fit_heads(
                features.train,
                labels_of(dataset.train),
                [settings],
                (model.head.weight.detach(), model.head.bias.detach()),
                epochs=config.epochs,
                global_batch_size=config.global_batch_size,
                seed=config.seed,
                evaluation=(features.val, labels_of(dataset.val)),
            )
            model.head.load_state_dict({"weight": heads.weight[0], "bias": heads.bias[0]})
            val_logits = heads.logits(features.val)[0]
            history = history_of(heads)
    num_images = len(shard(dataset.train, worker)) * config.epochs
    return Fitted(history, val_logits, num_images, is_reused)


def shared_features(
    task: Task, worker: Worker, model: Classifier, dtype: torch.dtype
) -> tuple[Features | None, bool]:
    """All features on rank 0 (None on the others), stored or computed now, each worker its share of the images.

    Returns: the features, and whether they were stored before.
    """
    config, dataset = task.config, task.dataset
    num_views = config.num_views or config.epochs
    described = {
        "backbone": task.weights.backbone,
        "seed": config.seed,
        "num_views": num_views,
        "precision": dtype_name(dtype),
        "device": worker.device.type,
    }
    key = features_key(task.digests, (dataset.train, dataset.val), task.weights.state, task.preprocessing, described)
    path = task.cache_root / "features" / f"{key}.parquet"
    stored = None
    if worker.rank == 0:
        stored = load_features(path, num_views, len(dataset.train), len(dataset.val))
    if broadcast(stored is not None):
        return stored, True
    trunk = FrozenTrunk(model.trunk, task.preprocessing, worker.device, dtype)
    mine, my_val = shard(dataset.train, worker), shard(dataset.val, worker)
    computed = compute_views(trunk, dataset.source, mine, config.seed, num_views)
    train_rows = list(progress(computed, len(mine), f"features in {dtype_name(dtype)}", "image", worker))
    val_rows = [row[0] for row in compute_eval(trunk, dataset.source, my_val)]
    num_features = model.head.in_features
    shards = gather((stack_rows(train_rows, (num_views, num_features)), stack_rows(val_rows, (num_features,))))
    if worker.rank:
        return None, False
    train_features, val_features = (interleave(parts) for parts in zip(*shards, strict=True))
    features = Features(train_features.transpose(0, 1).contiguous(), val_features)
    save_features(path, features)
    return features, False


def history_of(heads: Heads, head: int = 0) -> list[dict[str, float]]:
    """One row an epoch of one head; figures of a split that was not scored are missing."""
    columns = {
        "lr": heads.lr,
        "train/loss": heads.train_loss,
        "train/accuracy": heads.train_accuracy,
        "val/loss": heads.eval_loss,
        "val/accuracy": heads.eval_accuracy,
    }
    return [
        {"epoch": epoch, **{name: float(values[epoch][head]) if values else nan for name, values in columns.items()}}
        for epoch in range(len(heads.lr))
    ]
