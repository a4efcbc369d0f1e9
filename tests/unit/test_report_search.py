import base64
import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_trials import made_up
from PIL import Image
from report_runs import write_page

from plates.config import TuneConfig
from plates.report import summary_table
from plates.report.boxes import show_boxes
from plates.report.calibration import show_calibration
from plates.rundir import write_json
from plates.sweep.scores import summarize, tabulate_trials

RECIPE = {"head": "adam", "image_size": 224, "crop": "none", "num_views": 100, "readout": "last/avg", "tta": 1,
          "lr": 1e-3, "step_size": 7, "gamma": 0.1}  # fmt: skip
LARGE = {"head": "logistic", "image_size": 448, "crop": "foreground", "num_views": 8, "readout": "pre/max", "tta": 8,
         "strength": 0.1}  # fmt: skip
SMALL = {**LARGE, "image_size": 224, "crop": "none", "num_views": 1, "tta": 1, "strength": 10.0}
WRONG = {**LARGE, "crop": "none", "readout": "stage3/avg"}
NOISE = np.array([-0.1, 0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.1])
CANDIDATES = ((RECIPE, 0.5 + 2 * NOISE), (LARGE, 0.2 + NOISE), (SMALL, 0.25 - NOISE), (WRONG, 0.9 + NOISE))


def make_search(
    run: Path, candidates: Any = CANDIDATES, notes: tuple[str, ...] = (), **requested: Any
) -> dict[str, Any]:
    """Files of a search of which the second candidate wins by default; its figures."""
    run.mkdir()
    settings = [chosen for chosen, _ in candidates]
    results = [made_up(float(np.mean(losses)), list(losses)) for _, losses in candidates]
    trials = tabulate_trials(results, settings)
    figures = summarize(results, settings, trials)
    trials.to_csv(run / "trials.csv", index=False)
    write_json(run / "metrics.json", {**figures, "train/accuracy": 1.0, "train/loss": 0.01})
    winner = settings[figures["winner/trial"]]
    config = {"job": "tune", "notes": notes, **winner, "requested": asdict(TuneConfig(**requested))}
    write_json(run / "config.json", config)
    epochs = {"epoch": range(100), "lr": 1e-3, "train/loss": np.linspace(0.7, 0.1, 100), "train/accuracy": 0.9}
    baseline = pd.DataFrame(epochs)
    baseline.to_csv(run / "history_baseline.csv", index=False)
    one = pd.DataFrame([{"epoch": 0, "lr": None, "train/loss": 0.01, "train/accuracy": 1.0}])
    (one if winner["head"] == "logistic" else baseline).to_csv(run / "history.csv", index=False)
    times = {"rank": [""], "node": "", "device": "cpu", "device_name": "Some CPU", "train_s": 177.8}
    times |= {"startup_s": 1.0, "data_s": 0.0, "inference_s": 32.5, "total_s": 215.7}
    times |= {"train_images_per_sec": "", "inference_images_per_sec": 22.8}
    pd.DataFrame(times).to_csv(run / "timing.csv", index=False)
    return json.loads((run / "metrics.json").read_text())


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.split("<body>")[1]).split())


def tables_of(page: str) -> list[list[list[str]]]:
    tables = re.findall(r"<table>.*?</table>", page, flags=re.DOTALL)
    return [[re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr>")[2:]] for table in tables]


def test_the_page_answers_the_questions_first(tmp_path: Path) -> None:
    m = make_search(tmp_path / "run")
    text = text_of(write_page(tmp_path / "run", views=0))
    answers = text.split("What the search found")[1].split("The candidates")[0]
    for term, after in zip(
        ("Which model", "How good", "How sure", "What it gains"),
        ("How good", "How sure", "What it gains", "What it cost"), strict=True,
    ):  # fmt: skip
        assert answers.index(term) < answers.index(after)
    model = "Logistic regression (strength 0.1) on the maximum of the last stage before a final convolution (pre/max)"
    assert f"{model}, of the foreground’s box at 448 px." in answers
    assert "trained on 8 symmetries of each and predicts by the mean of 8 views" in answers
    low, high = m["nested/log_loss_low"], m["nested/log_loss_high"]
    assert f"log-loss 0.2000 ({low:.4f} to {high:.4f}), accuracy 100.0% (67.6% to 100.0%)" in answers
    assert low < 0.2 < high
    assert "optimistic, since it is the best of 4 noisy scores: log-loss 0.2000, accuracy 50.0%" in answers
    assert "1 of the other 3 candidates are not distinguishable from it: " in answers
    cheapest = (
        "logistic regression on pre/max, whole image, 224 px, 1 view to train on, 1 to predict; log-loss 0.2500"
    )
    assert f"at 3% of the winner’s pixels: {cheapest}." in answers
    low, high = m["nested/gain_low"], m["nested/gain_high"]
    gain = f"0.3000 ({low:.4f} to {high:.4f}) by nested cross-validation. The winner’s own gain is optimistic: 0.3000"
    assert "Over the published recipe (log-loss 0.5000, accuracy 50.0%)" in answers
    assert gain in answers
    assert "does not prove" not in answers
    assert "Search 177.8 s, prediction 32.5 s, whole run 215.7 s. Nothing was left out." in answers
    assert text.index("What the search found") < text.index("What ran where")
    head = text.split("What the search found")[0]
    assert "Estimated accuracy 100.0% 95% interval 67.6% to 100.0%" in head
    assert "Training accuracy" not in head


def test_what_is_not_sure_is_said(tmp_path: Path) -> None:
    """The baseline is as good as the winner but for noise, none is cheaper than it, and some were left out."""
    candidates = ((RECIPE, 0.3 + 3 * NOISE), ({**SMALL, "tta": 1}, 0.2 - NOISE), (WRONG, 0.9 - NOISE))
    make_search(tmp_path / "run", candidates, notes=("448 px: left out",), lr=0.01)
    text = text_of(write_page(tmp_path / "run", views=0))
    assert "1 of the other 2 candidates are not distinguishable from it, the baseline among them" in text
    assert "None of them is cheaper to predict with." in text
    assert "an interval with 0 in it does not prove a gain" in text
    assert "published recipe" not in text
    assert "What was left out is named at the head of this page." in text
    assert "It is trained on the image as it is and predicts from the image as it is." in text
    terminal = summary_table(tmp_path / "run")
    assert "over the baseline, not proven" in terminal
    assert "1 notes in the report" not in terminal
    assert "1 note in the report" in terminal


def test_each_row_of_the_tables_is_its_candidate(tmp_path: Path) -> None:
    make_search(tmp_path / "run")
    candidates, losses, *_ = tables_of(write_page(tmp_path / "run", views=0))
    assert [(row[0], row[1], row[3], row[4], row[6], row[7], row[8], row[11]) for row in candidates] == [
        ("logistic", "pre/max", "448 px", "8 symmetries", "strength 0.1", "1", "0.2000", "winner"),
        ("logistic", "pre/max", "224 px", "image as it is", "strength 10", "2", "0.2500", "no"),
        ("adam", "last/avg", "224 px", "100 crops", "lr 0.001, step 7, gamma 0.1", "0", "0.5000", "baseline: yes"),
        ("logistic", "stage3/avg", "448 px", "8 symmetries", "strength 0.1", "3", "0.9000", "yes"),
    ]
    assert losses == [
        ["head", "adam", "1", "0.5000", "+0.3000", "yes"],
        ["head", "logistic", "3", "0.2000", "+0.0000", "winner"],
        ["readout", "last/avg", "1", "0.5000", "+0.3000", "yes"],
        ["readout", "pre/max", "2", "0.2000", "+0.0000", "winner"],
        ["readout", "stage3/avg", "1", "0.9000", "+0.7000", "yes"],
        ["crop", "foreground", "1", "0.2000", "+0.0000", "winner"],
        ["crop", "whole image", "3", "0.2500", "+0.0500", "no"],
        ["size", "224 px", "2", "0.2500", "+0.0500", "no"],
        ["size", "448 px", "2", "0.2000", "+0.0000", "winner"],
        ["trained on", "image as it is", "1", "0.2500", "+0.0500", "no"],
        ["trained on", "8 symmetries", "2", "0.2000", "+0.0000", "winner"],
        ["trained on", "100 crops", "1", "0.5000", "+0.3000", "yes"],
        ["predicts by", "one view", "2", "0.2500", "+0.0500", "no"],
        ["predicts by", "mean of 8", "2", "0.2000", "+0.0000", "winner"],
    ]


def test_what_all_candidates_share_is_no_column(tmp_path: Path) -> None:
    alike = [({**settings, "tta": 1, "image_size": 96}, losses) for settings, losses in CANDIDATES]
    make_search(tmp_path / "run", alike)
    page = write_page(tmp_path / "run", views=0)
    assert "Alike in all: size: 96 px; predicts by: one view." in text_of(page)
    candidates, losses, *_ = tables_of(page)
    assert not any("96 px" in row for row in [*candidates, *losses])


def test_a_winner_without_epochs_has_no_learning_curve_and_one_of_the_recipe_has(tmp_path: Path) -> None:
    make_search(tmp_path / "logistic")
    page = write_page(tmp_path / "logistic", views=0)
    assert "Learning curves" not in page
    assert "training loss on all labelled images" not in page
    make_search(tmp_path / "adam", ((RECIPE, 0.5 + NOISE), ({**RECIPE, "lr": 0.02}, 0.1 + NOISE), CANDIDATES[3]))
    page = write_page(tmp_path / "adam", views=0)
    assert "Learning curves" in page
    assert "training loss on all labelled images over 100 epochs: winner from 0.7 to 0.1" in page
    assert "The recipe’s head (lr 0.02, step 7, gamma 0.1) on the average of the last layer (last/avg)" in page
    assert "It is trained on 100 crops of each" in page


def test_candidates_that_diverged_are_called_so(tmp_path: Path) -> None:
    make_search(tmp_path / "run", ((RECIPE, np.full(8, np.inf)), *CANDIDATES[1:]))
    text = text_of(write_page(tmp_path / "run", views=0))
    assert "Over the published recipe (log-loss diverged, accuracy 50.0%): no figure" in text
    assert "100 crops 1 diverged – yes" in text
    assert not re.search(r"\b(inf|nan|None)\b", text.split("Settings and versions")[0])
    assert not re.search(r"\b(inf|nan|None)\b", summary_table(tmp_path / "run"))


def test_the_terminal_has_five_lines_in_the_order_of_the_page(tmp_path: Path) -> None:
    """With the longest names and counts that a search comes to."""
    losses, others = 1.5 + 10 * NOISE, 1.6 - 10 * NOISE
    many = [({**LARGE, "image_size": 1024, "readout": "stage4/max"}, losses), ({**SMALL, "tta": 4}, others)]
    many += [(WRONG, others)] * 1200
    make_search(tmp_path / "run", [(RECIPE, others + 9), *many], notes=("left out",) * 12)
    lines = summary_table(tmp_path / "run").splitlines()[-5:]
    assert [line[:10].strip() for line in lines] == ["Model", "Estimate", "How sure", "Gain", "Cost"]
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)
    assert lines[0].endswith("on stage4/max, foreground, 1024 px, 8 views to train on, 8 to predict")
    assert re.search(r"nested log-loss \S+ \(95%: \S+ to \S+\), accuracy 100.0% \(67.6% to 100.0%\)$", lines[1])
    sure = "own 1.500 is optimistic; 1201 of 1202 others not distinguishable, cheapest 224 px, 4 views"
    assert lines[2].endswith(sure)
    assert lines[4].endswith("whole run 215.7 s; 12 notes in the report")


def test_the_calibration_error_is_that_of_the_bins(tmp_path: Path) -> None:
    """Of 16 images in two bins: 6 of 8 right at 0.6, all right at 0.9; one without a finite probability."""
    chances = [0.6] * 8 + [0.1] * 8
    labels = ["NA"] * 6 + ["b"] * 2 + ["b"] * 8
    rows = [(f"train/{i}.jpg", label, p, 1 - p) for i, (label, p) in enumerate(zip(labels, chances, strict=True))]
    rows.append(("train/99.jpg", "b", np.nan, np.nan))
    table = pd.DataFrame(rows, columns=pd.Index(["path", "label", "p_NA", "p_b"]))
    table.to_csv(tmp_path / "out_of_fold.csv", index=False)
    section = show_calibration(tmp_path / "out_of_fold.csv")
    assert section is not None
    assert section["num_images"] == 16
    assert section["error"] == pytest.approx((0.15 + 0.1) / 2)
    assert 0.05 < section["chance_error"] < 0.2
    assert [row[1:4] for row in section["rows"]] == [["8", "60.0%", "75.0%"], ["8", "90.0%", "100.0%"]]
    text = text_of(write_page(tmp_path, views=0))
    assert "16 labelled images" in text
    assert "The expected calibration error is 0.125" in text


def draw_object(path: str) -> np.ndarray:
    """(400, 600, 3) white but for an object of 200 x 150 pixels at (100, 300)."""
    if path == "train/a/1.jpg":
        raise OSError("cannot be read")
    picture = np.full((400, 600, 3), 255, np.uint8)
    picture[100:300, 300:450] = np.random.default_rng(0).integers(0, 200, (200, 150, 3))
    return picture


def test_the_boxes_of_labelled_images_are_drawn(tmp_path: Path) -> None:
    paths = [f"train/a/{i}.jpg" for i in range(20)]
    pd.DataFrame({"path": paths}).to_csv(tmp_path / "predictions.csv", index=False)
    pictures = show_boxes(tmp_path, {"crop": "foreground"}, draw_object)
    assert pictures is not None
    assert len(pictures) == 8
    assert re.fullmatch(r"a/0: 1[34]% of its area", pictures[0]["title"])  # 12.5% and the margin
    data = base64.b64decode(pictures[0]["uri"].partition(",")[2])
    drawn = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)  # (117, 176, 3)
    rows, columns = ((drawn[..., 0] > 170) & (drawn[..., 1] > 170) & (drawn[..., 2] < 110)).nonzero()
    scale = drawn.shape[1] / 600
    for found, side in ((rows.min(), 100), (rows.max(), 300), (columns.min(), 300), (columns.max(), 450)):
        assert abs(found - side * scale) <= 3
    pd.DataFrame({"path": paths[:2]}).to_csv(tmp_path / "out_of_fold.csv", index=False)
    assert [picture["title"][:3] for picture in show_boxes(tmp_path, {"crop": "foreground"}, draw_object) or []] == [
        "a/0"
    ]
    assert show_boxes(tmp_path, {"crop": "none"}, draw_object) is None


def test_boxes_are_on_the_page_of_any_job(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"job": "train", "crop": "foreground"})
    table = {"path": ["test/1.jpg"], "id": ["1"], "label": ["a"], "p_a": [0.9], "p_b": [0.1]}
    pd.DataFrame(table).to_csv(tmp_path / "predictions.csv", index=False)
    page = write_page(tmp_path, views=0, read_image=draw_object)
    assert "Foreground boxes" in page
    assert 'alt="test/1.jpg with its box: 1' in page
