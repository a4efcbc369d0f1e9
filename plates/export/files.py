"""One file with a model and its preprocessing: written, opened again and compared before it gets its name."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from plates.checkpoint import Bundle
from plates.config import UserError
from plates.export.check import compare
from plates.export.graph import ImageClassifier
from plates.model import Classifier
from plates.rundir import write_atomically
from plates.storage import Place

METADATA_FILE = "plates.json"  # of torch.export's extra_files
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write_file(path: Place, form: str, bundle: Bundle, model: Classifier, checkpoint: Place) -> str:
    """Writes a file of onnx or torch where it gives what the checkpoint does; says how closely, and on what.

    Raises: UserError where packages are missing, MismatchError.
    """
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if form == "onnx" and missing:
        raise UserError(f"--format onnx: needs {', '.join(missing)}: pip install '.[export]'")
    save, load = (save_onnx, load_onnx) if form == "onnx" else (save_torch, load_torch)
    program = trace(ImageClassifier(model, bundle.preprocessing))
    found = []

    def write(file: Path) -> None:
        save(program, file, describe(bundle))
        found.append(compare(load(file), bundle, model, checkpoint))

    write_atomically(path, write)
    return found[0]


def trace(classifier: ImageClassifier) -> ExportedProgram:
    """The graph, for any number of images of any one size."""
    images = torch.zeros(2, 500, 700, 3, dtype=torch.uint8)
    sizes = {0: Dim("batch", min=1), 1: Dim("height", min=1), 2: Dim("width", min=1)}
    return torch.export.export(classifier, (images,), dynamic_shapes={"images": sizes})


def describe(bundle: Bundle) -> dict[str, str]:
    """What a file says of itself: text, of what has parts JSON."""
    info: dict[str, Any] = {
        "images": "uint8 (B, H, W, 3) RGB, upright",
        "probabilities": "float32 (B, C), in the order of the classes",
        "classes": bundle.classes,
        "preprocessing": bundle.preprocessing.to_dict(),
        "backbone": bundle.backbone,
        **{name: bundle.info[name] for name in ("readout", "weights_source", "versions") if name in bundle.info},
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in info.items()}


def save_onnx(program: ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    made = torch.onnx.export(program, input_names=["images"], output_names=["probabilities"], verbose=False)
    assert made is not None
    made.model.metadata_props.update(metadata)
    made.save(file, external_data=False)


def load_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    from onnxruntime import InferenceSession  # an extra

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def save_torch(program: ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})


def load_torch(file: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(file).module()
