"""Linear heads on features, many at a time: Adam and StepLR with a leading dimension over heads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults in torch.optim


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """One head: its schedule, and the images that it is trained on, as indices into the features."""

    lr: float
    step_size: int
    gamma: float
    indices: Sequence[int]


@dataclass(frozen=True)
class Heads:
    """H fitted heads, and their figures by epoch, each (E, H), evaluation figures only where they were asked for."""

    weight: Tensor  # (H, C, F)
    bias: Tensor  # (H, C)
    lr: list[Tensor] = field(default_factory=list)
    train_loss: list[Tensor] = field(default_factory=list)
    train_accuracy: list[Tensor] = field(default_factory=list)
    eval_loss: list[Tensor] = field(default_factory=list)
    eval_accuracy: list[Tensor] = field(default_factory=list)

    def logits(self, features: Tensor) -> Tensor:
        """(N, F) features to (H, N, C) logits."""
        return features @ self.weight.mT + self.bias[:, None]


def epoch_order(seed: int, epoch: int, num_images: int) -> list[int]:
    """The order of the training images in an epoch: a function of seed and epoch alone."""
    generator = torch.Generator().manual_seed((seed << 24) + epoch)
    return torch.randperm(num_images, generator=generator).tolist()


@torch.inference_mode()
def fit_heads(
    features: Tensor,
    labels: Tensor,
    settings: Sequence[HeadSettings],
    initial: tuple[Tensor, Tensor],
    *,
    epochs: int,
    global_batch_size: int,
    seed: int,
    evaluation: tuple[Tensor, Tensor] | None = None,
) -> Heads:
    """Fits H heads side by side, each as torch.optim.Adam and StepLR would alone, to rounding.

    Args:
        features: (V, N, F) float32, one layer a view; epoch e uses view e modulo V.
        labels: (N,) int64.
        settings: H heads.
        initial: weight (C, F) and bias (C,) that every head starts from.
        evaluation: (M, F) features and (M,) labels scored after each epoch.
    """
    num_heads, num_views = len(settings), len(features)
    weight = initial[0].expand(num_heads, *initial[0].shape).clone()
    bias = initial[1].expand(num_heads, *initial[1].shape).clone()
    parameters = (weight, bias)
    firsts, seconds = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    num_steps = torch.zeros(num_heads)
    heads = Heads(weight, bias)
    for epoch in range(epochs):
        lr = torch.tensor([s.lr * s.gamma ** (epoch // s.step_size) for s in settings])
        loss_sum, num_correct = torch.zeros(num_heads), torch.zeros(num_heads)
        for indices, is_real in epoch_batches(settings, epoch, global_batch_size, seed):
            counts = is_real.sum(1)  # (H,)
            inputs, targets = features[epoch % num_views][indices], labels[indices]  # (H, B, F), (H, B)
            logits = torch.baddbmm(bias[:, None], inputs, weight.mT)  # (H, B, C)
            losses = cross_entropy(logits.mT, targets, reduction="none") * is_real
            loss_sum += losses.sum(1)
            num_correct += ((logits.argmax(2) == targets) * is_real).sum(1)
            # The gradient of mean cross-entropy; a head without images in this batch does not step.
            errors = (logits.softmax(2) - one_hot(targets, logits.shape[2])) * is_real[:, :, None]
            errors /= counts.clamp_min(1)[:, None, None]
            is_active = counts > 0
            num_steps += is_active
            gradients = (errors.mT @ inputs, errors.sum(1))
            for parameter, first, second, gradient in zip(parameters, firsts, seconds, gradients, strict=True):
                adam_step(parameter, first, second, gradient, lr, num_steps, is_active)
        num_images = torch.tensor([len(s.indices) for s in settings])
        heads.lr.append(lr)
        heads.train_loss.append(loss_sum / num_images)
        heads.train_accuracy.append(num_correct / num_images)
        if evaluation is not None:
            logits = heads.logits(evaluation[0])
            targets = evaluation[1].expand(num_heads, -1)
            heads.eval_loss.append(cross_entropy(logits.mT, targets, reduction="none").mean(1))
            heads.eval_accuracy.append((logits.argmax(2) == targets).float().mean(1))
    return heads


def epoch_batches(
    settings: Sequence[HeadSettings], epoch: int, global_batch_size: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """The epoch's steps: indices (H, B) and is_real (H, B) float, 0 where a head has no image there."""
    orders = {n: torch.tensor(epoch_order(seed, epoch, n)) for n in {len(s.indices) for s in settings}}
    longest = max(orders)
    indices = torch.zeros((len(settings), longest), dtype=torch.int64)
    is_real = torch.zeros((len(settings), longest))
    for row, one in enumerate(settings):
        count = len(one.indices)
        indices[row, :count] = torch.tensor(one.indices)[orders[count]]
        is_real[row, :count] = 1
    return list(zip(indices.split(global_batch_size, 1), is_real.split(global_batch_size, 1), strict=True))


def adam_step(
    parameter: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    lr: Tensor,
    num_steps: Tensor,
    is_active: Tensor,
) -> None:
    """One step of Adam (Kingma and Ba 2015, as torch.optim computes it) for the active heads, in place."""
    if not is_active.all():  # the last batch of an epoch: only heads with images left step
        mine = is_active.nonzero()[:, 0]
        parts = (parameter[mine], first[mine], second[mine])
        adam_step(*parts, gradient[mine], lr[mine], num_steps[mine], is_active[mine])
        for values, part in zip((parameter, first, second), parts, strict=True):
            values[mine] = part
        return
    shape = (-1, *[1] * (gradient.dim() - 1))
    first.lerp_(gradient, 1 - BETA_1)
    second.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
    root = second.sqrt().mul_((1 - BETA_2**num_steps).rsqrt().view(shape)).add_(EPSILON)
    parameter.sub_(first.div(root).mul_((lr / (1 - BETA_1**num_steps)).view(shape)))
