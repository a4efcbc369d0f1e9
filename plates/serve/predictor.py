"""A checkpoint's model on one device: encoded images in, probabilities out, as `plates predict` computes them."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from plates.checkpoint import Bundle, rebuild_model
from plates.config import TrainConfig
from plates.device import move
from plates.explain import explain_image, why_no_map
from plates.features import Drawing, FrozenTrunk, Views, forward_all, make_numbered
from plates.images import decode
from plates.report.explained import draw_map
from plates.report.predictions import encode_thumbnail
from plates.transforms import cut_background

Answer: TypeAlias = tuple[list[float], float | None]


class Predictor:
    """Images are decoded and cut by any number of threads, and computed in batches by one."""

    def __init__(self, bundle: Bundle, settings: TrainConfig, device: torch.device, precision: str) -> None:
        """settings: of the training run, which the views follow from."""
        self.bundle, model = bundle, rebuild_model(bundle)
        self.head, self.numbers = model.head, settings.eval_views
        self.explained = rebuild_model(bundle)  # on the CPU in fp32, in the form that has maps
        self.why_no_map = why_no_map(self.explained, bundle.preprocessing.image_size)
        self.drawing = Drawing(settings.seed, is_turned=settings.augment == "both")
        self.trunk = FrozenTrunk(model.trunk, bundle.preprocessing, device, precision, readout=model.readout)

    def load(self, data: bytes, name: str) -> Views:
        """An image's views, which where they are drawn follow from its name. Raises: UnreadableImageError."""
        image = cut_background(move(decode(data), self.trunk.device), self.trunk.preprocessing)
        return make_numbered(image, name, self.numbers, self.drawing, self.trunk.preprocessing)

    @torch.inference_mode()
    def predict(self, images: Sequence[Views]) -> list[Answer]:
        """Of each image its C probabilities and, where the bundle has training images to compare with, how far it is
        from them, the quantile of `Reference.compare`."""
        rows = torch.stack([*forward_all(self.trunk, images)])  # (N, V, F), on the CPU
        reference = self.bundle.reference
        quantiles = reference.compare(rows[:, 0])[:, 0].tolist() if reference else [None] * len(rows)
        return [*zip(self.head(rows).mean(1).softmax(1).tolist(), quantiles, strict=True)]

    def explain(self, data: bytes, name: str, label: str) -> dict[str, str]:
        """What of an image decided for a class's name, as a picture's data URI, or why there is no such map."""
        if self.why_no_map:
            return {"no_map": self.why_no_map}
        image, number = decode(data), self.bundle.classes.index(label)
        seen = (self.numbers, self.drawing, self.bundle.preprocessing)
        values = explain_image(self.explained, image, name, number, *seen).numpy()
        drawn = draw_map(image.permute(1, 2, 0).numpy(), values)
        return {"map": encode_thumbnail(np.asarray(drawn), side=max(drawn.size))}
