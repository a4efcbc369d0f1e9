import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import write_picture
from report_runs import make_run

from plates.dataset import load_dataset
from plates.report.comparison import MCNEMAR, mcnemar, show_disagreements
from ray_jobs import compare as compare_job

CLASSES, DRAWN = ["NA & <b>", "wet"], ["cleaned", "dirty"]
# Of 11 images, true class by index modulo 2: what two runs say, and how sure they are.
TRUE = [index % 2 for index in range(11)]
FIRST_RIGHT = [0, 9, 10]
SECOND_RIGHT = [1, 2, 3, 4, 5, 6, 7, 9, 10]
CONFIDENCE = [0.6, 0.7, 0.8, 0.99, 0.55, 0.9, 0.65, 0.75, 0.52, 0.85, 0.95]


def write_guesses(file: Path, paths: list[str], right: list[int], label: str) -> None:
    """The probabilities of images of which those are right; `label` is the guess, or the truth where held out."""
    rows = []
    for index, (path, true, chance) in enumerate(zip(paths, TRUE, CONFIDENCE, strict=True)):
        guess = true if index in right else 1 - true
        said = {"path": path, "label": CLASSES[guess if label == "guess" else true]}
        rows.append(said | {f"p_{name}": chance if k == guess else 1 - chance for k, name in enumerate(CLASSES)})
    table = pd.DataFrame(rows)
    if label == "guess":
        table.insert(1, "id", [Path(path).stem for path in paths])
    table.to_csv(file, index=False)


def make_finished(run: Path, right: list[int], paths: list[str], **settings: Any) -> Path:
    make_run(run, CLASSES)
    config = json.loads((run / "config.json").read_text()) | {"status": "finished", "seed": 0, "lr": 0.001}
    (run / "config.json").write_text(json.dumps(config | settings))
    write_guesses(run / "predictions.csv", paths, right, "guess")
    return run


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Test images in folders of their classes, on the disk but for the one of the surest disagreement."""
    paths = [f"test/{CLASSES[true]}/{index}.png" for index, true in enumerate(TRUE)]
    for index, path in enumerate([*paths[:3], *paths[4:]]):
        write_picture(tmp_path / "data" / path, index)
    for name in CLASSES:
        for index in range(2):
            write_picture(tmp_path / "data" / "train" / name / f"{index}.png", index)
    return paths


@pytest.fixture
def two(tmp_path: Path, paths: list[str]) -> list[str]:
    data = str(tmp_path / "data")
    first = make_finished(tmp_path / "a<i>", FIRST_RIGHT, paths, data=data)
    second = make_finished(tmp_path / "b", SECOND_RIGHT, paths, data=data, lr=0.01, only="here")
    history = {"epoch": [1, 2, 3, 4, 5], "lr": 0.01, "train/loss": 0.5, "train/accuracy": 1.0}
    history |= {"val/loss": [0.9, 0.8, 0.7, 0.6, 0.125], "val/accuracy": 0.5}
    pd.DataFrame(history).to_csv(second / "history.csv", index=False)
    return [str(first), str(second)]


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_two_runs_side_by_side(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert compare_job.main([*two, "--out", str(out)]) == 0
    printed, page = " ".join(capsys.readouterr().out.split()), (out / "compare.html").read_text()
    text = text_of(page)
    for told in (printed, text):
        assert "lr 0.001 0.01" in told
        assert "87.5% (52.9% to 97.8%)" in told, "Wilson's interval of 7 of 8"
        assert "total_s 1234.6 1234.6" in told
        assert "1 and 2 11 3 9 1 7 0.070" in told, "2 (1 + 8) / 2^8"
    assert "only" not in re.split("Settings that differ|Learning", text)[1].split("other")[0]
    assert "1 is of some runs alone" in text
    assert "val/loss over 5 epochs: run 1 from 0.69 to 0.3457; run 2 from 0.9 to 0.125" in page
    assert "11 images were judged by two or more runs, which disagree on 8" in text
    titles = re.findall(r"<figcaption><b>(\d+): ", page)
    assert titles == [str(index) for index in sorted([0, *range(1, 8)], key=lambda index: -CONFIDENCE[index])]
    assert page.count("<img src=") == 7
    assert "1 of these pictures can no longer be read" in text
    table = pd.read_csv(out / "compare.csv")
    assert table["lr"].tolist() == [0.001, 0.01]
    assert table["val/accuracy_low"].tolist() == pytest.approx([0.5291] * 2, abs=1e-4)
    assert table["run"].tolist() == two
    assert not re.search(r"https?://|<script|<b>wet|NA & <b>|a<i>", page)


def test_runs_of_searches_are_tested_by_what_they_held_out(two: list[str], tmp_path: Path) -> None:
    """Test images without folders of classes have no label; those in train/ that were held out have one."""
    for run, right in zip(map(Path, two), (FIRST_RIGHT, SECOND_RIGHT), strict=True):
        write_guesses(run / "predictions.csv", [f"test/{index}.png" for index in range(11)], right, "guess")
        write_guesses(run / "out_of_fold.csv", [f"train/{index}.png" for index in range(11)], right, "true")
    assert compare_job.main([*two, "--out", str(tmp_path / "out")]) == 0
    tested, held_out = text_of((tmp_path / "out" / "compare.html").read_text()).split("Labelled images, each judged")
    assert "share no image with a known label" in tested
    assert "1 and 2 11 3 9 1 7 0.070" in held_out


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"classes": ["a", "b"]}, "different classes"), ({"data": "synthetic:4"}, "not all drawn by the same")],
)
def test_other_classes_and_other_drawings_are_not_compared(changes, told, two, tmp_path, capsys):
    config = Path(two[1], "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert compare_job.main([*two, "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "compare.html").read_text()
    for said in (capsys.readouterr().out, page):
        assert told in said
        assert "1234.6" in said
        assert "McNemar" not in said
    assert "<figure>" not in page


def test_drawn_plates_know_their_labels(tmp_path: Path) -> None:
    """Of 4 plates to predict one run has all right, the other none."""
    true, runs = [DRAWN[sample.label or 0] for sample in load_dataset("synthetic:4", 3).test], []
    for name, labels in (("a", true), ("b", [DRAWN[label == "cleaned"] for label in true])):
        run = make_run(tmp_path / name, DRAWN, test_images=4)
        known = {"status": "finished", "data": "synthetic:4", "seed": 3}
        (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | known))
        table = pd.read_csv(run / "predictions.csv")
        table = table.assign(path=[f"test/{index:06d}.png" for index in range(4, 8)], label=labels)
        table[["p_cleaned", "p_dirty"]] = [[0.9, 0.1] if label == "cleaned" else [0.1, 0.9] for label in labels]
        table.to_csv(run / "predictions.csv", index=False)
        runs.append(str(run))
    assert compare_job.main([*runs, "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "1 and 2 4 4 0 4 0 0.125" in text_of(page), "2 / 2^4"
    assert page.count("<img src=") == 4


@pytest.mark.parametrize(
    ("named", "rule"),
    [
        ([], "RUN is missing: give at least two runs"),
        (["a"], "RUN a: give at least two runs"),
        (["a", "b", "./a/"], "RUN ./a/: is given twice"),
        (["a", "alias"], "RUN alias: is given twice"),
        (["a", "nowhere"], "RUN nowhere: holds no run"),
        (["a", "other"], "RUN other: holds no run"),
        (["a", "cut"], "RUN cut: is a run of train, unfinished"),
        (["a", "bench"], "RUN bench: is a run of benchmark, finished"),
    ],
)
def test_what_is_no_two_finished_runs_is_one_line(named, rule, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, job, status in (("a", "train", "finished"), ("b", "train", "finished"), ("cut", "train", "unfinished"),
                              ("bench", "benchmark", "finished")):  # fmt: skip
        config = make_run(tmp_path / name, CLASSES, job=job) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"status": status}))
    Path("alias").symlink_to("a")
    Path("other").mkdir()
    Path("other", "config.json").write_text("[]")
    assert compare_job.main([*named, "--out", "out"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"plates compare: {rule}")
    assert message.count("\n") == 1
    assert not Path("out").exists()


def judged(guesses: dict[str, str], chance: float = 0.9) -> pd.DataFrame:
    return pd.DataFrame({"guess": guesses, "chance": chance})


def test_mcnemar_is_of_the_shared_images_with_a_label() -> None:
    labels = dict.fromkeys("abcdefg", "x")
    tables = {"1": judged(dict.fromkeys("abcdef", "x") | {"u": "y"}), "2": judged(dict.fromkeys("abcdeg", "y"))}
    assert dict(zip(MCNEMAR, mcnemar(("1", "2"), tables, labels), strict=True)) == {
        "runs": "1 and 2", "images": "5", "first right": "5", "second right": "0", "only first": "5",
        "only second": "0", "p": "0.062",
    }  # fmt: skip
    assert mcnemar(("1", "2"), tables, {"u": "y"}) == []
    assert mcnemar(("1", "1"), tables, labels)[-1] == "1.000"
    diverged = tables | {"2": judged(dict.fromkeys("abcde", "x"), float("nan"))}
    assert mcnemar(("1", "2"), diverged, labels)[3] == "0"


def test_a_disagreement_is_as_sure_as_its_second_surest_class() -> None:
    """Of three runs, one of which lacks two images."""
    guesses = pd.DataFrame({"1": ["x", "x", "x"], "2": ["x", "y", "y"], "3": ["y", None, None]}, index=[*"abc"])
    sure = {"1": [0.99, 0.9, 0.99], "2": [0.98, 0.8, 0.7], "3": [0.75, np.nan, np.nan]}
    chances = pd.DataFrame(sure, index=[*"abc"])
    pictures = show_disagreements(guesses, chances, {"c": "y"}, lambda path: np.zeros((4, 4, 3), np.uint8))
    assert [picture["title"] for picture in pictures] == ["b", "a", "c: y"]
    assert pictures[0]["bars"] == [("1 x", 0.9), ("2 y", 0.8)]
