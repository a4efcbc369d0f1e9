import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from report_runs import draw_noise, make_run, write_page

from plates.metrics import score
from plates.report import summary_table
from plates.report.predictions import read_predictions, show_predictions
from plates.report.scores import score_split
from plates.rundir import write_json

ODD_CLASSES = ["dirty & <b>wet", 'NA "quoted"']


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run", ODD_CLASSES)


@pytest.fixture(scope="module")
def odd_page(odd_run: Path) -> str:
    return write_page(odd_run)


def test_page_needs_nothing_else(odd_page: str) -> None:
    targets = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]*)""", odd_page)
    assert len(targets) > 30
    targets.remove("show/index.html")  # a link, which the page does without
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"https?://|<script|@import", odd_page)
    assert len(odd_page) < 1_500_000


def test_figures_equal_those_in_the_files(odd_run: Path, odd_page: str) -> None:
    text = " ".join(re.sub(r"<[^>]*>", " ", odd_page).split())
    for figure in ("87.5%", "7 of 8", "loss 0.3457", "90.6%", "loss 0.2123", "1234.6 s", "321.4 images/s"):
        assert figure in text
    assert "one image is 12.5 points" in text
    assert "52.9% to 97.8%" in text
    assert "30 images classified" in text
    assert "loss over 3 epochs: train from 0.7 to 0.2123; val from 0.69 to 0.3457" in odd_page
    table = pd.read_csv(odd_run / "predictions.csv", dtype={"id": str})
    stated = table[[f"p_{name}" for name in ODD_CLASSES]].max(axis=1).to_numpy()
    for title, row in (("Most confident", stated.argmax()), ("Least confident", stated.argmin())):
        caption = odd_page.split(f"<h3>{title}</h3>")[1].split("</figcaption>")[0]
        assert f"<b>{table.at[int(row), 'id']}</b>" in caption
        assert f"{stated[row]:.3f}" in caption
    assert odd_page.count("<figure>") == 24 + 8 + 8 + 2


def test_odd_names_are_escaped(odd_page: str) -> None:
    assert "dirty &amp; &lt;b&gt;wet" in odd_page
    assert "NA &#34;quoted&#34;" in odd_page
    assert "train/&lt;broken&gt;.jpg" in odd_page
    for raw in ("<b>wet", "<broken>", "v<i>ew", "<fallback>"):
        assert raw not in odd_page


def test_unreadable_picture_is_said(tmp_path: Path) -> None:
    def fail_once(path: str) -> np.ndarray:
        if path == "test/0000.jpg":
            raise OSError("no such <picture>")
        return draw_noise(path)

    page = write_page(make_run(tmp_path / "run", ["cleaned", "dirty"]), read_image=fail_once)
    assert "1 of the pictures chosen for this page could not be read and is left out" in page
    assert "<code>test/0000.jpg</code> (no such &lt;picture&gt;)" in page
    assert 'alt="test image 0000' not in page


@pytest.mark.parametrize("test_images", [0, 1, 5])
def test_few_predictions(tmp_path: Path, test_images: int) -> None:
    page = write_page(make_run(tmp_path / "run", ["cleaned", "dirty"], test_images=test_images))
    assert page.count('alt="test image') == 3 * test_images
    assert ("<h2>Test images</h2>" in page) == bool(test_images)


@pytest.mark.parametrize("name", ["history", "timing", "predictions", "skipped", "metrics", "config"])
def test_a_file_may_be_missing(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", ["a", "b", "c"], test_images=3)
    next(run.glob(f"{name}.*")).unlink()
    assert write_page(run, views=0).rstrip().endswith("</html>")
    assert summary_table(run)


def test_an_empty_run(tmp_path: Path) -> None:
    assert "Run report" in write_page(tmp_path, views=0)
    assert summary_table(tmp_path) == ""


def test_true_labels_of_the_test_split_are_used(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["a", "b"], job="predict")
    figures = {"test/num_images": 400, "test/accuracy": 0.995, "test/loss": 0.02}
    figures |= {
        "test/confusion/a/a": 199,
        "test/confusion/a/b": 1,
        "test/confusion/b/b": 199,
        "test/confusion/b/a": 1,
    }
    (run / "metrics.json").write_text(json.dumps(figures))
    (run / "history.csv").unlink()
    page = " ".join(write_page(run).split())
    assert "398 of 400 images correct: <b>99.5%</b>" in page
    assert "Prediction report" in page
    assert "Validation accuracy" not in page
    assert "points" not in page
    assert re.search(r"test +400 +99.5% +0.0200", summary_table(run))


def test_summary_table(odd_run: Path) -> None:
    lines = summary_table(odd_run).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[:2] for line in lines[1:4]] == [["whole", "run"], ["worker", "0"], ["worker", "1"]]
    assert lines[1].split()[-7:] == ["4.2", "0.5", "12.8", "1.5", "1234.6", "80.5", "321.4"]
    assert lines[3].split()[-1] == "–"
    assert [line.split() for line in lines[-3:]] == [
        ["train", "32", "90.6%", "0.2123"],
        ["val", "8", "87.5%", "0.3457"],
        ["test", "30", "–", "–"],
    ]


def write_many_classes(run: Path, *, num_classes: int, num_images: int) -> list[str]:
    """A run of very many classes: a third of the images is taken for the next class, those of class 7 always."""
    classes = [f"class {i:04}" for i in range(num_classes)]
    run.mkdir()
    labels = torch.arange(num_images) % num_classes
    guesses = torch.where((labels == 7) | (torch.arange(num_images) % 3 == 0), (labels + 1) % num_classes, labels)
    logits = torch.randn(num_images, num_classes, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(num_images), guesses] += 8
    write_json(run / "config.json", {"job": "train", "classes": classes})
    write_json(run / "metrics.json", score(logits, labels, tuple(classes), "test"))
    table = pd.DataFrame(logits.softmax(1).numpy(), columns=[f"p_{name}" for name in classes])
    table.insert(0, "label", [classes[i] for i in guesses])
    table.insert(0, "id", [f"{i:05}" for i in range(num_images)])
    table.insert(0, "path", [f"test/{i:05}.jpg" for i in range(num_images)])
    table.to_csv(run / "predictions.csv", index=False)
    return classes


def test_very_many_classes_make_small_files_and_take_little_memory(tmp_path: Path) -> None:
    classes = write_many_classes(tmp_path / "run", num_classes=400, num_images=1000)
    assert (tmp_path / "run" / "metrics.json").stat().st_size < 100_000
    text = read_predictions(tmp_path / "run" / "predictions.csv")
    assert len(text) == 1000
    tracemalloc.start()
    page = write_page(tmp_path / "run", views=0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5 * (tmp_path / "run" / "predictions.csv").stat().st_size
    assert len(page) < 500_000
    matrix = page.split('<table class="matrix"')[1].split("</table>")[0]
    assert matrix.count("<tr>") == 1 + 20
    assert f'<th scope="row">{classes[7]}</th>' in matrix, "of its images each is mistaken"
    assert "Of 400 classes the 20 with the most mistaken images are shown" in page
    assert "the others as 380 other classes." in page
    assert f"{classes[19]}, and 380 more" in page
    judged = re.search(r"(\d+) of 1000 images correct", " ".join(page.split()))
    assert judged
    assert int(judged[1]) == 1000 - 334 - 2  # of the three images of class 7 one is a third one anyway


def test_the_shown_probabilities_are_the_label_and_the_next_most_probable(tmp_path: Path) -> None:
    table = {"path": ["test/1.jpg", "test/2.jpg"], "id": ["01", "NA"], "label": ["NA", "02"]}
    chances = {"p_01": [0.2, ""], "p_02": [0.25, ""], "p_NA": [0.45, ""], "p_null": [0.1, ""]}
    pd.DataFrame(table | chances).to_csv(tmp_path / "predictions.csv", index=False)
    section = show_predictions(tmp_path / "predictions.csv", draw_noise)
    assert section is not None
    first, diverged = section["grids"]["Evenly spaced by path"]
    assert first["bars"] == [("NA", 0.45), ("02", 0.25), ("01", 0.2)]
    assert (diverged["title"], [name for name, _ in diverged["bars"]]) == ("NA", ["02", "01", "NA"])
    assert len(section["grids"]["Most confident"]) == 1
    assert section["totals"] == {"NA": 1, "02": 1}


def test_a_confusion_matrix_of_few_classes_is_whole(odd_page: str) -> None:
    matrix = odd_page.split('<table class="matrix"')[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in matrix.split("<tr>")[2:]]
    assert rows == [["4", "0", "4", "100.0%"], ["1", "3", "4", "75.0%"]]
    assert "another class" not in matrix


@pytest.mark.parametrize(("correct", "total"), [(0, 8), (7, 8), (8, 8), (500, 1000)])
def test_the_interval_of_an_accuracy_is_wilsons(correct: int, total: int) -> None:
    low, high = score_split({"val/accuracy": correct / total, "val/num_images": total}, {}, "val")["interval"]
    assert 0 <= low <= correct / total <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            error = abs(correct / total - bound) / (bound * (1 - bound) / total) ** 0.5
            assert error == pytest.approx(1.96, abs=0.001)
