"""A pass's candidates, their strengths and what nested cross-validation says of them, against sklearn alone."""

import numpy as np
import pytest
import torch
from made_up_trials import CONFIG, SAMPLES
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from plates.config import TuneConfig
from plates.dataset import Samples
from plates.logistic import STRENGTHS
from plates.sweep.readout_trials import Pass, score_readouts
from plates.sweep.scores import choose, make_folds

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = SAMPLES.labels
FOLDS = make_folds(SAMPLES, CONFIG)
NUM_VIEWS, ALIKE = 3, (1.0, 1.0)


def made_pass() -> Pass:
    """Of two readouts, the second of which tells more."""
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(2, 9, generator=generator) * torch.tensor([0.3] * 4 + [1.0] * 5)
    images = means[LABELS] + 1.5 * torch.randn(16, 9, generator=generator)
    features = images + 0.5 * torch.randn(NUM_VIEWS, 16, 9, generator=generator)
    columns = {"last/avg": slice(0, 4), "pre/max": slice(4, 9)}
    return Pass({"image_size": 64, "crop": "none"}, features * 3 + 1, columns)


def predict_alone(
    features: Tensor, evaluation: Tensor, train: np.ndarray, held: np.ndarray, strength: float, class_weights
):
    """(n, 2) log-probabilities of held-out images by sklearn, as `plates.logistic` states its objective."""
    inputs = features[:, train].flatten(0, 1).double().numpy()
    mean, std = inputs.mean(0), inputs.std(0)
    targets = LABELS[train].repeat(len(features)).numpy()
    weights = np.array(class_weights)[targets]
    solver = LogisticRegression(C=2 / (strength * weights.sum()), tol=1e-10, max_iter=10000, solver="newton-cg")
    solver.fit((inputs - mean) / std, targets, weights)
    half = solver.decision_function((evaluation[held].double().numpy() - mean) / std) / 2
    return np.stack([-half, half], 1)


def losses_of(logits: np.ndarray, held: np.ndarray) -> np.ndarray:
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return -log_p[np.arange(len(held)), LABELS[held].numpy()]


def search_alone(features: Tensor, evaluation: Tensor, class_weights) -> dict:
    """The same by brute force, fold by fold and strength by strength."""

    def score(fold, strength):
        logits = predict_alone(features, evaluation, *fold, strength, class_weights)
        return logits, losses_of(logits, fold[1])

    by_strength = [[score(fold, strength)[1] for fold in FOLDS.repeated] for strength in STRENGTHS]
    means = [np.concatenate(losses).mean() for losses in by_strength]
    nested_inner, nested_outer = [], []
    for outer, inner in FOLDS.nested:
        scored = [[score(fold, strength) for fold in inner] for strength in STRENGTHS]
        inner_means = [np.concatenate([losses for _, losses in one]).mean() for one in scored]
        chosen = int(np.argmin(inner_means))
        logits = np.concatenate([logits for logits, _ in scored[chosen]])
        held = np.concatenate([held for _, held in inner])

        def loss_at(log_heat, logits=logits, held=held):
            return losses_of(logits / np.exp(log_heat), held).mean()

        heat = np.exp(minimize_scalar(loss_at, bounds=np.log([0.5, 20]), method="bounded").x)
        of_outer = score(outer, STRENGTHS[chosen])[0] / heat
        is_right = of_outer.argmax(1) == LABELS[outer[1]].numpy()
        nested_inner.append(inner_means[chosen])
        nested_outer.append((losses_of(of_outer, outer[1]), is_right.astype(float)))
    best = int(np.argmin(means))
    fold_means = [losses.mean() for losses in by_strength[best]]
    return {"strength": STRENGTHS[best], "log_loss": means[best], "folds": fold_means,
            "nested_inner": nested_inner, "nested_outer": nested_outer}  # fmt: skip


@pytest.mark.parametrize(("tta", "class_weights"), [(1, ALIKE), (3, ALIKE), (3, (0.2, 3.0))])
def test_a_candidates_scores_are_those_of_a_search_by_brute_force(tta, class_weights):
    """Classes count in training alone."""
    found, num_views = made_pass(), 3
    scored = score_readouts(found, num_views, LABELS, class_weights, FOLDS, most_tta=3)
    for readout, columns in found.columns.items():
        features = found.features[:num_views, :, columns]
        expected = search_alone(features, features[:tta].mean(0), class_weights)
        ((settings, result),) = [one for one in scored if (one[0]["readout"], one[0]["tta"]) == (readout, tta)]
        assert settings["strength"] == expected["strength"]
        assert result.log_loss == pytest.approx(expected["log_loss"], abs=1e-5)
        assert result.fold_log_losses == pytest.approx(expected["folds"], abs=1e-5)
        assert result.nested_inner == pytest.approx(expected["nested_inner"], abs=1e-5)
        for (losses, is_right), (their_losses, theirs_right) in zip(
            result.nested_outer, expected["nested_outer"], strict=True
        ):
            # To how well the temperature is found here.
            assert losses == pytest.approx(their_losses, rel=1e-3, abs=1e-3)
            assert is_right == theirs_right.tolist()


def test_the_strengths_differ_so_that_the_choice_is_tested():
    found = made_pass()
    scored = score_readouts(found, 3, LABELS, ALIKE, FOLDS, most_tta=3)
    assert len({settings["strength"] for settings, _ in scored}) > 1
    assert any(STRENGTHS[0] < settings["strength"] < STRENGTHS[-1] for settings, _ in scored)


@pytest.mark.parametrize(
    ("num_views", "most_tta", "ttas"), [(1, 8, [1]), (3, 1, [1]), (3, 8, [1, 3]), (3, 2, [1, 2])]
)
def test_the_candidates_of_a_pass(num_views, most_tta, ttas):
    scored = score_readouts(made_pass(), num_views, LABELS, ALIKE, FOLDS, most_tta)
    assert [(settings["readout"], settings["tta"]) for settings, _ in scored] == [
        (readout, tta) for readout in ("last/avg", "pre/max") for tta in ttas
    ]
    for settings, _ in scored:
        assert {**settings, "readout": 0, "tta": 0, "strength": 0} == {
            "head": "logistic", "image_size": 64, "crop": "none", "num_views": num_views, "readout": 0, "tta": 0,
            "strength": 0,
        }  # fmt: skip


def test_the_cheapest_of_what_is_about_as_good_wins():
    """Pixels of an image to predict: (size squared) x views."""
    small, large = {"image_size": 32, "tta": 1}, {"image_size": 64, "tta": 1}
    twice = {"image_size": 32, "tta": 2}
    assert choose([0.304, 0.300], [small, large]) == 0
    assert choose([0.306, 0.300], [small, large]) == 1
    assert choose([0.305, 0.300], [{"image_size": 64, "tta": 1}] * 2) == 1, "as dear, and better"
    assert choose([0.300, 0.301, 0.302], [large, twice, small]) == 2
    assert choose([0.300, 0.304], [{"image_size": 64, "tta": 2}, {"image_size": 100, "tta": 1}]) == 0
    assert choose([0.2, 0.2], [small, small]) == 0, "of equals the first"
    assert choose([float("inf"), 0.9], [small, large]) == 1
    assert choose([float("inf")] * 2, [large, small]) == 1, "all diverged: none better than another"
    assert choose([0.304, 0.3], [{"lr": 1.0}, {"lr": 2.0}]) == 1, "schedules cost the same"


@pytest.mark.parametrize(
    ("num_images", "num_repeats", "num_inner"),
    [(40, 4, 5), (250, 4, 5), (500, 2, 5), (501, 1, 5), (1000, 1, 2), (5000, 1, 2)],
)
def test_folds_of_a_search_shrink_as_images_grow(num_images, num_repeats, num_inner):
    samples = Samples.of([str(i) for i in range(num_images)], [i % 2 for i in range(num_images)])
    folds = make_folds(samples, TuneConfig())
    assert TuneConfig().search == "all"
    assert len(folds.repeated) == 5 * num_repeats
    assert [len(inner) for _, inner in folds.nested] == [num_inner] * 5
    recipe = make_folds(samples, TuneConfig(search="recipe"))
    assert (len(recipe.repeated), len(recipe.nested[0][1])) == (20, 5)
    held = np.concatenate([held for _, held in folds.repeated[:5]])
    assert sorted(held) == list(range(num_images))
    assert len(make_folds(samples, TuneConfig(cv_repeats=1)).repeated) == 5
