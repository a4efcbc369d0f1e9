"""Exported files, run in processes that know nothing of this package."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import numpy_helper

from plates.export import files
from ray_jobs import export as export_job
from ray_jobs import train as train_job

SMALL = ["--image-size", "64", "--num-workers", "0", "--precision", "fp32", "--num-views", "2"]
RANDOM = ["--weights", "none", "--lr", "0.3", "--epochs", "50"]  # random features differ little
# Of one image a call, and of the first three at once; and what the file says of itself.
RUN_FILE = """
import json, sys
import numpy as np
from PIL import Image
file, *paths = sys.argv[1:]
images = [np.array(Image.open(path)) for path in paths]
if file.endswith("onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(file)
    run = lambda images: session.run(None, {"images": images})[0]
    metadata = session.get_modelmeta().custom_metadata_map
else:
    import torch
    extra = {"plates.json": ""}
    module = torch.export.load(file, extra_files=extra).module()
    run = lambda images: module(torch.from_numpy(images)).numpy()
    metadata = json.loads(extra["plates.json"])
found = [run(image[None])[0].tolist() for image in images]
assert not {name for name in sys.modules if name.split(".")[0] == "plates"}
print(json.dumps([found, run(np.stack(images[:3])).tolist(), metadata]))
"""
RUN_TIMM = """
import json, sys
import timm
from PIL import Image
folder, *paths = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
found = [model(transform(Image.open(path))[None]).softmax(1)[0].tolist() for path in paths]
print(json.dumps([found, model.pretrained_cfg["label_names"]]))
"""


def run_alone(program: str, *arguments: object) -> list:
    ran = subprocess.run([sys.executable, "-I", "-c", program, *map(str, arguments)], capture_output=True, check=True)
    return json.loads(ran.stdout)


def train(data: str, run: Path, *flags: str) -> pd.DataFrame:
    assert train_job.main(["--data", data, "--out", str(run), *SMALL, *flags]) == 0
    return pd.read_csv(run / "predictions.csv")


FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
SEEN = {
    "resnet18": ["--readout", "stage3/avg+last/max", "--crop", "foreground", "--resize", "border",
                 "--head", "logistic", "--augment", "dihedral", "--weights", "none"],
    "timm/test_vit": ["--readout", "last/token", *RANDOM],
    "efficientnet_lite0": ["--readout", "pre/max", "--resize", "center"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "forms"), [("resnet18", [*FILES]), ("timm/test_vit", ["onnx"]), ("efficientnet_lite0", ["torch"])]
)
def test_a_file_alone_predicts_what_its_run_did(backbone, forms, drawn, tmp_path, capsys):
    run = tmp_path / "run"
    predicted = train(drawn, run, "--backbone", backbone, *SEEN[backbone])
    chances = predicted[["p_cleaned", "p_dirty"]].to_numpy()
    assert chances.std(0).min() > 5e-3  # they tell images apart
    paths = [Path(drawn, path) for path in predicted["path"]]
    for form in forms:
        assert export_job.main(["--checkpoint", str(run / "checkpoint"), "--format", form]) == 0
        assert f"on 52 images of {drawn}" in capsys.readouterr().out
        found, at_once, metadata = run_alone(RUN_FILE, run / "checkpoint" / FILES[form], *paths)
        assert np.abs(np.array(found) - chances).max() <= 1e-3
        assert np.abs(np.array(at_once) - chances[:3]).max() <= 1e-3
        assert json.loads(metadata["classes"]) == ["cleaned", "dirty"]
        assert metadata["backbone"] == backbone
        assert json.loads(metadata["preprocessing"])["image_size"] == 64
    assert export_job.main(["--checkpoint", str(run / "checkpoint"), "--format", "timm"]) == 2
    assert "--format timm: has no form for" in capsys.readouterr().err


@pytest.mark.parametrize("backbone", ["resnet18", "timm/test_vit"])
def test_timm_makes_the_model_of_a_folder(backbone, drawn, tmp_path):
    """Through timm's own pictures, which differ by 1 of 255 here and there."""
    run, out = tmp_path / "run", tmp_path / "out"
    predicted = train(drawn, run, "--backbone", backbone, "--resize", "squash", *RANDOM)
    assert export_job.main(["--checkpoint", str(run / "checkpoint"), "--format", "timm", "--out", str(out)]) == 0
    found, names = run_alone(RUN_TIMM, out, *(Path(drawn, path) for path in predicted["path"]))
    assert names == ["cleaned", "dirty"]
    assert np.abs(np.array(found) - predicted[["p_cleaned", "p_dirty"]].to_numpy()).max() < 0.01


def test_a_file_that_is_off_is_not_kept(folder, tmp_path, monkeypatch, capsys):
    """Its bias is changed after it was written; the run's data is gone, so drawn plates tell."""

    def save_and_damage(program, file, metadata):
        save(program, file, metadata)
        model = onnx.load(file)
        bias = next(one for one in model.graph.initializer if one.name == "head.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32([0, 0.1]), bias.name))
        onnx.save(model, file)

    run, save = tmp_path / "run", files.save_onnx
    train(str(folder), run, "--backbone", "resnet18", "--weights", "none", "--epochs", "2")
    folder.rename(tmp_path / "elsewhere")
    flags = ["--checkpoint", str(run / "checkpoint")]
    assert export_job.main(flags) == 0
    assert "drawn plates, since the run's own images are gone" in capsys.readouterr().out
    kept = (run / "checkpoint" / "model.onnx").read_bytes()
    monkeypatch.setattr(files, "save_onnx", save_and_damage)
    assert export_job.main(flags) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "model.onnx was not written: a probability is " in message
    assert (run / "checkpoint" / "model.onnx").read_bytes() == kept
    names = {path.name for path in (run / "checkpoint").iterdir()}
    assert names == {"README.md", "model.json", "model.onnx", "model.safetensors", "reference.safetensors"}
