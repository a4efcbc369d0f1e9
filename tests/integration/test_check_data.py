"""The check of a data set as a job of its own, and in a run."""

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import write_picture
from PIL import Image

from ray_jobs import check_data as check_job
from ray_jobs import train as train_job

SMALL = ["--epochs", "2", "--num-views", "2", "--backbone", "resnet18", "--weights", "none", "--image-size", "64",
         "--num-workers", "0"]  # fmt: skip


@pytest.fixture
def faulty(folder: Path) -> Path:
    """With a test image that is a copy of a training image, one that shows the same as another, and one cut off."""
    (folder / "test" / "copy.jpg").write_bytes((folder / "train" / "cleaned" / "1.jpg").read_bytes())
    write_picture(folder / "train" / "dirty" / "wide.png", 300, 96, 128)
    Image.open(folder / "train" / "dirty" / "wide.png").save(folder / "test" / "near.jpg", quality=85)
    (folder / "test" / "0.jpg").write_bytes((folder / "test" / "0.jpg").read_bytes()[:-40])
    return folder


def issues_in(run: Path) -> set[tuple[str, str]]:
    table = pd.read_csv(run / "data_issues.csv")
    return {*zip(table["path"], table["issue"], strict=True)}


EXPECTED = {
    ("test/0.jpg", "truncated"),
    ("test/copy.jpg", "exact_duplicate"),
    ("train/cleaned/1.jpg", "exact_duplicate"),
    ("test/near.jpg", "near_duplicate"),
    ("train/dirty/wide.png", "near_duplicate"),
}


def test_check_data_tells_what_is_odd(faulty, tmp_path, capsys):
    run = tmp_path / "run"
    assert check_job.main(["--data", str(faulty), "--out", str(run)]) == 3
    assert issues_in(run) == EXPECTED
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "images: train 14 (cleaned 7, dirty 7); val 4 (cleaned 2, dirty 2); test 9"
    assert out[1].startswith("duplicates: 2 sets of 4 images, 2 across splits (")
    assert out[2] == "cannot be read: 1 (test/0.jpg)"
    page = (run / "report.html").read_text()
    assert "What ran where" not in page
    assert "<h2>Data</h2>" in page
    assert "test/near.jpg" in page
    assert check_job.main(["--data", str(faulty), "--out", str(run)]) == 2, "a finished run is kept"


def test_a_run_finds_the_same_as_its_images_pass(faulty, tmp_path, capsys):
    """The second run finds its features stored and decodes no test image: it knows exact duplicates, and by its
    features that a test image is near to one of training."""
    runs = [tmp_path / name for name in ("first", "again", "dropped")]
    assert train_job.main([*SMALL, "--data", str(faulty), "--out", str(runs[0])]) == 3
    assert issues_in(runs[0]) == EXPECTED
    out = capsys.readouterr().out
    assert out.index("images: train 14") < out.index("duplicates: 2 sets") < out.index("report:")
    assert "<h2>Data</h2>" in (runs[0] / "report.html").read_text()
    assert train_job.main([*SMALL, "--data", str(faulty), "--out", str(runs[1])]) == 3
    exact = {issue for issue in EXPECTED if issue[1] != "near_duplicate"}
    assert issues_in(runs[1]) == exact | {("test/near.jpg", "near_duplicate")}
    assert "not decoded: 8 images" in capsys.readouterr().out
    assert train_job.main([*SMALL, "--drop-duplicates", "--data", str(faulty), "--out", str(runs[2])]) == 3
    gone = {("train/cleaned/1.jpg", "dropped"), ("train/dirty/wide.png", "dropped")}
    assert issues_in(runs[2]) == EXPECTED | gone
    assert json.loads((runs[2] / "config.json").read_text())["num_images"]["train"] == 12
    assert "duplicates left out of training: 2 (train/cleaned/1.jpg, train/dirty/wide.png)" in capsys.readouterr().out


def test_a_sound_data_set_has_no_table(tmp_path, capsys):
    run = tmp_path / "run"
    assert train_job.main([*SMALL, "--data", "synthetic:12", "--out", str(run)]) == 0
    assert not (run / "data_issues.csv").exists()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("images:", "dupl", "not dec"))]
    assert len(told) == 1
    assert told[0].startswith("images: train 10 (cleaned 5, dirty 5); val 2 (cleaned 1, dirty 1); test 12 (cleaned ")


def test_none_of_the_photos_is_reported_unreadable(photos, tmp_path):
    run = tmp_path / "run"
    assert check_job.main(["--data", str(photos), "--out", str(run)]) == 0
    path = run / "data_issues.csv"
    found = set(pd.read_csv(path)["issue"]) if path.exists() else set()
    assert not found & {"unreadable", "truncated", "empty", "missing_class", "class_name"}
