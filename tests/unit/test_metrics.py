"""Figures of a split, against counts made by hand."""

import math

import torch

from plates.metrics import score


def test_each_class_has_its_precision_recall_and_f1():
    """Of 4 a and 2 b, 3 a are found and 1 b; one b is taken for a and one a for b. No c is there, nor d predicted."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0, 2])
    figures = score(torch.eye(4)[predicted], labels, ("a", "b", "c", "d"), "test")
    assert figures["test/accuracy"] == 4 / 7
    expected = {
        "precision": {"a": 3 / 4, "b": 1 / 2, "c": 0.0, "d": math.nan},
        "recall": {"a": 3 / 4, "b": 1 / 2, "c": math.nan, "d": 0.0},
        "f1": {"a": 3 / 4, "b": 1 / 2, "c": 0.0, "d": 0.0},
    }
    for figure, of_class in expected.items():
        found = [figures[f"test/{figure}/{name}"] for name in of_class]
        assert all(type(value) is float for value in found)
        torch.testing.assert_close(torch.tensor(found), torch.tensor([*of_class.values()]), equal_nan=True)
