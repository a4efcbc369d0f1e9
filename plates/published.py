"""The published notebook's loop in plain PyTorch, without Ray: what the benchmark compares with.

`python -m plates.published SETTINGS` runs it, SETTINGS being a JSON object; the last line it prints is one too.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from plates import metrics
from plates.config import EXIT_OK, EXIT_SOME_UNREADABLE, NUM_PUBLISHED_EPOCHS
from plates.dataset import Dataset, check_dataset, in_threads, load_dataset
from plates.device import num_usable_cpus
from plates.images import UnreadableImageError
from plates.model import Weights, build_classifier, preprocessing_of, set_trainable
from plates.samples import Sample
from plates.sources import Source
from plates.timing import Pace, device_name, process_age_s, synchronize
from plates.weights import resolve_weights

BATCH_SIZE, NUM_LOADER_WORKERS = 8, 8


@dataclass(frozen=True)
class Images(TorchDataset):
    """Samples of a source, decoded and transformed one by one, as a notebook does."""

    source: Source
    samples: Sequence[Sample]
    transform: v2.Compose

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = self.samples[index]
        return self.transform(self.source.read(sample.path)), sample.label or 0


def time_published(
    dataset: Dataset, weights: Weights, device: torch.device, settings: dict[str, Any]
) -> dict[str, float | None]:
    """Seconds of training and of predicting the test split, after the first epochs no more of them where all
    `num_epochs` of the settings would take more than `limit_s`.

    fp32, batch 8, loaders with 8 workers made anew each epoch, validation every epoch, batch norm in train mode, the
    test split in the main process: the course project's loop.

    Returns: startup_s, train_s, inference_s; num_epochs that were run, and steady_images_per_sec, val/loss and
        val/accuracy after the last of them.
    """
    image_size, num_epochs = settings["image_size"], settings["num_epochs"]
    preprocessing = preprocessing_of(weights.backbone, image_size)
    to_input = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocessing.mean, preprocessing.std)]
    augment = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip(), *to_input])
    resize = v2.Compose([v2.Resize([image_size, image_size], antialias=True), *to_input])
    loaders = [
        DataLoader(Images(dataset.source, samples, transform), BATCH_SIZE, shuffle, num_workers=NUM_LOADER_WORKERS)
        for samples, transform, shuffle in ((dataset.train, augment, True), (dataset.val, resize, False))
    ]
    model = build_classifier(weights.backbone, weights.state, len(dataset.classes), 0, image_size).to(device)
    optimizer = torch.optim.Adam(set_trainable(model, settings["trainable"]), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    pace, val_loss, val_accuracy, epoch = Pace(), None, None, 0
    synchronize(device)
    startup_s, start_s = process_age_s(), time.perf_counter()
    for epoch in range(1, num_epochs + 1):
        val_sums = torch.zeros(3, dtype=torch.float64, device=device)
        for is_training, loader in zip((True, False), loaders, strict=True):
            model.train(is_training)
            for inputs, labels in loader:
                with torch.set_grad_enabled(is_training):
                    logits, labels = model(inputs.to(device)), labels.to(device)
                    loss = torch.nn.functional.cross_entropy(logits, labels)
                if is_training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                else:
                    val_sums += metrics.batch_sums(logits, labels)
        scheduler.step()
        val_loss, val_accuracy = metrics.divide(val_sums)
        pace.count(len(dataset.train) + len(dataset.val))
        all_s = (time.perf_counter() - start_s) / epoch * num_epochs
        if epoch == NUM_PUBLISHED_EPOCHS and all_s > settings["limit_s"]:
            break
    synchronize(device)
    train_s = time.perf_counter() - start_s
    test = Images(dataset.source, dataset.test, resize)
    start_s = time.perf_counter()
    with torch.no_grad():
        for start in range(0, len(test), BATCH_SIZE):
            batch = torch.stack([test[i][0] for i in range(start, min(start + BATCH_SIZE, len(test)))])
            model(batch.to(device)).softmax(1).cpu()
    synchronize(device)
    return {
        "startup_s": startup_s,
        "train_s": train_s,
        "inference_s": time.perf_counter() - start_s,
        "num_epochs": epoch,
        "steady_images_per_sec": pace.steady_rate(),
        "val/loss": val_loss,
        "val/accuracy": val_accuracy,
    }


def leave_out_unreadable(dataset: Dataset) -> tuple[Dataset, int]:
    """The data set as a run with --skip-unreadable sees it, and how many images that leaves out."""
    readable, skipped = check_dataset(dataset, skip_unreadable=True)
    looks = in_threads(dataset.source.check, dataset.test)
    is_read = [not isinstance(look, UnreadableImageError) for look in looks]
    return replace(readable, test=dataset.test.where(is_read)), len(skipped) + is_read.count(False)


def main(argv: list[str]) -> int:
    settings, num_unreadable = json.loads(argv[0]), 0
    torch.set_num_threads(num_usable_cpus())
    device = torch.device(settings["device"])
    dataset = load_dataset(settings["data"], settings["seed"])
    if settings["skip_unreadable"]:
        dataset, num_unreadable = leave_out_unreadable(dataset)
    weights = resolve_weights(*(settings[name] for name in ("backbone", "weights", "seed", "image_size")))
    measured = {
        **time_published(dataset, weights, device, settings),
        "num_train": len(dataset.train),
        "num_test": len(dataset.test),
        "num_threads": torch.get_num_threads(),
        "device_name": device_name(device),
    }
    print(json.dumps(measured))
    return EXIT_SOME_UNREADABLE if num_unreadable else EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
