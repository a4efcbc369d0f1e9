"""The model card: its front matter, and that it says what the run's files say."""

import contextlib
import io
import re
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from plates.checkpoint import Bundle, save_bundle
from plates.model import build_classifier, build_trunk, preprocessing_of
from plates.report.card import write_card
from plates.rundir import write_json

CLASSES = ["cleaned", "dirty | wet"]
CONFIG = {
    "data": "/home/somebody/PHOTOS", "backbone": "resnet18", "trainable": "head", "weights_source": "a file",
    "weights_license": "apache-2.0", "readout": "last/avg", "head": "adam", "augment": "crop", "tta": 1,
    "classes": CLASSES, "num_images": {"train": 33, "val": 8}, "versions": {"torch": "9.8.7"},
    "num_train_by_class": {"cleaned": 20, "dirty | wet": 13}, "num_val_by_class": {"cleaned": 5, "dirty | wet": 3},
}  # fmt: skip
METRICS = {"val/accuracy": 0.875, "val/loss": 0.34567, "val/num_images": 8}


def make_card(run: Path, config: dict[str, Any], metrics: dict[str, Any]) -> str:
    run.mkdir(exist_ok=True)
    write_json(run / "config.json", config)
    write_json(run / "metrics.json", metrics)
    model = build_classifier("resnet18", build_trunk("resnet18")[0].state_dict(), 2, seed=0)
    bundle = Bundle("resnet18", tuple(CLASSES), preprocessing_of("resnet18", 64), model.state_dict(), {})
    save_bundle(run / "checkpoint", bundle)
    write_card(run)
    return (run / "checkpoint" / "README.md").read_text()


def test_the_card_says_what_the_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = make_card(tmp_path / "mine", CONFIG, METRICS)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "plates", "pipeline_tag": "image-classification", "license": "apache-2.0",
        "tags": ["image-classification", "plates", "resnet18"],
    }  # fmt: skip
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if "|" in line
    ]
    for row in (
        ["cleaned", "20", "5"], ["dirty \\| wet", "13", "3"], ["all", "33", "8"],
        # 7 of 8: Wilson's interval as in any table of it.
        ["validation split, 7 of 8 right", "87.5%", "52.9% to 97.8%", "0.3457", "–"],
    ):  # fmt: skip
        assert row in cells
    assert "Source: PHOTOS." in text
    assert "somebody" not in text
    assert "A labelled test split: there was none." in text
    assert "torch 9.8.7." in text
    assert len(card.splitlines()) <= 100

    monkeypatch.chdir(tmp_path / "mine")
    Image.effect_noise((90, 70), 80).convert("RGB").save("photo.jpg")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.inference_mode():
        exec(text.split("```python\n")[1].split("```")[0], {})
    chances = literal_eval(printed.getvalue())
    assert list(chances) == CLASSES
    assert sum(chances.values()) == pytest.approx(1, abs=1e-6)


def test_the_card_of_a_search_has_the_nested_estimate(tmp_path: Path) -> None:
    estimate = {"nested/accuracy": 0.8, "nested/log_loss": 0.44, "nested/accuracy_low": 0.65,
                "nested/accuracy_high": 0.91, "nested/log_loss_low": 0.3, "nested/log_loss_high": 0.61}  # fmt: skip
    config = CONFIG | {"num_val_by_class": None, "num_images": {"train": 33}, "weights_license": None, "tta": 8}
    card = make_card(tmp_path / "run", config, estimate | {"winner/accuracy": 0.99, "winner/log_loss": 0.01})
    assert "| nested cross-validation | 80.0% | 65.0% to 91.0% | 0.4400 | 0.3000 to 0.6100 |" in card
    assert "99" not in card.split("## How good")[1].split("##")[0], "the winner's own figures are optimistic"
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    assert "All labelled images were trained on" in card
    assert "the mean of 8 views" in card


def test_a_card_without_a_judged_image_says_so(tmp_path: Path) -> None:
    card = make_card(tmp_path / "run", CONFIG | {"num_val_by_class": None}, {"winner/accuracy": 0.99})
    assert "Nothing was judged by images" in card
