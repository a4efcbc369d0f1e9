"""A frozen trunk as fast as it runs: batch norm folded into convolutions where that is right."""

import copy
from itertools import pairwise, takewhile

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

FOLD_TOLERANCE = 1e-4  # of the largest feature, in fp32


def fast_trunk(trunk: nn.Module, device: torch.device, dtype: torch.dtype, image_size: int = 224) -> nn.Module:
    """A copy of a frozen trunk for inference: batch norm folded into convolutions, channels_last, in `dtype`.

    It stays unfolded where folding changes what it gives for two random pictures of that size.
    """
    fast = copy.deepcopy(trunk).eval().requires_grad_(False)
    if any(isinstance(module, nn.BatchNorm2d) for module in fast.modules()):
        folded = fold_batch_norm(copy.deepcopy(fast))
        batch = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        batch = batch.to(next(fast.parameters()).device)
        with torch.inference_mode():
            right, found = fast(batch), folded(batch)
        if (found - right).abs().max() <= FOLD_TOLERANCE * right.abs().max():
            fast = folded
    after_weights = takewhile(lambda module: not [*module.parameters(recurse=False)], reversed(list(fast.modules())))
    for module in after_weights:
        if isinstance(module, nn.AdaptiveAvgPool2d):  # the features themselves are not rounded to bf16
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return fast.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def fold_batch_norm(trunk: nn.Module) -> nn.Module:
    """Folds each batch norm into the convolution defined right before it, in place.

    Where definition order is data flow that changes nothing; timm's batch norm carries its activation, which stays.
    """
    for module in trunk.modules():
        for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if conv.out_channels == norm.num_features:
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))
    return trunk
