"""Batch inference: predict a test split, or a plain folder of images, from a checkpoint alone."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from plates.command import run_job
from plates.config import PredictConfig, UserError


def run_prediction(config: PredictConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates.checkpoint import load_bundle
    from plates.dataset import load_test_split
    from plates.job import LoadedData, finish, start
    from plates.model import Weights
    from plates.storage import place_of

    bundle = load_bundle(place_of("--checkpoint", config.checkpoint))
    info = bundle.info

    def load_data() -> LoadedData:
        dataset = load_test_split(config.data, info.get("seed", 0))
        if dataset.classes and dataset.classes != bundle.classes:
            raise UserError(
                f"--checkpoint {config.checkpoint}: was trained on the classes {', '.join(bundle.classes)}; "
                f"--data {config.data} has {', '.join(dataset.classes)}"
            )
        if not dataset.test:
            raise UserError(f"--data {config.data}: has no test/ folder with images to predict")
        return replace(dataset, classes=bundle.classes, train=(), val=()), [], {}

    started = start(
        "predict",
        config,
        load_data,
        lambda: Weights(bundle.backbone, {}, info.get("weights_source", ""), info.get("backbone_reason", "")),
    )
    return finish(started, bundle, {})


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(run_prediction, PredictConfig, "plates predict", argv)


if __name__ == "__main__":
    sys.exit(main())
