"""The backbones: what is known of each trunk before it is built, in one table."""

import difflib
from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's presets
HALF = (0.5, 0.5, 0.5)
OWN_READOUT = "last/avg"  # what a trunk itself hands to its classifier


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Where a trunk comes from, the pictures that its weights were trained on, and the precisions that it bears."""

    timm_name: str | None = None  # None: torchvision's of the same name
    image_size: int = 224
    is_fixed_size: bool = False  # built for one size of picture
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_mode: str = "squash"
    crop_pct: float = 1.0
    is_sensitive: bool = False  # bf16 may change predictions
    fits_fp16: bool = True  # its activations are known to stay below 65504


BACKBONES = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), Backbone()),
    "efficientnet_lite0": Backbone(timm_name="tf_efficientnet_lite0", mean=HALF, std=HALF, is_sensitive=True),
}


def find_backbone(name: str) -> Backbone:
    """The entry of a name; that of timm/NAME follows from timm's configuration of its weights.

    Raises: ValueError with close names where there is none, or where it wants no squares cut from pictures.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    import timm  # only here, since it takes a second
    from timm.models import resolve_pretrained_cfg

    timm_name = name.removeprefix("timm/")
    if timm_name == name or not timm.is_model(timm_name):
        close = difflib.get_close_matches(timm_name, [*BACKBONES, *timm.list_models()], n=4)
        named = [known if known in BACKBONES else f"timm/{known}" for known in close]
        raise ValueError(f"no such backbone; give {', '.join(named or ['auto', *BACKBONES, 'timm/NAME'])}")
    try:
        config = resolve_pretrained_cfg(timm_name)
    except RuntimeError as error:  # an unknown tag of a known model
        tagged = ", ".join(f"timm/{known}" for known in timm.list_pretrained(f"{timm_name.partition('.')[0]}.*"))
        raise ValueError(f"no such weights; give {tagged}") from error
    channels, height, width = config.input_size
    if channels != 3 or height != width or config.crop_mode == "border":
        wanted = f"{channels} channels of {height} x {width}, crop mode {config.crop_mode}"
        raise ValueError(f"wants {wanted}; give a model of squares of 3 channels without a border")
    shown = {name: getattr(config, name) for name in ("mean", "std", "interpolation", "crop_mode", "crop_pct")}
    size = {"image_size": height, "is_fixed_size": config.fixed_input_size}
    return Backbone(timm_name=timm_name, **size, **shown, is_sensitive=True, fits_fp16=False)
