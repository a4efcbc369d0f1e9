"""Linear heads on features, many at a time, by torch.optim's Adam and StepLR over a leading dimension."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, nan

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.utils.rnn import pad_sequence

from plates.device import CPU, move
from plates.store import FeatureRows

GROUPS_PER_WINDOW = 8
BYTES_AT_ONCE = 4 << 20  # of features that are read for some steps ahead
FIGURES = ("lr", "train/loss", "train/accuracy", "val/loss", "val/accuracy")


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """One head: its schedule, and the images that it is trained on, as indices into the features."""

    lr: float
    step_size: int
    gamma: float
    indices: Sequence[int]


@dataclass(frozen=True)
class Heads:
    """H fitted heads, on the CPU."""

    weight: Tensor  # (H, C, F)
    bias: Tensor  # (H, C)
    figures: Tensor  # (H, E, 5), FIGURES after each epoch; validation is not a number where none was asked for

    def logits(self, features: Tensor) -> Tensor:
        """(N, F) features to (H, N, C) logits."""
        return features @ self.weight.mT + self.bias[:, None]

    def history(self, head: int) -> list[dict[str, float]]:
        """One row an epoch."""
        rows = self.figures[head].tolist()
        return [{"epoch": epoch, **dict(zip(FIGURES, row, strict=True))} for epoch, row in enumerate(rows)]


def epoch_order(seed: int, epoch: int, groups: Tensor) -> Tensor:
    """The order of the N training images in an epoch, (N,) int64: a function of seed, epoch and groups alone.

    groups: (N,) int64, the number of the group that an image is read with, as row groups of shards are. The groups
        are shuffled, and then the images of 8 groups at a time, so that an epoch reads each group about once. Images
        of up to 8 groups (all of a folder's are one) are shuffled as a whole.
    """
    generator = torch.Generator().manual_seed((seed << 24) + epoch)
    order = torch.randperm(len(groups), generator=generator)
    present, numbers = groups.unique(return_inverse=True)
    windows = torch.randperm(len(present), generator=generator)[numbers] // GROUPS_PER_WINDOW
    return order[windows[order].argsort(stable=True)]


def make_optimizer(
    parameters: list[torch.nn.Parameter], lr: float, step_size: int, gamma: float
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.StepLR]:
    """The optimizer and the schedule, stepped after each epoch, of every way of training."""
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)  # fused: it skips what overflows in fp16
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size, gamma)


def fit_heads(
    features: Tensor | FeatureRows,
    labels: Tensor,
    settings: Sequence[HeadSettings],
    initial: tuple[Tensor, Tensor],
    *,
    epochs: int,
    global_batch_size: int,
    seed: int,
    class_weights: Sequence[float] | None = None,
    groups: Tensor | None = None,
    evaluation: tuple[Tensor, Tensor] | None = None,
    device: torch.device = CPU,
) -> Heads:
    """Fits H heads side by side on a device, each to rounding as alone.

    Args:
        features: (V, N, F) float32 on the CPU, one layer a view; epoch e uses view e modulo V.
        labels: (N,) int64.
        settings: H heads.
        initial: weight (C, F) and bias (C,) that every head starts from.
        class_weights: (C,), how much an image of each class counts in a batch's mean loss; None for 1 each. The
            figures are of losses that all count alike.
        groups: (N,) int64 of `epoch_order`; None for one group.
        evaluation: (M, F) features and (M,) labels scored after each epoch.
    """
    alike = defaultdict(list)  # heads of one schedule and number of steps, which one optimizer can have
    for head, one in enumerate(settings):
        num_steps = ceil(len(one.indices) / global_batch_size)
        alike[one.lr, one.step_size, one.gamma, num_steps].append(head)
    groups = torch.zeros(len(labels), dtype=torch.int64) if groups is None else groups
    weights = torch.ones(len(labels)) if class_weights is None else torch.tensor(class_weights)[labels]
    evaluation = evaluation and (evaluation[0].to(device), evaluation[1].to(device))
    fitted: list[tuple[Tensor, ...]] = []
    for (lr, step_size, gamma, _), heads in alike.items():
        indices = [torch.tensor(settings[head].indices) for head in heads]
        weight, bias = (torch.nn.Parameter(torch.stack([start.to(device)] * len(heads))) for start in initial)
        optimizer, scheduler = make_optimizer([weight, bias], lr, step_size, gamma)
        figures = []
        for epoch in range(epochs):
            orders = [one[epoch_order(seed, epoch, groups[one])] for one in indices]
            view = epoch % len(features)
            batches = load_batches(features, view, labels, weights, orders, global_batch_size, device)
            lr = optimizer.param_groups[0]["lr"]
            means = fit_epoch(batches, weight, bias, optimizer)
            scheduler.step()
            row = [torch.full_like(means[0], lr), *means, *score_heads(weight, bias, evaluation)]
            figures.append(torch.stack(row, 1))
        fitted.append((weight.detach(), bias.detach(), torch.stack(figures, 1)))
    order = torch.tensor([head for heads in alike.values() for head in heads]).argsort()
    return Heads(*(torch.cat(values).cpu()[order] for values in zip(*fitted, strict=True)))


def load_batches(
    features: Tensor | FeatureRows,
    view: int,
    labels: Tensor,
    weights: Tensor,
    orders: list[Tensor],
    global_batch_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An epoch's steps of H heads on the device: features (H, B, F), labels (H, B), and their shares in the mean
    (H, B) by the images' weights (N,), 0 where a head has no image; read from the stored features some steps at a
    time."""
    indices = pad_sequence(orders, batch_first=True)
    weighed = pad_sequence([weights[order] for order in orders], batch_first=True)
    shares = torch.cat([step / step.sum(1, keepdim=True) for step in weighed.split(global_batch_size, 1)], 1)
    bytes_per_step = features[view, indices[:1, :1]].nbytes * len(orders) * global_batch_size
    num_at_once = global_batch_size * max(1, BYTES_AT_ONCE // bytes_per_step)
    for chosen, share in zip(indices.split(num_at_once, 1), shares.split(num_at_once, 1), strict=True):
        loaded = (move(values, device) for values in (features[view, chosen], labels[chosen], share))
        yield from zip(*(values.split(global_batch_size, 1) for values in loaded), strict=True)


@torch.no_grad()
def fit_epoch(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    weight: torch.nn.Parameter,
    bias: torch.nn.Parameter,
    optimizer: torch.optim.Optimizer,
) -> tuple[Tensor, Tensor]:
    """One epoch of H heads; their mean loss and accuracy (H,) before each step.

    The gradient of cross-entropy is written out: by autograd a sweep took 1.7 times as long (2 cores of an AMD EPYC).
    """
    loss_sum, num_correct, num_images = (torch.zeros(len(weight), device=weight.device) for _ in range(3))
    for inputs, targets, share in batches:
        logits = torch.baddbmm(bias[:, None], inputs, weight.mT)  # (H, B, C)
        errors = (logits.softmax(2) - one_hot(targets, logits.shape[2])) * share[:, :, None]
        weight.grad, bias.grad = errors.mT @ inputs, errors.sum(1)
        optimizer.step()
        is_real = share > 0
        loss_sum += (cross_entropy(logits.mT, targets, reduction="none") * is_real).sum(1)
        num_correct += ((logits.argmax(2) == targets) & is_real).sum(1)
        num_images += is_real.sum(1)
    return loss_sum / num_images, num_correct / num_images


@torch.no_grad()
def score_heads(weight: Tensor, bias: Tensor, evaluation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of H heads, (H,) each."""
    if evaluation is None:
        return torch.full_like(bias[:, 0], nan), torch.full_like(bias[:, 0], nan)
    logits = Heads(weight, bias, torch.empty(0)).logits(evaluation[0])
    targets = evaluation[1].expand(len(logits), -1)
    losses = cross_entropy(logits.mT, targets, reduction="none")
    return losses.mean(1), (logits.argmax(2) == targets).float().mean(1)
