"""Run directories that a report is made of, without the run."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from plates.report import write_report


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
