import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.nn.functional import cross_entropy

from plates.logistic import STRENGTHS as STRENGTHS_SEARCHED
from plates.logistic import choose_strength, fit_logistic, logits_of_folds, mask_folds, solve_fold, temperature

pytestmark = pytest.mark.usefixtures("one_thread")
STRENGTHS = (0.01, 3.0, 0.1)  # in no order


def data(num_views=1, num_images=24, num_features=40, num_classes=2, seed=0):
    """Features that tell something of the labels, and three folds, of which two train on unlike numbers of images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    means = torch.randn(num_classes, num_features, generator=generator)
    shape = (num_views, num_images, num_features)
    scales = torch.rand(num_features, generator=generator) * 3 + 0.1
    features = (means[labels] * 0.7 + torch.randn(shape, generator=generator)) * scales + 2
    kept = torch.ones(3, num_images, dtype=torch.bool)
    kept[1, :5] = False
    kept[2, -8:] = False
    return features, labels, kept


def fit_alone(features, labels, kept, strength, class_weights=None):
    """sklearn on standardised views of the kept images, each of weight 1/V; returns its pipeline.

    sklearn's sum over images is as many times the mean here as they weigh; of two classes its weight is the
    difference of two."""
    class_weights = class_weights or [1.0] * (int(labels.max()) + 1)
    num_views, total = len(features), float(torch.tensor(class_weights)[labels[kept]].sum())
    inputs = features[:, kept].flatten(0, 1).double().numpy()
    targets = labels[kept].repeat(num_views).numpy()
    factor = 2 if len(np.unique(targets)) == 2 else 1
    by_class = dict(enumerate(class_weights))
    model = LogisticRegression(C=factor / (strength * total), tol=1e-10, max_iter=10000, solver="newton-cg",
                               class_weight=by_class)  # fmt: skip
    pipeline = make_pipeline(StandardScaler(), model)
    pipeline.fit(inputs, targets, logisticregression__sample_weight=np.full(len(targets), 1 / num_views))
    return pipeline


def standardised(features, weight, bias, kept):
    """A linear layer of raw features as one of standardised features, and those features, in float64."""
    rows = features[:, kept].double().flatten(0, 1)
    mean, std = rows.mean(0), rows.std(0, correction=0)
    weight, bias = weight.double(), bias.double()
    return weight * std, bias + weight @ mean, (rows - mean) / std


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("shape", [(1, 24, 40), (4, 24, 40), (1, 60, 10), (4, 24, 96), (4, 24, 20)])
def test_equals_sklearn_of_the_same_objective(shape, num_classes):
    """More views than features and fewer, as many of both in one case, in all folds."""
    features, labels, kept = data(*shape, num_classes)
    weight, bias = fit_logistic(features, labels, num_classes, kept, STRENGTHS)
    assert weight.shape == (3, 3, num_classes, shape[2])
    assert bias.shape == (3, 3, num_classes)
    evaluation = features.mean(0)
    direct = logits_of_folds(features, labels, num_classes, kept, STRENGTHS, evaluation)
    for fold in range(3):
        for place, strength in enumerate(STRENGTHS):
            expected = fit_alone(features, labels, kept[fold], strength).predict_log_proba(
                evaluation.double().numpy()
            )
            logits = evaluation.double() @ weight[fold, place].double().T + bias[fold, place]
            assert np.abs(logits.log_softmax(1).numpy() - expected).max() < 2e-5
            assert np.abs(log_softmax(direct[fold, place].numpy(), 1) - expected).max() < 2e-5


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("num_features", [30, 300])
def test_gradient_of_the_stated_objective_is_zero_by_autograd(num_features, num_classes):
    """To what rounding the weights to float32 leaves of it."""
    features, labels, kept = data(3, 24, num_features, num_classes)
    weights, biases = fit_logistic(features, labels, num_classes, kept, STRENGTHS)
    for fold in range(3):
        for place, strength in enumerate(STRENGTHS):
            weight, bias, rows = standardised(features, weights[fold, place], biases[fold, place], kept[fold])
            weight.requires_grad_()
            bias.requires_grad_()
            loss = cross_entropy(rows @ weight.T + bias, labels[kept[fold]].repeat(3))
            (loss + strength / 2 * weight.square().sum()).backward()
            assert weight.grad.abs().max() < 3e-7
            assert bias.grad.abs().max() < 3e-7
            assert bias.sum().abs() < 1e-5


@pytest.mark.parametrize("class_weights", [(0.3, 1.0, 4.0), (5.0, 1e-3, 1.0)])
def test_weighted_classes_equal_sklearn_and_have_no_gradient(class_weights):
    """Of torch's weighted mean, which is divided by the summed weights. Views are standardised without any."""
    features, labels, kept = data(3, 24, 30, 3)
    weights, biases = fit_logistic(features, labels, 3, kept, STRENGTHS, class_weights)
    direct = logits_of_folds(features, labels, 3, kept, STRENGTHS, features[0], class_weights)
    for fold in range(3):
        for place, strength in enumerate(STRENGTHS):
            alone = fit_alone(features, labels, kept[fold], strength, class_weights)
            expected = alone.predict_log_proba(features[0].double().numpy())
            assert np.abs(log_softmax(direct[fold, place].numpy(), 1) - expected).max() < 2e-5
            weight, bias, rows = standardised(features, weights[fold, place], biases[fold, place], kept[fold])
            weight.requires_grad_()
            bias.requires_grad_()
            by_class = torch.tensor(class_weights, dtype=torch.float64)
            loss = cross_entropy(rows @ weight.T + bias, labels[kept[fold]].repeat(3), by_class)
            (loss + strength / 2 * weight.square().sum()).backward()
            assert weight.grad.abs().max() < 3e-7
            assert bias.grad.abs().max() < 3e-7


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_class_of_weight_2_is_as_its_images_twice(num_classes):
    """Standardised inputs: without weights, images twice would change how they are standardised."""
    features, labels, _ = data(num_classes=num_classes)
    inputs, targets = features[0].double().numpy(), labels.numpy()
    twice = np.concatenate([np.arange(24), np.flatnonzero(targets == 1)])
    by_class, alike = np.array([1.0, 2.0, 1.0][:num_classes]), np.ones(num_classes)
    weighted = solve_fold(inputs, targets, by_class, STRENGTHS, 24)
    listed = solve_fold(inputs[twice], targets[twice], alike, STRENGTHS, len(twice))
    for one, other in zip(weighted, listed, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(weighted[0] - solve_fold(inputs, targets, alike, STRENGTHS, 24)[0]).max() > 1e-3


def test_held_images_do_not_influence_a_fold():
    features, labels, kept = data(2)
    kept = kept[1:]
    fitted = fit_logistic(features, labels, 2, kept, STRENGTHS)
    for fold in range(2):
        changed, relabelled = features.clone(), labels.clone()
        changed[:, ~kept[fold]] = 1e6
        relabelled[~kept[fold]] = 0
        again = fit_logistic(changed, relabelled, 2, kept[fold : fold + 1], STRENGTHS)
        assert all(torch.equal(old[fold], new[0]) for old, new in zip(fitted, again, strict=True))


def test_views_alike_are_one_image_and_images_twice_change_nothing():
    features, labels, kept = data()
    once = fit_logistic(features, labels, 2, kept, STRENGTHS)
    views = fit_logistic(features.repeat(3, 1, 1), labels, 2, kept, STRENGTHS)
    images = fit_logistic(features.repeat(1, 2, 1), labels.repeat(2), 2, kept.repeat(1, 2), STRENGTHS)
    for one, three, twice in zip(once, views, images, strict=True):
        torch.testing.assert_close(three, one, atol=1e-5, rtol=0)
        torch.testing.assert_close(twice, one, atol=1e-5, rtol=0)


def test_stronger_is_smaller_and_the_order_of_strengths_is_that_asked_for():
    features, labels, kept = data(num_classes=3)
    strengths = [0.3, 1e-3, 10.0, 1e-5]
    weight, _ = fit_logistic(features, labels, 3, kept[:1], strengths)
    norms = {strength: float(weight[0, place].norm()) for place, strength in enumerate(strengths)}
    assert sorted(norms, key=norms.__getitem__) == sorted(strengths, reverse=True)


def test_constant_dimension_has_no_weight_and_changes_nothing():
    """0.1 in float32: its mean over 24 images rounds, and a deviation of 1e-17 must not be scaled to 1."""
    features, labels, kept = data()
    padded = torch.cat([features, torch.full((*features.shape[:2], 1), 0.1)], 2)
    weight, bias = fit_logistic(features, labels, 2, kept, STRENGTHS)
    with_constant, same_bias = fit_logistic(padded, labels, 2, kept, STRENGTHS)
    assert with_constant[..., -1].abs().max() < 1e-6
    torch.testing.assert_close(with_constant[..., :-1], weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(same_bias, bias, atol=1e-5, rtol=0)


def test_features_of_a_large_offset():
    """Folding the scaling into float32 keeps the logits that standardised features give, in float64, to 1e-4."""
    features, labels, kept = data(num_features=200)
    moved = features + 1000  # of float32, so rounded to 6e-5
    weight, bias = fit_logistic(moved, labels, 2, kept, STRENGTHS)
    expected = logits_of_folds(moved, labels, 2, kept, STRENGTHS, moved[0])
    logits = moved[0].double() @ weight.double().mT + bias.double()[:, :, None]
    assert (logits - expected).abs().max() < 1e-4


def test_separable_data_converge_at_weak_strengths():
    features, labels, kept = data(4, num_features=300)
    logits = logits_of_folds(features, labels, 2, kept, [1e-3, 1e-5, 1e-7], features[0])
    assert logits.isfinite().all()
    assert (logits.argmax(3) == labels)[kept[:, None].expand(-1, 3, -1)].all()


def test_what_does_not_converge_is_told(monkeypatch):
    monkeypatch.setattr("plates.logistic.MAX_NEWTON_STEPS", 2)
    with pytest.raises(
        RuntimeError, match=r"strength 1e-07 did not converge: its gradient's norm is .*more than 1e-07"
    ):
        fit_logistic(*data()[:2], 2, data()[2], [1e-7])


def test_features_that_are_no_numbers_are_refused():
    features, labels, kept = data()
    features[0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fit_logistic(features, labels, 2, kept, STRENGTHS)


@pytest.mark.parametrize("num_classes", [3, 4])
def test_missing_class(num_classes):
    """The others are as if it did not exist; it has the share that half an image would give it."""
    features, labels, kept = data(num_classes=num_classes)
    kept = (labels != 1)[None]
    num_kept, present = int(kept.sum()), [number for number in range(num_classes) if number != 1]
    weight, bias = fit_logistic(features, labels, num_classes, kept, STRENGTHS)
    assert weight[:, :, 1].eq(0).all()
    assert bias[0, 0, 1] == pytest.approx(np.log((num_classes - 1) / (2 * num_kept)))
    evaluation = features[0].double()
    for place, strength in enumerate(STRENGTHS):
        expected = fit_alone(features, labels, kept[0], strength).predict_log_proba(evaluation.numpy())
        logits = (evaluation @ weight[0, place].double().T + bias[0, place])[:, present]
        assert np.abs(logits.log_softmax(1).numpy() - expected).max() < 2e-5


def test_one_class_alone_is_predicted_everywhere():
    features, labels, _ = data()
    weight, bias = fit_logistic(features, labels, 2, (labels == 1)[None], [0.1])
    assert weight.eq(0).all()
    assert bias[0, 0].tolist() == pytest.approx([np.log(1 / 24), 0])


def test_result_does_not_depend_on_other_folds_or_on_the_call():
    features, labels, kept = data(2)
    together = fit_logistic(features, labels, 2, kept, STRENGTHS)
    again = fit_logistic(features, labels, 2, kept[1:2], STRENGTHS)
    assert all(torch.equal(old[1], new[0]) for old, new in zip(together, again, strict=True))


def calibrated(num_images=1000, num_classes=3, seed=0):
    """Logits whose softmax is what their labels were drawn from."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, num_classes, generator=generator) * 2
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.7, 1, 5])
def test_temperature_is_the_best_of_a_grid(factor):
    logits, labels = calibrated()
    logits = (logits * factor).double()
    found = temperature(logits, labels)
    grid = torch.logspace(-0.3, 1.3, 201, dtype=torch.float64)
    losses = cross_entropy((logits / grid[:, None, None]).mT, labels.expand(201, -1), reduction="none").mean(1)
    assert found == pytest.approx(float(grid[losses.argmin()]), rel=0.03)
    assert cross_entropy(logits / found, labels) <= losses.min() + 1e-12
    assert found == pytest.approx(factor * temperature(calibrated()[0], labels), rel=1e-5)


def test_temperature_of_calibrated_logits_is_one_and_of_scaled_ones_then_too():
    logits, labels = calibrated(20000)
    assert temperature(logits, labels) == pytest.approx(1, abs=0.03)
    once = temperature(logits * 3, labels)
    assert temperature(logits * 3 / once, labels) == pytest.approx(1, abs=1e-5)


def test_temperature_stays_in_its_range_and_never_changes_a_label():
    logits, labels = calibrated()
    assert temperature(logits, logits.argmax(1)) == 0.5  # never wrong: the surer the better
    assert temperature(logits, logits.argmin(1)) == 20  # always wrong
    for targets in (labels, logits.argmax(1), logits.argmin(1)):
        assert torch.equal((logits / temperature(logits, targets)).argmax(1), logits.argmax(1))


def test_masks_are_those_of_the_folds():
    folds = [np.array([0, 3]), np.array([2]), np.array([], dtype=np.int64)]
    assert mask_folds(folds, 4).tolist() == [[True, False, False, True], [False, False, True, False], [False] * 4]
    assert mask_folds([], 4).shape == (0, 4)


def choose_alone(features, labels, evaluation, num_folds, seed, class_weights):
    """The strength and all held-out logits, by sklearn strength by strength; held-out images count alike."""
    splitter = RepeatedStratifiedKFold(n_splits=num_folds, n_repeats=4, random_state=seed)
    found = {}
    for strength in STRENGTHS_SEARCHED:
        logits, targets = [], []
        for train, held in splitter.split(labels, labels):
            kept = torch.zeros(len(labels), dtype=torch.bool)
            kept[torch.from_numpy(train)] = True
            alone = fit_alone(features, labels, kept, strength, class_weights)
            half = alone.decision_function(evaluation[held].double().numpy()) / 2
            logits.append(torch.from_numpy(np.stack([-half, half], 1)))
            targets.append(labels[held])
        found[strength] = torch.cat(logits), torch.cat(targets)
    best = min(found, key=lambda strength: float(cross_entropy(*found[strength])))
    return best, temperature(*found[best])


@pytest.mark.parametrize(("num_in_class", "class_weights"), [(12, None), (3, None), (3, (1.0, 6.0))])
def test_the_strength_chosen_is_that_of_a_loop_with_sklearn(num_in_class, class_weights):
    """Five folds, or as many as the smallest class has images."""
    features, labels, _ = data(2, num_features=8, seed=1)
    features = features + 3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    kept = torch.cat([torch.where(labels == 0)[0], torch.where(labels == 1)[0][:num_in_class]])
    features, labels = features[:, kept], labels[kept]
    evaluation = features.mean(0)
    strength, heat = choose_strength(features, labels, 2, evaluation, 5, class_weights)
    expected, their_heat = choose_alone(features, labels, evaluation, min(5, num_in_class), 5, class_weights)
    assert strength == expected
    assert heat == pytest.approx(their_heat, rel=1e-3)
    assert choose_strength(features, labels, 2, evaluation, 5, class_weights) == (strength, heat)
    assert choose_strength(features, labels, 2, evaluation, seed=6)[1] != heat, "other folds"


def test_a_class_of_one_image_leaves_nothing_to_choose_by():
    features, labels, _ = data()
    labels = torch.zeros_like(labels)
    labels[3] = 1
    assert choose_strength(features, labels, 2, features[0], seed=0) == (1.0, 1.0)


def test_the_result_does_not_depend_on_the_number_of_threads():
    features, labels, kept = data(4, num_features=96)
    found = []
    for num_threads in (2, 1, 2):
        with threadpool_limits(num_threads):
            found.append((*fit_logistic(features, labels, 2, kept, STRENGTHS),
                          torch.tensor(choose_strength(features, labels, 2, features[0], 0))))  # fmt: skip
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))


def test_a_dimension_that_hardly_varies_in_training_does_not_decide_alone():
    """A unit that is silent in training but for rounding, and speaks in another image."""
    features, labels = torch.randn(1, 40, 20, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    features[..., 0] = features[..., 0] * 1e-6 + labels * 1e-7
    other = features[0, :1].clone()
    other[:, 0] = 0.01
    kept = torch.ones(1, 40, dtype=torch.bool)
    with_it, without = (logits_of_folds(features[..., at:], labels, 2, kept, [0.1], other[:, at:]) for at in (0, 1))
    assert (with_it - without).abs().max() < 1
