"""Batch inference: predict a test split, or a plain folder of images, from a checkpoint alone."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from plates.command import run_job
from plates.config import PredictConfig, TrainConfig, UserError


def run_prediction(config: PredictConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates.checkpoint import load_bundle, rebuild_model
    from plates.dataset import Samples, load_test_split
    from plates.job import LoadedData, finish, start
    from plates.model import Weights
    from plates.storage import place_of
    from plates.train_loop import predict as predict_on_worker
    from plates.trainer import make_task, run_loop

    bundle = load_bundle(place_of("--checkpoint", config.checkpoint))
    rebuild_model(bundle)  # refuses tensors that do not fit before anything is started
    info = bundle.info
    trained = TrainConfig(data=config.data, seed=info.get("seed", 0), trainable=info.get("trainable", "all"))

    def load_data() -> LoadedData:
        dataset = load_test_split(config.data, trained.seed)
        if dataset.classes and dataset.classes != bundle.classes:
            raise UserError(
                f"--checkpoint {config.checkpoint}: was trained on the classes {', '.join(bundle.classes)}; "
                f"--data {config.data} has {', '.join(dataset.classes)}"
            )
        if not dataset.test:
            raise UserError(f"--data {config.data}: has no test/ folder with images to predict")
        return replace(dataset, classes=bundle.classes, train=Samples.of(), val=Samples.of()), []

    started = start(
        "predict",
        config,
        trained.trainable,
        load_data,
        lambda: Weights(bundle.backbone, {}, info.get("weights_source", ""), info.get("backbone_reason", "")),
    )
    task = make_task(trained, started.dataset, started.weights, bundle.preprocessing, started.precision, started.run)
    predicted = run_loop(partial(predict_on_worker, bundle), task, started.plan)
    return finish(started, predicted, {})


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(run_prediction, PredictConfig, "plates predict", argv)


if __name__ == "__main__":
    sys.exit(main())
