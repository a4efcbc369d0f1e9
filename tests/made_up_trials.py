"""Labelled images and results of trials that tests of a sweep make up."""

from typing import Any

from plates.config import TuneConfig
from plates.dataset import Samples
from plates.sweep.scores import TrialResult

CONFIG = TuneConfig(epochs=5, folds=3, cv_repeats=2, num_trials=6)
SAMPLES = Samples.of([f"train/{i}.jpg" for i in range(16)], [i % 2 for i in range(16)])


def made_up(log_loss: float, image_losses: list[float], **changes: Any) -> TrialResult:
    """A trial's result, with one outer fold that holds out all images."""
    fields: dict[str, Any] = {
        "fold_log_losses": [log_loss], "repeat_log_losses": [log_loss] * 2, "image_log_losses": image_losses,
        "nested_inner": [log_loss], "nested_outer": [[image_losses, [1.0] * len(image_losses)]],
    }  # fmt: skip
    return TrialResult(log_loss, accuracy=0.5, **(fields | changes))
