"""The page of all images in a real browser, from a file, without a server."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import write_picture

from plates.dataset import load_dataset
from plates.show import write_page
from ray_jobs import show

sync_api = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ODD = 'a "b" <i>&\'ü'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab whose console stays empty: a script's mistake, a file that is missing, or a breach of the policy would
    be told there."""
    tab, told = browser.new_page(viewport={"width": 1280, "height": 800}), []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    yield tab
    tab.close()
    assert told == []


def paths(tab: Any) -> list[str]:
    """Of the tiles, as they lie on the page."""
    tiles = tab.locator(".tile").evaluate_all(
        "tiles => tiles.map(tile => [Number(tile.dataset.position), tile.title])"
    )
    return [path for _, path in sorted(tiles)]


def status(tab: Any) -> str:
    return tab.locator("#status").text_content()


def select(tab: Any, label: str, option: str) -> None:
    tab.get_by_label(label, exact=True).select_option(label=option)


@pytest.fixture(scope="module")
def page_of_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the job: 4 + 4 labelled pictures, one of them wrongly predicted and one flagged, and 3 others; of these one
    cannot be read."""
    root = tmp_path_factory.mktemp("show")
    data, run = root / "my data", root / "run"
    for index in range(4):
        write_picture(data / "train" / ODD / f"{index}.png", index, 40 + 8 * index, 200)
        write_picture(data / "train" / "plain" / f"{index}.png", 9 + index, 80 + 8 * index, 56)
    for index in range(2):
        write_picture(data / "test" / f"new #{index}%.png", 20 + index)
    (data / "test" / "half.png").write_bytes(b"half")
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"data": str(data), "status": "finished"}))
    labelled = [(f"train/{name}/{index}.png", name) for name in (ODD, "plain") for index in range(4)]
    chances = [0.9, 0.2, 0.8, 0.7, 0.1, 0.3, 0.4, 0.45]  # of the odd class: the second is wrong
    table = pd.DataFrame(labelled, columns=["path", "label"])
    table.assign(**{f"p_{ODD}": chances, "p_plain": [1 - chance for chance in chances]}).to_csv(
        run / "out_of_fold.csv", index=False
    )
    flagged = {"path": "train/plain/2.png", "split": "train", "issue": "near_duplicate"}
    flagged |= {
        "label_score": None,
        "predicted_label": None,
        "near_duplicate_score": 0.25,
        "near_duplicate_sets": "a",
    }
    pd.DataFrame([flagged]).to_csv(run / "data_issues.csv", index=False)
    assert show.main(["--run", str(run)]) == 3
    assert show.main(["--run", str(run)]) == 2  # it is finished
    return run / "show" / "index.html"


def test_a_person_finds_what_is_wrong(page_of_run: Path, tab: Any) -> None:
    tab.goto(page_of_run.as_uri())
    assert status(tab) == "11 of 11 images"
    assert tab.locator("#grid h2").all_text_contents() == ["wrong (1)", "right (7)", "not predicted (3)"]
    wrong = f"train/{ODD}/1.png"
    assert paths(tab)[:4] == [wrong, "train/plain/3.png", "train/plain/2.png", f"train/{ODD}/3.png"]
    assert tab.locator(".wrong").count() == 1
    assert "not an image" in tab.locator(".unread").text_content()

    tab.get_by_label("Search path or class").fill("PLAIN/")
    assert paths(tab) == [f"train/plain/{index}.png" for index in (3, 2, 1, 0)]
    tab.get_by_label("Search path or class").fill("<i> 1.png")
    assert paths(tab) == [wrong]
    tab.get_by_label("Search path or class").fill("")
    for option, expected in [
        ("wrong", [wrong]), ("issue: near_duplicate", ["train/plain/2.png"]),
        ("issue: unreadable", ["test/half.png"]), ("unreadable", ["test/half.png"]),
    ]:  # fmt: skip
        select(tab, "Show", option)
        assert paths(tab) == expected
    select(tab, "Show", "all")
    select(tab, "Split", "val")
    assert {*paths(tab)} == {f"train/{ODD}/0.png", "train/plain/0.png"}
    select(tab, "Split", "all")
    select(tab, "Class", "plain")
    select(tab, "Predicted", ODD)
    assert paths(tab) == []
    select(tab, "Predicted", "all")
    assert len(paths(tab)) == 4
    select(tab, "Class", "all")


def test_every_order(page_of_run: Path, tab: Any) -> None:
    tab.goto(page_of_run.as_uri())
    select(tab, "Order", "path")
    assert paths(tab) == sorted(paths(tab))
    select(tab, "Order", "probability, lowest first")
    plain = [f"train/plain/{index}.png" for index in range(4)]
    odd = [f"train/{ODD}/{index}.png" for index in range(4)]
    assert paths(tab)[:8] == [plain[3], plain[2], odd[3], plain[1], odd[1], odd[2], odd[0], plain[0]]
    select(tab, "Order", "loss, highest first")
    assert paths(tab)[:2] == [odd[1], plain[3]]
    assert tab.locator(".tile").first.locator(".figure").text_content() == "1.609"  # -ln 0.2
    select(tab, "Order", "pixels, highest first")
    assert paths(tab)[:4] == odd[::-1]
    assert paths(tab)[-1] == "test/half.png"  # of which it is not known
    select(tab, "Order", "near_duplicate_score, lowest first")
    assert paths(tab)[0] == plain[2]
    tab.set_viewport_size({"width": 1280, "height": 2400})  # all of it in sight
    select(tab, "Order", "split and class")
    headings = ["train: " + ODD + " (3)", "train: plain (3)", "val: " + ODD + " (1)", "val: plain (1)"]
    assert tab.locator("#grid h2").all_text_contents() == [*headings, "test: no class known (3)"]


def test_an_image_is_enlarged_and_the_keyboard_does_it_all(page_of_run: Path, tab: Any) -> None:
    tab.goto(page_of_run.as_uri())
    select(tab, "Order", "path")
    dialog, title = tab.locator("dialog"), tab.locator("#title")
    tab.locator(".tile").nth(1).click()
    assert dialog.is_visible()
    assert title.text_content() == "test/new #0%.png"
    original = tab.locator("#original")
    original.evaluate("image => image.decode()")
    assert original.evaluate("image => image.naturalWidth") == 56  # the file itself, not a cut
    assert original.get_attribute("alt") == "test/new #0%.png, no class known"
    tab.keyboard.press("ArrowLeft")
    assert title.text_content() == "test/half.png"
    assert tab.locator("#reason").text_content() == "not an image"
    assert not original.is_visible()
    tab.keyboard.press("ArrowLeft")  # there is none before
    for _ in range(4):
        tab.keyboard.press("ArrowRight")
    assert title.text_content() == f"train/{ODD}/1.png"
    assert re.search("predicted.*plain, wrong.*loss.*1.609", tab.locator("#facts").text_content())
    tab.keyboard.press("Escape")
    assert not dialog.is_visible()
    focused = "document.activeElement.title"
    assert tab.evaluate(focused) == f"train/{ODD}/1.png"
    tab.keyboard.press("Home")
    assert tab.evaluate(focused) == "test/half.png"
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    below = tab.locator(".tile").evaluate_all(
        "tiles => tiles.filter(tile => tile.style.top === tiles[0].style.top).length"
    )
    assert tab.evaluate("Number(document.activeElement.dataset.position)") == below - 1
    tab.keyboard.press("End")
    assert tab.evaluate(focused) == "train/plain/3.png"
    tab.keyboard.press("Enter")
    assert title.text_content() == "train/plain/3.png"
    tab.get_by_label("Close").click()
    assert not dialog.is_visible()


def test_drawn_plates_are_enlarged_from_their_thumbnails(tmp_path: Path, tab: Any) -> None:
    assert show.main(["--data", "synthetic:4", "--out", str(tmp_path / "out")]) == 0
    tab.goto((tmp_path / "out" / "index.html").as_uri())
    assert status(tab) == "8 of 8 images"
    assert not tab.get_by_label("Predicted", exact=True).is_visible()
    tab.locator(".tile").first.click()
    box = tab.locator("#scaled").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(160 / 120, abs=0.02)
    assert box["height"] > 300
    tab.keyboard.press("Escape")


def test_of_ten_thousand_images_few_are_on_the_page(tmp_path: Path, tab: Any) -> None:
    write_picture(tmp_path / "one.png", 0, 8, 8)
    for index in range(10_000):
        file = tmp_path / "data" / "train" / "ab"[index % 2] / f"{index:05}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "one.png", file)
    write_page(tmp_path / "out", load_dataset(str(tmp_path / "data"), 0), None, title="many", seed=0)
    asked: list[int] = []
    tab.on("request", lambda request: asked.extend(int(n) for n in re.findall(r"thumbnails/(\d+)\.jpg", request.url)))
    tab.goto((tmp_path / "out" / "index.html").as_uri(), wait_until="networkidle")
    assert status(tab) == "10000 of 10000 images"
    assert {*asked} == {0}
    assert 0 < tab.locator(".tile").count() < 100
    last = paths(tab)
    tab.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    tab.locator(".tile[data-position='9999']").wait_for()
    tab.wait_for_load_state("networkidle")
    assert 0 < tab.locator(".tile").count() < 100
    assert paths(tab)[-1] != last[-1]
    assert {0, 99} <= {*asked} <= {0, 97, 98, 99}
    tab.locator(".tile").last.focus()
    tab.keyboard.press("Home")
    assert tab.evaluate("[scrollY < 300, document.activeElement.dataset.position]") == [True, "0"]
