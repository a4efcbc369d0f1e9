from typing import Any

import pytest

from plates import timing
from plates.timing import NUM_WARM_UP_IMAGES, Pace, Phases, startup_and_pace, timing_table


def trained(rank: int, node: str, num_images: int | None = 100, train_s: float = 10.0) -> dict[str, Any]:
    return {"rank": rank, "node": node, "device": "cpu", "device_name": "CPU", "startup_s": 1.0 + rank, "data_s": 0.5,
            "train_s": train_s, "inference_s": 2.0 + rank, "train_images_per_sec": 1.0,
            "inference_images_per_sec": 4.0, "num_train_images": num_images}  # fmt: skip


def test_the_run_takes_as_long_as_its_slowest_worker():
    driver = Phases()
    driver.seconds.update(startup=4.0, data=1.0)
    table = timing_table(driver, 2, [trained(0, "a", train_s=20.0), trained(1, "b")], num_predicted=32)
    whole = table.iloc[0]
    assert (whole["train_s"], whole["inference_s"], whole["data_s"]) == (20.0, 3.0, 1.5)
    assert whole["startup_s"] == 4.0 + 2.0, "until the last of them is there"
    assert whole["inference_images_per_sec"] == pytest.approx(32 / 3.0)
    assert table["rank"].tolist()[1:] == [0, 1]


def test_the_rate_of_a_run_is_of_the_images_that_its_workers_computed():
    """As after a cut: one had a tenth of its epochs left."""
    table = timing_table(Phases(), 2, [trained(0, "a", 30, 10.0), trained(1, "a", 20, 5.0)], num_predicted=0)
    assert table["train_images_per_sec"].tolist()[0] == pytest.approx(5.0)
    assert "num_train_images" not in table


def test_seconds_that_hold_the_trials_of_a_sweep_give_no_rate():
    table = timing_table(Phases(), 2, [trained(0, "a", None, 10.0), trained(1, "a")], num_predicted=0)
    assert table["train_images_per_sec"].isna().tolist() == [True, False, False]


@pytest.mark.parametrize("batch", [1, 32, 34, 256])
def test_the_steady_rate_leaves_out_the_batches_of_the_warm_up(monkeypatch, batch):
    """Batches take 5 s each until the first images are through, and then run at 100 images/s."""
    now_s, pace = 0.0, Pace()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now_s)
    for _ in range(1000):
        now_s += 5.0 if pace.num_images < NUM_WARM_UP_IMAGES else batch / 100
        pace.count(batch)
    assert pace.steady_rate() == pytest.approx(100.0)


def test_too_few_images_have_no_steady_rate():
    pace = Pace()
    assert pace.steady_rate() is None
    for _ in range(2 * NUM_WARM_UP_IMAGES - 1):
        pace.count(1)
    assert pace.steady_rate() is None
    pace.count(1)
    assert pace.steady_rate() is not None


def test_the_parts_of_startup_and_the_rate_of_all_workers():
    driver = Phases()
    driver.seconds.update(process=8.0)
    rows = [{"startup_s": 9.0, "steady_images_per_sec": 40.0}, {"startup_s": 11.0, "steady_images_per_sec": 38.0}]
    assert startup_and_pace(driver, rows) == {
        "startup_process_s": 8.0, "startup_group_s": 11.0, "steady_images_per_sec": 78.0,
    }  # fmt: skip
    unknown = {"startup_s": 1.0, "steady_images_per_sec": None}
    assert startup_and_pace(driver, [*rows, unknown])["steady_images_per_sec"] is None
