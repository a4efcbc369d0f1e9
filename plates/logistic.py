"""Logistic regression on features, to convergence: a head whose only setting is the strength of its L2 penalty.

A head of one fold and one strength minimises, over W (C, F) and b (C,),

    mean over its images of (mean over an image's views of cross-entropy(W x + b, label)) + strength / 2 * ||W||^2

where x are the features, standardised by the mean and the standard deviation of that fold's training views alone; by
at least a hundredth of the median deviation, since a dimension that hardly varies in training may vary elsewhere, and
would decide alone. An image's class may count more than another in the first mean; in the standardisation none does.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import cross_entropy

# The solver's, of the gradient's largest entry. At 1e-6 logits were off by up to 0.5 where strength was 1e-5, at 1e-9
# by 1e-4 (40 drawn plates of 8 views, features of EfficientNet-Lite0); the last Newton steps cost little.
SOLVER_TOLERANCE = 1e-9
GRADIENT_TOLERANCE = 1e-7  # of its Euclidean norm, what a head must have reached
MAX_NEWTON_STEPS = 500
LEAST_STD = 0.01  # of the median one
# The same result on any number of cores. And two threads at products as small as these took 15 times the CPU time of
# one, on 2 cores that had other work.
BLAS_THREADS = 1
TEMPERATURES = (0.5, 20.0)  # below, few images that are all right would make a model all too sure
STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(-6, 3))  # 0.001 to 10, that a search tries
NUM_FOLDS, NUM_REPEATS = 5, 4  # of the cross-validation that chooses a strength
MANY_IMAGES = 1000
FEW_IMAGES_STRENGTH = 1.0  # where a class has one image, which cannot be held out


@dataclass(frozen=True)
class FoldHeads:
    """The heads of one fold, of all strengths: logits are ((x - mean) / std) @ basis @ weight.mT + bias."""

    mean: NDArray[np.float64]  # (F,)
    std: NDArray[np.float64]  # (F,), 1 where a dimension is constant
    basis: NDArray[np.float64] | None  # (F, R) orthonormal columns; None for the identity
    weight: NDArray[np.float64]  # (S, C, R)
    bias: NDArray[np.float64]  # (S, C)

    def logits(self, features: Tensor) -> NDArray[np.float64]:
        """(M, F) features to (S, M, C) logits."""
        scaled = (features.numpy() - self.mean) / self.std
        inputs = scaled if self.basis is None else scaled @ self.basis
        return inputs @ self.weight.transpose(0, 2, 1) + self.bias[:, None]

    def to_linear(self) -> tuple[Tensor, Tensor]:
        """Weight (S, C, F) and bias (S, C), float32, of linear layers on features as they are."""
        weight = self.weight if self.basis is None else self.weight @ self.basis.T
        weight = weight / self.std
        return torch.from_numpy(weight).float(), torch.from_numpy(self.bias - weight @ self.mean).float()


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    kept: Tensor,
    strengths: Sequence[float],
    class_weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fits a head for each of K folds and S strengths.

    A fold's result is a function of its kept images alone; it is unique, and the biases sum to zero. A class without
    a kept image gets weight 0 and the bias that half an image would give it beside P equally frequent classes,
    log(P / (2 * number of kept images)), so that no label has probability 0.

    Args:
        features: (V, N, F) float32 on the CPU, V views of each image, which share the image's weight.
        labels: (N,) int64.
        num_classes: C.
        kept: (K, N) bool, the images that each fold trains on, at least one.
        strengths: S positive numbers, in any order.
        class_weights: (C,), how much an image of each class counts; None for 1 each.

    Returns: weight (K, S, C, F) and bias (K, S, C), float32, of linear layers on features that are not standardised.

    Raises:
        ValueError: a feature is not finite.
        RuntimeError: a head did not converge; names its strength and the norm of its gradient.
    """
    with threadpool_limits(BLAS_THREADS, "blas"):
        solved = solve_folds(features, labels, num_classes, kept, strengths, class_weights)
        folds = [fold.to_linear() for fold in solved]
    return torch.stack([weight for weight, _ in folds]), torch.stack([bias for _, bias in folds])


def logits_of_folds(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    kept: Tensor,
    strengths: Sequence[float],
    evaluation: Tensor,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Logits of M images by the heads of `fit_logistic`, whose weights are not kept.

    Args:
        evaluation: (M, F) float32, an image's mean over its views where it has several: logits are linear in them.

    Returns: (K, S, M, C) float32, of images that a fold has kept, too.
    """
    with threadpool_limits(BLAS_THREADS, "blas"):
        folds = solve_folds(features, labels, num_classes, kept, strengths, class_weights)
        return torch.stack([torch.from_numpy(fold.logits(evaluation)).float() for fold in folds])


def solve_folds(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    kept: Tensor,
    strengths: Sequence[float],
    class_weights: Sequence[float] | None,
) -> Iterator[FoldHeads]:
    """The heads of each fold in turn, in float64, one fold's views in memory at a time."""
    by_class = np.ones(num_classes) if class_weights is None else np.array(class_weights)
    for one in kept:
        scaler = StandardScaler(copy=False)
        inputs = scaler.fit_transform(features[:, one].flatten(0, 1).numpy().astype(np.float64))  # (n, F)
        scale, varies = np.asarray(scaler.scale_), np.asarray(scaler.var_) > 0
        floored = np.maximum(scale, LEAST_STD * np.median(scale[varies])) if varies.any() else scale
        inputs *= scale / floored
        basis = None
        if len(inputs) < inputs.shape[1]:
            # A head lies in the span of its n views, and an orthonormal basis leaves the penalty as it is: so n
            # dimensions instead of F.
            basis, triangle = np.linalg.qr(inputs.T)
            inputs = np.ascontiguousarray(triangle.T)
        targets = labels[one].repeat(len(features)).numpy()
        weight, bias = solve_fold(inputs, targets, by_class, strengths, num_images=int(one.sum()))
        yield FoldHeads(np.asarray(scaler.mean_), floored, basis, weight, bias)


def solve_fold(
    inputs: NDArray[np.float64],
    targets: NDArray[np.int64],
    class_weights: NDArray[np.float64],
    strengths: Sequence[float],
    num_images: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight (S, C, R) and bias (S, C) on inputs (n, R), each strength from the solution of the next stronger one."""
    present, numbers = np.unique(targets, return_inverse=True)
    weight = np.zeros((len(strengths), len(class_weights), inputs.shape[1]))
    bias = np.full((len(strengths), len(class_weights)), np.log(len(present) / (2 * num_images)))
    bias[:, present] = 0
    if len(present) == 1:
        return weight, bias
    is_binary = len(present) == 2
    weights = class_weights[targets]
    # sklearn's objective is C * (weighted sum of cross-entropies) + 1/2 * ||w||^2; of two classes its w is the
    # difference of ours, w1 - w0, whose squared norm is twice that of both.
    solver = LogisticRegression(solver="newton-cg", tol=SOLVER_TOLERANCE, max_iter=MAX_NEWTON_STEPS, warm_start=True)
    for index in np.argsort(strengths)[::-1]:
        strength = strengths[index]
        solver.set_params(C=(2 if is_binary else 1) / (strength * weights.sum()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the gradient below decides
            solver.fit(inputs, numbers, weights)
        found, offset = solver.coef_, np.asarray(solver.intercept_)
        if is_binary:
            found, offset = np.concatenate([-found, found]) / 2, np.concatenate([-offset, offset]) / 2
        offset = offset - offset.mean()
        errors = softmax(inputs @ found.T + offset, 1)
        errors[np.arange(len(numbers)), numbers] -= 1
        errors *= (weights / weights.sum())[:, None]
        gradient = np.column_stack([errors.T @ inputs + strength * found, errors.sum(0)])
        norm = np.linalg.norm(gradient)
        if not norm <= GRADIENT_TOLERANCE:
            raise RuntimeError(
                f"logistic regression of strength {strength:g} did not converge: its gradient's norm is {norm:.1e}, "
                f"more than {GRADIENT_TOLERANCE:g}"
            )
        weight[index, present], bias[index, present] = found, offset
    return weight, bias


def mask_folds(folds: Sequence[NDArray[np.int64]], num_images: int) -> Tensor:
    """(K, N) bool from the indices of each fold's images."""
    kept = torch.zeros(len(folds), num_images, dtype=torch.bool)
    for row, images in zip(kept, folds, strict=True):
        row[torch.tensor(images)] = True  # a copy: what Ray hands over is read-only
    return kept


def choose_strength(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    evaluation: Tensor,
    seed: int,
    class_weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """The strength of the least log-loss in stratified cross-validation, and the temperature of its held-out logits.

    Held-out images count alike, whatever their class. Where images are many, it is repeated less, and with fewer of
    their views.

    Args:
        features: (V, N, F) float32, the views to train on.
        evaluation: (N, F) float32, the same images as prediction sees them.
    """
    num_folds = min(NUM_FOLDS, *(count for count in labels.bincount().tolist() if count))
    if num_folds < 2:
        return FEW_IMAGES_STRENGTH, 1.0
    num_repeats = min(NUM_REPEATS, max(1, MANY_IMAGES // len(labels)))
    features = features[: max(1, 2 * MANY_IMAGES // len(labels))]
    splitter = RepeatedStratifiedKFold(n_splits=num_folds, n_repeats=num_repeats, random_state=seed)
    folds = list(splitter.split(labels, labels))
    kept = mask_folds([train for train, _ in folds], len(labels))
    logits = logits_of_folds(features, labels, num_classes, kept, STRENGTHS, evaluation, class_weights)
    held = [torch.from_numpy(images) for _, images in folds]
    held_out = torch.cat([of_fold[:, images] for of_fold, images in zip(logits, held, strict=True)], 1)  # (S, n, C)
    targets = labels[torch.cat(held)]
    losses = [float(cross_entropy(of_strength, targets)) for of_strength in held_out]
    best = int(np.argmin(losses))
    return STRENGTHS[best], temperature(held_out[best], targets)


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T, from 0.5 to 20, for which logits / T have the least log-loss: the logits of weight / T and bias / T.

    Log-loss is convex in 1/T, so that its slope's zero is the least; without one in the range it is the nearer end.
    C. Guo et al., On Calibration of Modern Neural Networks, 2017.

    Args:
        logits: (N, C) of images that were not trained on.
        labels: (N,) int64.
    """
    values = logits.double().numpy()
    of_label = values[np.arange(len(values)), labels.numpy()]

    def slope(scale: float) -> float:
        return float(((softmax(scale * values, 1) * values).sum(1) - of_label).mean())

    coldest, hottest = TEMPERATURES
    if slope(1 / hottest) >= 0:
        return hottest
    if slope(1 / coldest) <= 0:
        return coldest
    return 1 / cast(float, brentq(slope, 1 / hottest, 1 / coldest))
