"""Save and load a model bundle: safetensors and JSON, never a pickle."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from plates.backbones import OWN_READOUT, find_backbone
from plates.config import UserError
from plates.model import Classifier, assemble
from plates.reference import Reference
from plates.rundir import write_atomically, write_json
from plates.storage import Place
from plates.transforms import Preprocessing

MODEL_FILE, INFO_FILE, REFERENCE_FILE, FORMAT = "model.safetensors", "model.json", "reference.safetensors", 1


@dataclass(frozen=True)
class Bundle:
    """All that prediction needs: tensors of trunk and head, classes, preprocessing; and training images to compare
    with, None of a bundle without them."""

    backbone: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    state: dict[str, Tensor]
    info: dict[str, Any]
    reference: Reference | None = None


def save_bundle(folder: Place, bundle: Bundle) -> None:
    """Writes the tensors and model.json; the JSON last, so that its presence means a whole bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in bundle.state.items()}
    write_atomically(folder / MODEL_FILE, lambda file: save_file(state, file))
    if bundle.reference:
        tensors = {name: value.contiguous() for name, value in vars(bundle.reference).items()}
        write_atomically(folder / REFERENCE_FILE, lambda file: save_file(tensors, file))
    preprocessing = bundle.preprocessing.to_dict()
    described = {"backbone": bundle.backbone, "classes": bundle.classes, "preprocessing": preprocessing}
    write_json(folder / INFO_FILE, {"format": FORMAT, **described, **bundle.info})


def load_bundle(folder: Place) -> Bundle:
    """Raises: UserError where the folder holds no whole bundle of this format."""
    try:
        info = json.loads((folder / INFO_FILE).read_text())
        state = load((folder / MODEL_FILE).read_bytes())
        has_reference = (folder / REFERENCE_FILE).exists()
        reference = Reference(**load((folder / REFERENCE_FILE).read_bytes())) if has_reference else None
        if (found := info["format"]) != FORMAT:
            raise UserError(f"--checkpoint {folder}: format {found} is not {FORMAT}, which this version reads")
        preprocessing = Preprocessing.from_dict(info["preprocessing"])
        bundle = Bundle(info["backbone"], tuple(info["classes"]), preprocessing, state, info, reference)
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name if error.filename else MODEL_FILE
        raise UserError(f"--checkpoint {folder}: holds no {missing}; give RUN/checkpoint") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"--checkpoint {folder}: is damaged ({type(error).__name__})") from error
    try:
        find_backbone(bundle.backbone)
    except ValueError as error:
        made_by = info.get("versions", {}).get("timm")
        raise UserError(f"--checkpoint {folder}: {bundle.backbone} of timm {made_by} is not here: {error}") from error
    return bundle


def rebuild_model(bundle: Bundle) -> Classifier:
    """The bundle's classifier, fp32 on the CPU. Raises: UserError where its tensors do not fit."""
    size, readout = bundle.preprocessing.image_size, bundle.info.get("readout", OWN_READOUT)
    try:
        model = assemble(bundle.backbone, len(bundle.classes), size, readout)
        model.load_state_dict(bundle.state)
    except (RuntimeError, ValueError) as error:
        made_by = bundle.info.get("versions", {}).get("timm")
        raise UserError(
            f"--checkpoint: its tensors are not those of a {bundle.backbone} (it was made with timm {made_by})"
        ) from error
    return model
