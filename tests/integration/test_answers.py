"""What a prediction says beside its class: unsure, how far from the training images, what decided; and the card."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from plates.checkpoint import Bundle, load_bundle, save_bundle
from plates.model import assemble, preprocessing_of
from ray_jobs import predict as predict_job
from ray_jobs import train as train_job

SMALL = ["--backbone", "efficientnet_lite0", "--image-size", "64", "--epochs", "2", "--num-views", "2",
         "--num-workers", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "run"
    assert train_job.main(["--data", "synthetic:24", *SMALL, "--out", str(out)]) == 0
    return out


def predict(run: Path, out: Path, *flags: str, data: str = "synthetic:24") -> int:
    checkpoint = str(run / "checkpoint")
    return predict_job.main(
        ["--checkpoint", checkpoint, "--data", data, "--num-workers", "0", *flags, "--out", str(out)]
    )


def read_metrics(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())


def test_unsure_is_an_answer_and_what_decided_is_shown(run, tmp_path):
    before = pd.read_csv(run / "predictions.csv")
    chances = before[["p_cleaned", "p_dirty"]].max(axis=1)
    threshold = float(chances.median())
    out = tmp_path / "out"
    assert predict(run, out, "--abstain-below", str(threshold), "--explain") == 0
    table, packed = pd.read_csv(out / "predictions.csv"), pd.read_parquet(out / "predictions.parquet")
    assert [*table] == ["path", "id", "label", "p_cleaned", "p_dirty", "distance_quantile"]
    assert packed["label"].tolist() == table["label"].tolist()
    is_unsure = table[["p_cleaned", "p_dirty"]].max(axis=1) < threshold
    assert 0 < is_unsure.sum() < len(table)
    assert (table["label"] == "unsure").tolist() == is_unsure.tolist()
    assert table["label"][~is_unsure].tolist() == before["label"][~is_unsure].tolist()
    submission = pd.read_csv(out / "submission.csv")
    assert submission["label"].tolist() == before["label"].tolist()
    assert submission["id"].tolist() == before["id"].tolist()

    metrics, plain = read_metrics(out), read_metrics(run)
    assert metrics["test/num_unsure"] == is_unsure.sum()
    assert metrics["test/coverage"] == pytest.approx(1 - is_unsure.mean())
    assert metrics["test/accuracy"] == plain["test/accuracy"]
    right = metrics["test/selective_accuracy"] * (~is_unsure).sum()
    assert right == pytest.approx(round(right))
    num_right = round(plain["test/accuracy"] * len(table))
    assert num_right - is_unsure.sum() <= round(right) <= num_right

    page = (out / "report.html").read_text()
    assert "<dt>Unsure</dt>" in page
    decided = page.split("What decided")[1].split("<h2>")[0]
    assert re.search(r"<span>0\.\d{3}</span>", decided)
    assert "<span>–</span>" not in decided, "each with its probability"
    files = sorted((out / "explained").iterdir())
    num_wrong = len(table) - num_right
    assert max(16, num_wrong) <= len(files) <= 16 + num_wrong
    assert {file.name for file in files} <= {f"{name:06d}_cam.jpg" for name in before["id"]}
    pixels = np.asarray(Image.open(files[0])).astype(int)
    assert np.abs(pixels[..., 0] - pixels[..., 2]).max() > 60, "in colour over a grey picture"
    assert "What decided" in (run / "report.html").read_text(), "of the training run, too"
    assert not (run / "explained").exists()


def test_the_distance_is_kept_with_the_model_and_a_model_without_it_predicts(run, tmp_path):
    before = pd.read_csv(run / "predictions.csv")
    assert before["distance_quantile"].between(0, 1).all()
    bundle = load_bundle(run / "checkpoint")
    assert bundle.reference is not None
    assert len(bundle.reference.features) == 20  # of 24 every sixth of a class is held out
    data = tmp_path / "data"
    data.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(data / "noise.png")
    assert predict(run, tmp_path / "noise", data=str(data)) == 0
    assert pd.read_csv(tmp_path / "noise" / "predictions.csv")["distance_quantile"].tolist() == [1.0]
    assert "Farther from the training images" in (tmp_path / "noise" / "report.html").read_text()

    save_bundle(tmp_path / "old" / "checkpoint", replace(bundle, reference=None))
    assert predict(tmp_path / "old", tmp_path / "out") == 0
    after = pd.read_csv(tmp_path / "out" / "predictions.csv")
    pd.testing.assert_frame_equal(after, before.drop(columns="distance_quantile"), atol=1e-6)


def test_the_card_has_the_figures_of_the_run(run):
    card = (run / "checkpoint" / "README.md").read_text()
    metrics, config = read_metrics(run), json.loads((run / "config.json").read_text())
    assert f"| {metrics['val/accuracy']:.1%} |" in card
    assert f"| {metrics['test/loss']:.4f} |" in card
    for version in config["versions"].values():
        assert version in card
    assert "| all | 20 | 4 |" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["tags"][-1], front["license"]) == ("efficientnet_lite0", "apache-2.0")


@pytest.mark.parametrize(
    ("flag", "backbone", "readout", "classes", "message"),
    [
        (["--explain"], "timm/test_vit", "last/token", ("a", "b"), "--explain: last/token of this backbone is not"),
        (
            ["--abstain-below", "0.7"],
            "resnet18",
            "last/avg",
            ("sure", "unsure"),
            "--abstain-below 0.7: the checkpoint",
        ),
        (["--abstain-below", "0.3"], "resnet18", "last/avg", ("a", "b"), "--abstain-below 0.3: must be 0.5 to 1"),
    ],
)
def test_what_cannot_be_said_is_refused(tmp_path, capsys, flag, backbone, readout, classes, message):
    size = 160 if "vit" in backbone else 64
    torch.manual_seed(0)
    model = assemble(backbone, 2, size, readout)
    bundle = Bundle(backbone, classes, preprocessing_of(backbone, size), model.state_dict(), {"readout": readout})
    save_bundle(tmp_path / "run" / "checkpoint", bundle)
    assert predict(tmp_path / "run", tmp_path / "out", *flag, data="synthetic:4") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
