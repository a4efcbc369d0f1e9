"""How much an image of each class counts in the loss."""

from plates.config import UserError
from plates.dataset import Dataset
from plates.rules import parse_class_weights


def weigh_classes(class_weights: str, dataset: Dataset) -> tuple[float, ...]:
    """The weight of each class, in their order, that --class-weights gives.

    Of auto n / (C * n_c) of the training images, so that all classes together count alike and the images' mean is 1:
    G. King and L. Zeng, Logistic Regression in Rare Events Data, 2001, as scikit-learn's "balanced" has it.

    Raises: UserError for a class that the data set does not have.
    """
    if class_weights == "auto":
        labels, num_classes = dataset.train.labels, len(dataset.classes)
        counts = labels.bincount(minlength=num_classes).tolist()
        return tuple(len(labels) / (num_classes * count) for count in counts)
    named = {} if class_weights == "none" else parse_class_weights(class_weights) or {}
    for name in named:
        if name not in dataset.classes:
            classes = ", ".join(dataset.classes)
            raise UserError(f"--class-weights {class_weights}: no class {name} among {classes}")
    return tuple(named.get(name, 1.0) for name in dataset.classes)
