"""What a checkpoint must predict and what a logistic head must be, computed with plain torch beside the product."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import interpolate

from plates.checkpoint import load_bundle, rebuild_model
from plates.dataset import Samples
from plates.foreground import foreground_box
from plates.logistic import fit_logistic
from plates.sources import Source
from plates.transforms import draw_view


class ByHand:
    """A checkpoint's model in fp32, and its views; `changes` replaces what model.json says."""

    def __init__(self, checkpoint: Path, **changes: Any) -> None:
        bundle = load_bundle(checkpoint)
        self.model = rebuild_model(bundle)
        self.info = {**bundle.info, **changes}
        self.seen = {**bundle.info["preprocessing"], **changes}

    def views(self, image: Tensor, path: str, numbers: Sequence[int]) -> Tensor:
        """(V, 3, S, S) input of these views of an image (3, H, W) uint8."""
        if self.seen["crop"] == "foreground":
            top, left, height, width = foreground_box(image).tolist()
            image = image[:, top : top + height, left : left + width]
        square = self.resize(self.to_square(image))
        found = []
        for number in numbers:
            if number < 0:
                turn, is_mirrored = divmod(-1 - number, 2)
                picture = square.rot90((0, 2, 1, 3)[turn], (1, 2))
            else:
                is_turned = self.info["augment"] == "both"
                view = draw_view(self.info["seed"], number, path, *image.shape[1:], is_turned=is_turned)
                bottom, right, is_mirrored = view.top + view.height, view.left + view.width, view.is_flipped
                picture = self.resize(image[:, view.top : bottom, view.left : right])
                picture = picture.rot90(view.num_turns, (1, 2))
            found.append(picture.flip(2) if is_mirrored else picture)
        mean, std = (torch.tensor(self.seen[name])[:, None, None] for name in ("mean", "std"))
        return (torch.stack(found) / 255 - mean) / std

    def to_square(self, image: Tensor) -> Tensor:
        """What is seen of an image, before it is squashed to a square."""
        height, width = image.shape[1:]
        short, long = min(height, width), max(height, width)
        if self.seen["crop_mode"] == "center":
            top, left = (height - short) // 2, (width - short) // 2
            return image[:, top : top + short, left : left + short]
        if self.seen["crop_mode"] == "border":
            square = torch.empty(3, long, long, dtype=torch.uint8)
            square[:] = torch.tensor([round(255 * value) for value in self.seen["mean"]])[:, None, None]
            top, left = (long - height + 1) // 2, (long - width + 1) // 2
            square[:, top : top + height, left : left + width] = image
            return square
        return image

    def resize(self, image: Tensor) -> Tensor:
        size = self.seen["image_size"]
        return interpolate(image[None], (size, size), mode=self.seen["interpolation"], antialias=True)[0]

    def train_numbers(self) -> list[int]:
        """The numbers of the views that were trained on."""
        count = self.info["num_views"]
        return [*range(-1, -1 - count, -1)] if self.info["augment"] == "dihedral" else [*range(count)]

    def eval_numbers(self) -> list[int]:
        """The numbers of the views that a prediction averages."""
        count = self.info["tta"]
        return [*range(-1, -1 - count, -1)] if self.info["augment"] == "dihedral" else [-1, *range(count - 1)]

    @torch.inference_mode()
    def features(self, source: Source, samples: Samples, numbers: Sequence[int]) -> Tensor:
        """(V, N, F) of a split."""
        readout = self.info["readout"]
        found = [
            read_by_hooks(self.model.trunk, self.views(source.read(sample.path), sample.path, numbers), readout)
            for sample in samples
        ]
        return torch.stack(found, 1)

    @torch.inference_mode()
    def predict(self, source: Source, samples: Samples) -> Tensor:
        """(N, C) float64 probabilities: of the mean of the logits of all views."""
        logits = self.model.head(self.features(source, samples, self.eval_numbers()))
        return logits.mean(0).double().softmax(1)

    def fit(self, source: Source, samples: Samples, strength: float, heat: float) -> tuple[Tensor, Tensor]:
        """Weight (C, F) and bias (C,) of the logistic head of these settings."""
        features, kept = self.features(source, samples, self.train_numbers()), torch.ones(1, len(samples)).bool()
        weight, bias = fit_logistic(features, samples.labels, len(self.info["classes"]), kept, [strength])
        return weight[0, 0] / heat, bias[0, 0] / heat


def read_by_hooks(trunk: Any, batch: Tensor, readout: str) -> Tensor:
    """(B, F): what hooks see at the ends of a trunk's stages."""
    if isinstance(trunk, torchvision.models.ResNet):
        stages: list[nn.Module] = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
        last = stages[-1]
    else:  # EfficientNet-Lite0: a stage ends where the next one has a stride
        stages, last = [trunk.blocks[number] for number in (0, 1, 2, 4, 6)], trunk.bn2
    modules = {f"stage{number}": stage for number, stage in enumerate(stages, 1)} | {"pre": stages[-1], "last": last}
    maps: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda *args, name=name: maps.update({name: args[2]}))
        for name, module in modules.items()
    ]
    trunk(batch)
    for hook in hooks:
        hook.remove()
    parts = [part.split("/") for part in readout.split("+")]
    return torch.cat([maps[name].amax((2, 3)) if how == "max" else maps[name].mean((2, 3)) for name, how in parts], 1)
