"""The page of all images: what it says of each, whose pixels are where, and that no name can break it."""

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import write_picture
from PIL import Image

from plates.dataset import load_dataset
from plates.show import write_page
from plates.show.findings import read_run
from plates.show.sheets import write_sheets
from plates.tool_config import ShowConfig
from ray_jobs import show

ODD = ['a "b" <i>&\'ü', "</script><!--<script>"]  # the second is a class of the run alone


class Page(HTMLParser):
    """What a browser finds: the texts of its scripts, by kind, the sources of its images, and all other text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.uris: list[str] = []
        self.policy, self.text, self.inside = "", "", ""
        self.feed(file.read_text("utf-8"))
        self.data = json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "data"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside = tag
        found = dict(attrs)
        if tag == "script":
            self.scripts.append((found, ""))
        if tag == "img" and found.get("src"):
            self.uris.append(found["src"] or "")
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.inside != "style":
            self.text += data

    def of(self, path: str) -> dict[str, Any]:
        """What the page's script is told of an image."""
        row, data = self.data["path"].index(path), self.data
        named = {key: None if (n := data[key][row]) is None else data["classes"][n] for key in ("label", "predicted")}
        figures = {name: column[row] for name, column in data["figures"].items()}
        by_row = {key: data[key].get(str(row)) for key in ("reason", "issue", "near_duplicate_sets")}
        return {
            **named,
            **figures,
            **by_row,
            "split": data["splits"][data["split"][row]],
            "sizes": data["sizes"][row],
        }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A small data set of odd names, and a run that says something of each split."""
    root = tmp_path_factory.mktemp("show")
    for index in range(4):
        write_picture(root / "data" / "train" / ODD[0] / f"{index}.png", index, 40, 56)
        write_picture(root / "data" / "train" / "plain" / f"{index}.png", index, 400, 200)
    for name in ("é'.png", "none.png", "sure.png"):
        write_picture(root / "data" / "test" / name, 9)
    (root / "data" / "test" / "half.png").write_bytes(b"half")
    run, names = root / "run", [ODD[0], "plain", ODD[1]]
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"job": "tune", "data": str(root / "data"), "seed": 3}))

    def write(name: str, chances: dict[str, list[float]], labels: list[str]) -> None:
        table = pd.DataFrame({"path": [*chances], "label": labels})
        columns = pd.DataFrame([*chances.values()], columns=pd.Index([f"p_{name}" for name in names]))
        pd.concat([table, columns], axis=1).to_csv(run / name, index=False)

    held_out = {f"train/{ODD[0]}/1.png": [0.25, 0.75, 0.0], "train/plain/1.png": [1.0, 0.0, 0.0]}
    write("out_of_fold.csv", held_out, [ODD[0], "plain"])
    diverged = [math.nan] * 3
    write("predictions.csv", {"test/none.png": diverged, "test/é'.png": [0.1, 0.2, 0.7]}, ["plain", ODD[1]])
    twice = {"path": "train/plain/0.png", "split": "val", "given_label": "plain"}
    issues = [{**twice, "issue": "label", "label_score": 0.125, "predicted_label": ODD[0]}]
    issues.append({**twice, "issue": "near_duplicate", "near_duplicate_score": 0.5, "near_duplicate_sets": "a; b"})
    issues.append({"split": "val", "issue": "missing_class", "given_label": "c"})
    pd.DataFrame(issues).to_csv(run / "data_issues.csv", index=False)
    dataset = load_dataset(str(root / "data"), 0)
    skipped = write_page(root / "out", dataset, read_run(run), title=f"photos {ODD[1]}", seed=3)
    assert [(one.path, one.split) for one in skipped] == [("test/half.png", "test")]
    return Page(root / "out" / "index.html")


def test_the_page_lists_every_image_in_order(page: Page) -> None:
    assert page.data["splits"] == ["train", "val", "test"]
    found = [(page.data["split"][row], path) for row, path in enumerate(page.data["path"])]
    assert found == sorted(found)
    assert len(found) == 12
    assert "train 6, val 2, test 4" in page.text


def test_what_a_run_says_stands_beside_its_image(page: Page) -> None:
    wrong, sure = page.of(f"train/{ODD[0]}/1.png"), page.of("train/plain/1.png")
    assert (wrong["label"], wrong["predicted"], wrong["probability"]) == (ODD[0], "plain", 0.75)
    assert wrong["loss"] == pytest.approx(-math.log(0.25), rel=1e-5)
    assert (sure["label"], sure["predicted"]) == ("plain", ODD[0])
    assert 87 < sure["loss"] < 105  # a float32 of 0 is below 1e-38, and above nothing
    new = page.of("test/é'.png")
    assert (new["label"], new["predicted"], new["probability"], new["loss"]) == (None, ODD[1], 0.7, None)
    flagged = page.of("train/plain/0.png")
    assert (flagged["issue"], flagged["label_score"]) == (["extreme_size", "label", "near_duplicate"], 0.125)
    assert (flagged["near_duplicate_score"], flagged["near_duplicate_sets"]) == (0.5, ["a; b"])
    assert flagged["split"] == "val"
    for path in ("test/none.png", "test/sure.png"):  # diverged; not in the file
        assert {page.of(path)[key] for key in ("predicted", "probability", "loss")} == {None}


def test_sizes_and_reasons(page: Page) -> None:
    assert page.of("train/plain/2.png")["sizes"] == [[200, 400], [80, 160]]
    assert page.of(f"train/{ODD[0]}/2.png")["sizes"] == [[56, 40], [56, 40]]
    unread = page.of("test/half.png")
    assert (unread["sizes"], unread["reason"]) == (None, "not an image")
    assert page.of("test/sure.png")["reason"] is None


def test_no_name_ends_a_script_and_the_policy_allows_the_one(page: Page) -> None:
    assert len(page.scripts) == 2
    digest = base64.b64encode(hashlib.sha256(page.scripts[1][1].encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy.split(";"))
    assert rules == {
        "default-src": "'none'", "script-src": f"'sha256-{digest}'", "style-src": "'unsafe-inline'",
        "img-src": "'self' file: data:",
    }  # fmt: skip
    assert f"photos {ODD[1]}" in page.text
    assert not re.search(r"https?:|\bfetch\(|\bimport\b", page.scripts[1][1])


def test_views_are_those_of_the_runs_model(page: Page, tmp_path: Path) -> None:
    """By default 8 drawn ones of each of 6 images; symmetries come in mirrored pairs."""
    assert (len(page.uris), len({*page.uris})) == (48, 48)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "config.json").write_text('{"data": "synthetic:4"}')
    seen = {"image_size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}
    model = {"preprocessing": seen, "augment": "dihedral", "num_views": 2, "seed": 1}
    (tmp_path / "checkpoint" / "model.json").write_text(json.dumps(model))
    run = read_run(tmp_path)
    assert (run.data, run.seed) == ("synthetic:4", 1)
    write_page(tmp_path / "out", load_dataset(run.data, run.seed), run, title="drawn", seed=run.seed)
    shown = Page(tmp_path / "out" / "index.html")
    assert "--augment dihedral, 64 px" in shown.text
    assert len(shown.uris) == 2 * 2
    first, second = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))), float) for uri in shown.uris[:2]
    )
    assert first.shape == (64, 64, 3)
    assert abs(first[:, ::-1] - second).mean() < 3 < abs(first - second).mean()


def test_each_image_lies_in_the_cell_of_its_number(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (203, 3), dtype=np.uint8)
    for index, colour in enumerate(colours):
        file = tmp_path / "data" / ("train" if index < 103 else "test") / "ab"[index % 2] / f"{index:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 150) if index == 120 else (150, 300), tuple(colour.tolist())).save(file)
    (tmp_path / "data" / "test" / "a" / "150.png").write_bytes(b"")
    dataset = load_dataset(str(tmp_path / "data"), 0)
    splits = [dataset.train, dataset.val, dataset.test]
    sizes = [*write_sheets(tmp_path / "thumbnails", dataset, splits)]
    sheets = [np.asarray(Image.open(tmp_path / "thumbnails" / f"{number}.jpg"), dtype=int) for number in range(3)]
    assert [sheet.shape for sheet in sheets] == [(1600, 1600, 3), (1600, 1600, 3), (160, 1600, 3)]
    assert len([*(tmp_path / "thumbnails").iterdir()]) == 3
    for number, sample in enumerate(sample for split in splits for sample in split):
        index, cell = int(Path(sample.path).stem), number % 100
        top, left = cell // 10 * 160, cell % 10 * 160
        block = sheets[number // 100][top : top + 160, left : left + 160]
        width, height = {120: (160, 80), 150: (1, 1)}.get(index, (80, 160))
        if index == 150:
            assert str(sizes[number]) == "the file is empty"
        else:
            seen, of_thumbnail = sizes[number]
            assert seen.kept[["width", "height"]].item() == ((300, 150) if index == 120 else (150, 300))
            assert of_thumbnail == (width, height)
        # A decoder of JPEG smooths colours over one pixel of the next cell.
        assert abs(block[1 : height - 1, 1 : width - 1] - colours[index].astype(int)).max(initial=0) < 8
        assert abs(block[height + 16 : 159, 1:159] - 128).max(initial=0) < 8
        assert abs(block[1:159, width + 16 : 159] - 128).max(initial=0) < 8


@pytest.mark.parametrize(
    ("settings", "out"),
    [
        ({"run": "runs/a/"}, "runs/a/show"),
        ({"run": "s3://b/a?region=x"}, "s3://b/a/show?region=x"),
        ({"run": "runs/what?"}, "runs/what?/show"),
        ({"run": "runs/a", "out": "here"}, "here"),
        ({}, None),
    ],
)
def test_the_page_of_a_run_lies_in_it(settings: dict[str, str], out: str | None) -> None:
    assert ShowConfig(**settings).out == out


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "other"}'])
def test_what_is_no_run_is_refused(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text:
        (tmp_path / "config.json").write_text(text)
    assert show.main(["--run", str(tmp_path)]) == 2
    expected = f"plates show: --run {tmp_path}: holds no config.json of a run; give the directory of one\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "show").exists()
