"""Whether a file gives what its checkpoint does: on images of the run's own data."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from plates.checkpoint import Bundle
from plates.config import UserError
from plates.dataset import Dataset, load_test_split
from plates.device import CPU
from plates.features import Drawing, FrozenTrunk, compute_features
from plates.model import Classifier
from plates.rundir import CONFIG_FILE
from plates.storage import Place
from plates.transforms import EVAL

MAX_DIFFERENCE = 1e-3  # of a probability
NUM_IMAGES = 64


class MismatchError(Exception):
    """A file that does not give what the model does."""


@torch.inference_mode()
def compare(run: Callable[[Tensor], Tensor], bundle: Bundle, model: Classifier, checkpoint: Place) -> str:
    """The largest difference to what `plates predict` computes in fp32 on one view, and of which images, in words.

    Args:
        run: (1, H, W, 3) uint8 to (1, C).

    Raises: MismatchError where it is too large.
    """
    trunk = FrozenTrunk(model.trunk, bundle.preprocessing, CPU, "fp32", readout=model.readout)
    for dataset, name in find_datasets(checkpoint):
        splits = (dataset.test, dataset.train, dataset.val)
        paths = np.concatenate([samples.table["path"].to_numpy() for samples in splits])
        chosen = paths[np.linspace(0, len(paths) - 1, min(NUM_IMAGES, len(paths))).round().astype(int)].tolist()
        differences = []
        rows = compute_features(trunk, dataset.source, ((path, [EVAL]) for path in chosen), Drawing(0), {})
        for path, row in zip(chosen, rows, strict=True):
            if len(row):  # an image that can be read
                image = dataset.source.read(path).permute(1, 2, 0)[None].contiguous()
                differences.append(difference_of(run(image), model.head(row).softmax(1)))
        if differences:
            return f"{max(differences):.1g} on {len(differences)} {name}"
    raise AssertionError("plates can always be drawn")


def difference_of(found: Tensor, expected: Tensor) -> float:
    """The largest of any probability. Raises: MismatchError where it is too large."""
    difference = float((found - expected).abs().max())
    if not difference <= MAX_DIFFERENCE:  # nor NaN
        raise MismatchError(f"a probability is {difference:.2g} from the checkpoint's, more than {MAX_DIFFERENCE:g}")
    return difference


def find_datasets(checkpoint: Place) -> Iterator[tuple[Dataset, str]]:
    """The run's own data, where it is still there, then drawn plates; and their names."""
    with suppress(OSError, ValueError, KeyError, UserError):  # the run is gone, or its data
        config = json.loads((checkpoint.parent / CONFIG_FILE).read_text())
        yield load_test_split(config["data"], config.get("seed", 0)), f"images of {config['data']}"
    yield load_test_split(f"synthetic:{NUM_IMAGES}", 0), "drawn plates, since the run's own images are gone"
