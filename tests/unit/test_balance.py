"""How much each class counts in the loss: what a user asks for, and what it comes to."""

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from plates.balance import weigh_classes
from plates.config import UserError
from plates.dataset import Dataset, Samples
from plates.sources import SyntheticSource

CLASSES = ("a=b,c", "clean", "dirty")  # folders may be called so
COUNTS = (1, 7, 3)


def make_dataset() -> Dataset:
    """Rare classes are frequent in the validation split, which must not matter."""
    labels = np.repeat(range(3), COUNTS).tolist()
    train = Samples.of([f"train/{index}.jpg" for index in range(len(labels))], labels)
    val = Samples.of([f"val/{index}.jpg" for index in range(9)], [0] * 9)
    return Dataset(SyntheticSource(0), CLASSES, train, val, Samples.of())


def test_auto_is_what_scikit_learn_calls_balanced():
    weights = weigh_classes("auto", make_dataset())
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.repeat(range(3), COUNTS))
    assert weights == pytest.approx(expected)
    assert sum(np.multiply(weights, COUNTS)) == pytest.approx(11), "the images' mean is 1"


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ("none", (1, 1, 1)),
        ("dirty=2.5", (1, 1, 2.5)),
        ("dirty=1e-3,clean=4", (1, 4, 1e-3)),
        ("a=b,c=3", (3, 1, 1)),
        ("clean=2,a=b,c=.5,dirty=7", (0.5, 2, 7)),
    ],
)
def test_weights_are_given_by_name_and_the_others_are_1(given, weights):
    assert weigh_classes(given, make_dataset()) == weights


@pytest.mark.parametrize("given", ["filthy=2", "dirty=2,filthy=2", "dirty =2", "clean=1;dirty=2"])
def test_a_class_that_there_is_not_is_refused(given):
    with pytest.raises(UserError, match=f"--class-weights {given}: no class .* among a=b,c, clean, dirty"):
        weigh_classes(given, make_dataset())
