"""A checkpoint's model on one device: encoded images in, probabilities out, as `plates predict` computes them."""

from collections.abc import Sequence

import torch

from plates.checkpoint import Bundle, rebuild_model
from plates.config import TrainConfig
from plates.device import move
from plates.features import Drawing, FrozenTrunk, Views, forward_all, make_numbered
from plates.images import decode
from plates.transforms import cut_background


class Predictor:
    """Images are decoded and cut by any number of threads, and computed in batches by one."""

    def __init__(self, bundle: Bundle, settings: TrainConfig, device: torch.device, precision: str) -> None:
        """settings: of the training run, which the views follow from."""
        model = rebuild_model(bundle)
        self.head, self.numbers = model.head, settings.eval_views
        self.drawing = Drawing(settings.seed, is_turned=settings.augment == "both")
        self.trunk = FrozenTrunk(model.trunk, bundle.preprocessing, device, precision, readout=model.readout)

    def load(self, data: bytes, name: str) -> Views:
        """An image's views, which where they are drawn follow from its name. Raises: UnreadableImageError."""
        image = cut_background(move(decode(data), self.trunk.device), self.trunk.preprocessing)
        return make_numbered(image, name, self.numbers, self.drawing, self.trunk.preprocessing)

    @torch.inference_mode()
    def predict(self, images: Sequence[Views]) -> list[list[float]]:
        """(N, C) probabilities of N images."""
        rows = torch.stack([*forward_all(self.trunk, images)])  # (N, V, F), on the CPU
        return self.head(rows).mean(1).softmax(1).tolist()
