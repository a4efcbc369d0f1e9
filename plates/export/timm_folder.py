"""A checkpoint as a folder that timm reads: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from plates.backbones import OWN_READOUT, find_backbone
from plates.checkpoint import Bundle
from plates.config import UserError
from plates.export.check import difference_of
from plates.model import Classifier
from plates.rundir import write_atomically
from plates.storage import Place


@torch.inference_mode()
def write_timm(folder: Place, bundle: Bundle, model: Classifier) -> str:
    """Writes both files where the model that timm makes of them gives what ours does; says how closely, and on what.

    Raises: UserError for a model that timm has no form for, MismatchError.
    """
    crop, size = bundle.preprocessing.crop, bundle.preprocessing.image_size
    if (model.readout, crop) != (OWN_READOUT, "none"):
        raise UserError(
            f"--format timm: has no form for readout {model.readout} with crop {crop}; give onnx or torch"
        )
    batch = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as made:
        state, config = by_timms_names(bundle, model)
        save_file(state, Path(made, "model.safetensors"))
        Path(made, "config.json").write_text(json.dumps(config, indent=2) + "\n")
        theirs = timm.create_model(f"local-dir:{made}", pretrained=True).eval()
        difference = difference_of(theirs(batch).softmax(1), model(batch).softmax(1))
        for file in Path(made).iterdir():
            write_atomically(folder / file.name, lambda beside, file=file: shutil.copyfile(file, beside))
    return f"{difference:.1g} on random inputs"


def by_timms_names(bundle: Bundle, model: Classifier) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and config.json. Raises: UserError where timm's classifier is no linear layer."""
    found, shape = find_backbone(bundle.backbone), bundle.preprocessing
    architecture = (found.timm_name or bundle.backbone).partition(".")[0]
    arguments: dict[str, Any] = {"img_size": shape.image_size} if found.is_fixed_size else {}
    theirs: Any = timm.create_model(architecture, num_classes=len(bundle.classes), **arguments)
    known = {name: theirs.pretrained_cfg[name] for name in ("classifier", "first_conv")}
    head = {f"{known['classifier']}.{name}": value for name, value in model.head.state_dict().items()}
    state = {name: value.contiguous() for name, value in (model.trunk.state_dict() | head).items()}
    if state.keys() != theirs.state_dict().keys():
        raise UserError(f"--format timm: the classifier of {bundle.backbone} is no linear layer; give onnx or torch")
    seen = ("mean", "std", "interpolation", "crop_mode", "crop_pct")
    pictures = {name: value for name, value in asdict(shape).items() if name in seen}
    size = {"input_size": [3, shape.image_size, shape.image_size], "fixed_input_size": found.is_fixed_size}
    return state, {
        "architecture": architecture,
        "num_classes": len(bundle.classes),
        "label_names": bundle.classes,
        "model_args": arguments,
        "pretrained_cfg": {**known, **size, **pictures},
    }
