"""Readouts: which stages of a trunk a head reads, and how each is pooled."""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from plates.backbones import OWN_READOUT


def read_out(trunk: nn.Module, batch: Tensor, readout: str) -> Tensor:
    """What a head reads of pictures, by one pass of the trunk.

    Args:
        batch: (B, 3, S, S).
        readout: PART/POOLING, several joined by +, as `--readout` has it.

    Returns: (B, F), float32 but for the trunk's own output, which is in its dtype.

    Raises: ValueError where the trunk has no such stage or token.
    """
    if readout == OWN_READOUT:
        return trunk(batch)
    if "last/token" in readout and getattr(trunk, "cls_token", None) is None:
        raise ValueError("last/token: the backbone has no class token")
    final, own, stages = run_stages(trunk, batch)
    return torch.cat([pool(final, own, stages, *part.split("/")) for part in readout.split("+")], 1)


def run_stages(trunk: Any, batch: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The last map (B, F, h, w), or of a transformer its tokens (B, T, F); the trunk's own output (B, F); and all
    stages' maps."""
    if not isinstance(trunk, torchvision.models.ResNet):
        final, stages = trunk.forward_intermediates(batch)
        if final.dim() == 4 and final.shape[-1] == trunk.num_features != final.shape[1]:
            final = final.movedim(-1, 1)  # some transformers have channels last
            return final, trunk.forward_head(final.movedim(1, -1), pre_logits=True), stages
        return final, trunk.forward_head(final, pre_logits=True), stages
    found = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(batch))))
    stages = []
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        found = stage(found)
        stages.append(found)
    return found, trunk.avgpool(found).flatten(1), stages


def pool(final: Tensor, own: Tensor, stages: list[Tensor], part: str, pooling: str) -> Tensor:
    """(B, F) float32 of one part."""
    if part == "last" and pooling == "avg":
        return own.float()
    if part == "last" and final.dim() == 4 and pooling == "patches":
        raise ValueError("last/patches: the backbone is no ViT")
    if pooling == "token":
        return final[:, 0].float()
    found = find_map(final, stages, part)
    return found.float().flatten(2).mean(2) if pooling != "max" else found.flatten(2).amax(2).float()


def find_map(final: Tensor, stages: list[Tensor], part: str) -> Tensor:
    """(B, F, h, w) that a part's poolings pool; the patches of a transformer's tokens."""
    if part == "last":
        if final.dim() == 4:
            return final
        height, width = stages[-1].shape[-2:]
        return final[:, final.shape[1] - height * width :].mT.unflatten(2, (height, width))  # after the class's
    if part == "pre":
        return stages[-1]
    number = int(part.removeprefix("stage"))
    if number > len(stages):
        raise ValueError(f"{part}: the backbone has {len(stages)} stages")
    return stages[number - 1]


@torch.inference_mode()
def count_features(trunk: nn.Module, readout: str, image_size: int) -> int:
    """F of a readout. Raises: ValueError as `read_out`."""
    return read_out(trunk, torch.zeros(1, 3, image_size, image_size), readout).shape[1]


@torch.inference_mode()
def readouts_to_search(trunk: nn.Module, image_size: int) -> list[str]:
    """The parts that a search reads: the last map, that before a final convolution, and the last of the first three
    quarters of the stages, each pooled by average and maximum; of a ViT its class token and its patches."""
    final, _, stages = run_stages(trunk, torch.zeros(1, 3, image_size, image_size))
    number = len(stages) - max(1, len(stages) // 4)
    earlier = [f"stage{number}/avg", f"stage{number}/max"] if number else []
    if final.dim() == 3:
        has_token = getattr(trunk, "cls_token", None) is not None
        return [OWN_READOUT, *["last/token"] * has_token, "last/patches", "last/max", *earlier]
    has_final_convolution = stages[-1].shape[1] != final.shape[1]
    before = ["pre/avg", "pre/max"] if has_final_convolution else []
    return [OWN_READOUT, "last/max", *before, *earlier]
