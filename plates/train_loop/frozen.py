"""The frozen trunk: features computed by all workers once, the head fitted on them by rank 0."""

from plates.dataset import row_groups
from plates.features import EVAL
from plates.head import HeadSettings, fit_heads
from plates.model import Classifier
from plates.store import FeatureRows
from plates.train_loop.group import Worker, broadcast, share_of
from plates.train_loop.shared import SharedFeatures
from plates.train_loop.task import Fitted, Task


def train_head(task: Task, worker: Worker, model: Classifier, shared: SharedFeatures) -> Fitted:
    """The head alone: the group computes the trunk's features once, rank 0 fits the head on them.

    With the trunk frozen this is the same head as training end to end over the same views, to rounding.
    """
    config, dataset = task.config, task.dataset
    train, val, is_reused = labelled_features(task, shared)
    history, val_logits = [], None
    if train is not None and val is not None:
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
            groups=row_groups(dataset.source, dataset.train),
            evaluation=(val[:], dataset.val.labels),
            device=worker.device,
        )
        model.head.load_state_dict({"weight": heads.weight[0], "bias": heads.bias[0]})
        val_logits = heads.logits(val[:])[0]
        history = heads.history(0)
    model.head.load_state_dict(broadcast(model.head.state_dict()))
    return Fitted(history, val_logits, len(share_of(range(len(dataset.train)), worker)) * config.epochs, is_reused)


def labelled_features(task: Task, shared: SharedFeatures) -> tuple[FeatureRows | None, FeatureRows | None, bool]:
    """(V, N, F) of the training views and (M, F) of the validation split, on rank 0; and whether training views were
    stored before. Every worker takes part."""
    dataset, views = task.dataset, range(task.config.num_views or task.config.epochs)
    num_val, num_test = len(dataset.val), len(dataset.test)
    description = f"features in {task.precision}"
    of_train = shared.complete(dataset.train, views, description, num_later=num_val + num_test)
    train = shared.on_rank_0(of_train)
    val = shared.on_rank_0(shared.complete(dataset.val, [EVAL], num_later=num_test))
    if train is not None:
        train = train.arranged((len(dataset.train), len(views)), 1, 0)
    return train, val, of_train.is_reused
