"""Models of timm in the main job: trained, stored and applied as the others are."""

import json

import pandas as pd
import pytest
import timm

from ray_jobs import predict as predict_job
from ray_jobs import train as train_job

# Two ViTs, and convolutions with batch norm, without it, and with weights after the pool.
BACKBONES = ["test_vit3", "test_vit", "test_byobnet", "test_convnext", "mobilenetv3_small_050", "regnetx_002"]


def run_train(folder, run, backbone: str, *flags: str) -> int:
    small = ["--weights", "none", "--epochs", "1", "--num-views", "1", "--image-size", "64", "--num-workers", "0"]
    return train_job.main(["--data", str(folder), "--out", str(run), "--backbone", backbone, *small, *flags])


@pytest.mark.parametrize("trainable", ["head", "layer4", "all"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_bundle_of_a_model_of_timm_predicts_what_its_run_did(backbone, trainable, folder, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    assert run_train(folder, run, f"timm/{backbone}", "--trainable", trainable) == 0
    made = json.loads((run / "checkpoint" / "model.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert made["backbone"] == config["backbone"] == f"timm/{backbone}"
    assert made["versions"]["timm"] == timm.__version__
    assert (made["preprocessing"]["image_size"], made["preprocessing"]["interpolation"]) == (64, "bicubic")
    assert config["precision"] == "fp32"
    flags = ["--checkpoint", str(run / "checkpoint"), "--data", str(folder), "--num-workers", "0"]
    assert predict_job.main([*flags, "--out", str(again)]) == 0
    before, after = (pd.read_csv(where / "predictions.csv") for where in (run, again))
    pd.testing.assert_frame_equal(before, after, atol=1e-6)
    assert len(before) == 7


def test_a_model_of_timm_sees_pictures_of_its_own_size_by_default(folder, tmp_path):
    flags = [
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "run"),
        "--backbone",
        "timm/test_vit3",
        "--weights",
        "none",
    ]
    assert train_job.main([*flags, "--epochs", "1", "--num-workers", "0"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["image_size"] == 160


def test_features_of_one_model_are_never_those_of_another(folder, tmp_path):
    """Both names build the same trunk from the same seed; only the crop of the validation images differs."""
    for name in ("a", "b"):
        assert run_train(folder, tmp_path / name, "timm/mobilenetv3_small_050") == 0
    tagged = "timm/mobilenetv3_small_050.lamb_in1k"
    assert run_train(folder, tmp_path / "c", tagged) == 0
    reused = [json.loads((tmp_path / name / "config.json").read_text())["has_reused_features"] for name in "abc"]
    assert reused == [False, True, False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone", "timm/test_vitt"], "--backbone timm/test_vitt: no such backbone; give timm/test_vit, "),
        (
            ["--backbone", "timm/test_vit", "--image-size", "100"],
            "--image-size 100: timm/test_vit does not take it (",
        ),
    ],
)
def test_what_timm_does_not_have_or_take_is_one_line(flags, message, folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_job.main(["--data", str(folder), "--out", str(run), "--weights", "none", *flags]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"plates train: {message}")
    assert not run.exists()
