"""The frozen trunk: features computed by all workers once, the head fitted on them by rank 0."""

import math

import torch
from torch import Tensor

from plates.dataset import row_groups
from plates.head import Heads, HeadSettings, fit_heads, score_heads
from plates.model import Classifier
from plates.reference import Reference, spread_evenly
from plates.store import FeatureRows
from plates.train_loop.group import Worker, broadcast, share_of
from plates.train_loop.shared import SharedFeatures
from plates.train_loop.task import Fitted, Task
from plates.transforms import EVAL


def train_head(task: Task, worker: Worker, model: Classifier, shared: SharedFeatures) -> Fitted:
    """The head alone: the group computes the trunk's features once, rank 0 fits the head on them.

    With the trunk frozen adam's is the same head as training end to end over the same views, to rounding.
    """
    config, dataset = task.config, task.dataset
    is_logistic = config.head == "logistic"
    train, val, is_reused = labelled_features(task, shared)
    as_predicted = eval_features(task, shared) if is_logistic else None
    heads, figures, history, val_logits = None, {}, [], None
    if train is not None and val is not None:
        evaluation = (val[:].mean(0), dataset.val.labels)  # logits are linear in features
        if as_predicted is not None:
            heads, figures = fit_by_strength(task, train[:], as_predicted, evaluation)
        else:
            settings = HeadSettings(
                lr=config.lr, step_size=config.step_size, gamma=config.gamma, indices=range(len(dataset.train))
            )
            heads = fit_heads(
                train,
                dataset.train.labels,
                [settings],
                (model.head.weight.detach(), model.head.bias.detach()),
                epochs=config.epochs,
                global_batch_size=config.global_batch_size,
                seed=config.seed,
                class_weights=task.class_weights,
                groups=row_groups(dataset.source, dataset.train),
                evaluation=evaluation,
                device=worker.device,
            )
        model.head.load_state_dict({"weight": heads.weight[0], "bias": heads.bias[0]})
        val_logits, history = heads.logits(evaluation[0])[0], heads.history(0)
    model.head.load_state_dict(broadcast(model.head.state_dict()))
    num_views = len(config.train_views) if is_logistic else config.epochs
    num_images = len(share_of(range(len(dataset.train)), worker)) * num_views
    return Fitted(history, val_logits, num_images, is_reused, figures)


def fit_by_strength(
    task: Task, train: Tensor, as_predicted: Tensor, evaluation: tuple[Tensor, Tensor]
) -> tuple[Heads, dict[str, float | int]]:
    """Logistic regression of the strength, and at the temperature, that cross-validation finds: one head, of one row
    of history; and both figures.

    Args:
        train: (V, N, F) of the views to train on.
        as_predicted: (N, F) of the same images as validation and prediction see them.
        evaluation: (M, F) and (M,) of the validation split.
    """
    from plates.logistic import choose_strength, fit_logistic  # scikit-learn and scipy, which nothing else needs

    labels, num_classes = task.dataset.train.labels, len(task.dataset.classes)
    class_weights, everything = task.class_weights, torch.ones(1, len(labels), dtype=torch.bool)
    strength, heat = choose_strength(train, labels, num_classes, as_predicted, task.config.seed, class_weights)
    weight, bias = fit_logistic(train, labels, num_classes, everything, [strength], class_weights)
    weight, bias = weight[0] / heat, bias[0] / heat
    scores = (*score_heads(weight, bias, (as_predicted, labels)), *score_heads(weight, bias, evaluation))
    figures = torch.stack([torch.full_like(scores[0], math.nan), *scores], 1)[:, None]  # (1, 1, 5)
    return Heads(weight, bias, figures), {"head/strength": strength, "head/temperature": heat}


def eval_features(task: Task, shared: SharedFeatures) -> Tensor | None:
    """(N, F) of the training images as validation and prediction see them, on rank 0. Every worker takes part."""
    samples, views = task.dataset.train, task.config.eval_views
    rows = shared.on_rank_0(shared.complete(samples, views, num_later=len(task.dataset.test)))
    return None if rows is None else rows.arranged((len(samples), len(views)), 1, 0)[:].mean(0)


def make_reference(task: Task, shared: SharedFeatures) -> Reference:
    """Training images to compare others with, of many some, all as they are; on every worker, who all take part."""
    chosen = task.dataset.train.take(spread_evenly(len(task.dataset.train)))
    rows = shared.on_rank_0(shared.complete(chosen, [EVAL], num_later=len(task.dataset.test)))
    reference = broadcast(None if rows is None else Reference.of(rows[:]))
    assert reference, "rank 0 has all rows"
    return reference


def labelled_features(task: Task, shared: SharedFeatures) -> tuple[FeatureRows | None, FeatureRows | None, bool]:
    """(V, N, F) of the training views and (T, M, F) of those of the validation split, on rank 0; and whether training
    views were stored before. Every worker takes part."""
    dataset, views, eval_views = task.dataset, task.config.train_views, task.config.eval_views
    num_val, num_test = len(dataset.val), len(dataset.test)
    description = f"features in {task.precision}"
    of_train = shared.complete(dataset.train, views, description, num_later=num_val + num_test)
    train = shared.on_rank_0(of_train)
    val = shared.on_rank_0(shared.complete(dataset.val, eval_views, num_later=num_test))
    if train is not None and val is not None:
        train = train.arranged((len(dataset.train), len(views)), 1, 0)
        val = val.arranged((len(dataset.val), len(eval_views)), 1, 0)
    return train, val, of_train.is_reused
