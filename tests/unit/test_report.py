import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from plates.report import summary_table, wilson_interval, write_report

ODD_CLASSES = ["dirty & <b>wet", 'NA "quoted"']


def make_run(run: Path, classes: list[str], *, test_images: int = 30, job: str = "train") -> Path:
    """Write the files of a run with 8 validation images, of which the model gets 7 right."""
    rng = np.random.default_rng(0)
    run.mkdir(parents=True)
    config = {
        "job": job,
        "data": "/data/plates",
        "backbone": "tiny",
        "backbone_reason": "asked for",
        "weights_source": "package",
        "plan": "2 workers on 1 node, cpu",
        "device_names": ["Some CPU"],
        "versions": {"torch": "2.14.1"},
        "classes": classes,
        "num_images": {"train": 32, "val": 8},
        "notes": ["Backbone <fallback>: smaller one."],
        "epochs": 3,
    }
    (run / "config.json").write_text(json.dumps(config))
    first, second = classes[:2]
    metrics = {
        "train/loss": 0.21234,
        "train/accuracy": 0.90625,
        "val/loss": 0.34567,
        "val/accuracy": 0.875,
        "val/num_images": 8,
        f"val/confusion/{first}/{first}": 4,
        f"val/confusion/{first}/{second}": 0,
        f"val/confusion/{second}/{first}": 1,
        f"val/confusion/{second}/{second}": 3,
        "test/num_images": test_images,
        "test/num_unreadable": 1,
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "lr": [1e-3, 1e-3, 1e-4],
            "train/loss": [0.7, np.nan, 0.21234],
            "train/accuracy": [0.5, 0.8, 0.90625],
            "val/loss": [0.69, 0.4, 0.34567],
            "val/accuracy": [0.5, 0.75, 0.875],
        }
    ).to_csv(run / "history.csv", index=False)
    pd.DataFrame(
        {
            "rank": [None, 0, 1],
            "node": [None, "a-node-with-quite-a-long-name.example", "b"],
            "device": "cpu",
            "device_name": "A Processor With Quite A Long Name",
            "num_workers": [2, 1, 1],
            "startup_s": [4.25, 1.5, 1.5],
            "data_s": [0.5, 0.5, 0.5],
            "train_s": [12.75, 12.5, 12.5],
            "inference_s": [1.5, 1.25, None],
            "total_s": [1234.56, 18.5, 18.5],
            "train_images_per_sec": [80.5, 40.25, 40.25],
            "inference_images_per_sec": [321.4, 160.5, None],
        }
    ).astype({"rank": "Int64"}).to_csv(run / "timing.csv", index=False)
    chances = rng.uniform(0.5, 0.99, test_images)
    predictions: dict[str, list] = {"path": [f"test/{i:04}.jpg" for i in range(test_images)]}
    predictions["id"] = [f"{i:04}" for i in range(test_images)]
    predictions["label"] = [classes[i % 2] for i in range(test_images)]
    for k, name in enumerate(classes):
        values = [p if i % 2 == k else 1 - p for i, p in enumerate(chances)]
        predictions[f"p_{name}"] = values if k < 2 else [0.0] * test_images
    pd.DataFrame(predictions).to_csv(run / "predictions.csv", index=False)
    skipped = {"path": ["train/<broken>.jpg"], "split": ["train"], "reason": ["truncated"]}
    pd.DataFrame(skipped).to_csv(run / "skipped.csv", index=False)
    return run


def draw_noise(path: str) -> np.ndarray:
    return np.random.default_rng(len(path)).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def write_page(run: Path, views: int = 2, read_image=draw_noise) -> str:
    report = write_report(run, train_views=[(draw_noise("x"), "v<i>ew")] * views, read_image=read_image)
    assert report == run / "report.html"
    assert not list(run.glob("*.part"))
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run", ODD_CLASSES)


@pytest.fixture(scope="module")
def odd_page(odd_run: Path) -> str:
    return write_page(odd_run)


def test_page_needs_nothing_else(odd_page: str) -> None:
    targets = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]*)""", odd_page)
    assert len(targets) > 30
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


@pytest.mark.parametrize(("correct", "total"), [(0, 8), (7, 8), (8, 8), (500, 1000)])
def test_wilson_interval(correct: int, total: int) -> None:
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            error = abs(correct / total - bound) / (bound * (1 - bound) / total) ** 0.5
            assert error == pytest.approx(1.96, abs=0.001)
