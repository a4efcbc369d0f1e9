"""Backbone and new head: how they are built, and what of them is trained."""

import copy
import hashlib
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn

from plates.backbones import OWN_READOUT, find_backbone
from plates.readouts import count_features, read_out
from plates.transforms import Preprocessing


@dataclass(frozen=True)
class Weights:
    """A trunk's weights, resolved once on the driver: never an implicit choice."""

    backbone: str
    state: dict[str, Tensor]
    source: str
    reason: str
    license: str | None = None  # as the Hugging Face hub names it, None where it is not known


class Classifier(nn.Module):
    """Trunk (B, 3, S, S) -> (B, F), by a readout, and a linear head (B, F) -> (B, C).

    Always in eval mode: at a few images a batch, batch statistics are noise, and they would make the model depend
    on the number of workers.
    """

    def __init__(self, trunk: nn.Module, num_features: int, num_classes: int, readout: str = OWN_READOUT) -> None:
        super().__init__()
        self.trunk = trunk
        self.readout = readout
        self.head = nn.Linear(num_features, num_classes)
        self.eval()

    def forward(self, batch: Tensor) -> Tensor:
        pictures = batch if len(batch) else batch.new_zeros(1, *batch.shape[1:])  # attention takes no empty batch
        features = read_out(self.trunk, pictures, self.readout)[: len(batch)]
        with torch.autocast(batch.device.type, enabled=False):  # logits of 8 bits would lose what the trunk has found
            return self.head(features.float())


def build_trunk(
    backbone: str, image_size: int | None = None, source: dict[str, Any] | None = None
) -> tuple[nn.Module, int]:
    """(trunk without its classifier, number of features), for pictures of a size where it is built for one.

    Args:
        source: where timm finds the weights, over its configuration's entries; None leaves them random.
    """
    found = find_backbone(backbone)
    if found.timm_name is None:
        resnet = cast(torchvision.models.ResNet, torchvision.models.get_model(backbone, weights=None))
        num_features = resnet.fc.in_features
        resnet.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        return resnet, num_features
    import timm

    size = {"img_size": image_size} if found.is_fixed_size and image_size else {}
    pretrained = {"pretrained": True, "pretrained_cfg_overlay": source} if source else {}
    trunk = timm.create_model(found.timm_name, num_classes=0, **size, **pretrained)
    return trunk, cast(int, trunk.head_hidden_size)


def assemble(
    backbone: str, num_classes: int, image_size: int | None = None, readout: str = OWN_READOUT
) -> Classifier:
    """A classifier without its weights. Raises: ValueError where the backbone has no such readout."""
    trunk, num_features = build_trunk(backbone, image_size)
    if readout != OWN_READOUT:
        num_features = count_features(trunk, readout, image_size or find_backbone(backbone).image_size)
    return Classifier(trunk, num_features, num_classes, readout)


def build_classifier(
    backbone: str,
    state: dict[str, Tensor],
    num_classes: int,
    seed: int,
    image_size: int | None = None,
    readout: str = OWN_READOUT,
) -> Classifier:
    """A classifier with the given trunk and a new head drawn from the seed."""
    model = assemble(backbone, num_classes, image_size, readout)
    model.trunk.load_state_dict(state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.head.reset_parameters()
    return model


def set_trainable(model: Classifier, trainable: str) -> list[nn.Parameter]:
    """Freezes all but the part named by --trainable and returns its parameters."""
    model.requires_grad_(trainable == "all")
    model.head.requires_grad_(True)
    if trainable == "layer4":
        for parameter in last_stage(model.trunk):
            parameter.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def last_stage(trunk: nn.Module) -> list[nn.Parameter]:
    """What comes after the first three quarters of a trunk's stages: a ResNet's layer4, of a model with four or five
    stages the last one, of a ViT, whose stages are its blocks, a quarter of them; and all norms and layers after it.

    By timm's own account of its stages: what a copy keeps that is cut to end before them is not part of it.
    """
    if isinstance(trunk, torchvision.models.ResNet):
        return list(trunk.layer4.parameters())
    first: Any = copy.deepcopy(trunk)
    num_stages = len(first.feature_info)
    first.prune_intermediate_layers([num_stages - 1 - max(1, num_stages // 4)], prune_norm=True, prune_head=True)
    kept = {name for name, _ in first.named_parameters()}
    return [parameter for name, parameter in trunk.named_parameters() if name not in kept]


def preprocessing_of(
    backbone: str, image_size: int | None, crop: str = "none", resize: str | None = None
) -> Preprocessing:
    """That of the pictures which the backbone's weights were trained on, but for what is given.

    resize: a `crop_mode`, which then sees the whole side, as a foreground's box is seen by default.
    """
    own = {**asdict(find_backbone(backbone)), "crop": crop}
    resize = resize or ("squash" if crop == "foreground" else None)
    asked = {"crop_mode": resize, "crop_pct": 1.0} if resize else {}
    return Preprocessing.from_dict({**own, "image_size": image_size or own["image_size"], **asked})


def hash_weights(state: dict[str, Tensor]) -> str:
    """Of names and values."""
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(name.encode())
        found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
