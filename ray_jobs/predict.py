"""Batch inference: predict a test split, or a plain folder of images, from a checkpoint alone."""

import sys
from dataclasses import replace
from functools import partial

from plates.address import start_ray_early
from plates.command import run_job
from plates.config import PredictConfig, UserError


def predict(config: PredictConfig) -> int:
    start_ray_early(config)
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates.checkpoint import load_bundle, rebuild_model
    from plates.dataset import load_test_split
    from plates.explain import why_no_map
    from plates.job import LoadedData, finish, start
    from plates.predict import UNSURE
    from plates.samples import Samples
    from plates.storage import place_of
    from plates.train_loop import predict as predict_on_worker
    from plates.trainer import run_loop

    bundle = load_bundle(place_of("--checkpoint", config.checkpoint))
    model = rebuild_model(bundle)  # refuses tensors that do not fit before anything is started
    if config.explain and (reason := why_no_map(model, bundle.preprocessing.image_size)):
        raise UserError(f"--explain: {reason}")
    if config.abstain_below is not None and UNSURE in bundle.classes:
        raise UserError(f"--abstain-below {config.abstain_below}: the checkpoint has a class that is called {UNSURE}")

    def load_data() -> LoadedData:
        dataset = load_test_split(config.data, bundle.info.get("seed", 0), bundle.classes)
        if dataset.classes and dataset.classes != bundle.classes:
            raise UserError(
                f"--checkpoint {config.checkpoint}: was trained on the classes {', '.join(bundle.classes)}; "
                f"--data {config.data} has {', '.join(dataset.classes)}"
            )
        if not dataset.test:
            raise UserError(f"--data {config.data}: has no test split with images to predict")
        return LoadedData(replace(dataset, classes=bundle.classes, train=Samples.of(), val=Samples.of()), [])

    started = start("predict", config, load_data, bundle)
    predicted = run_loop(partial(predict_on_worker, bundle), started.task, started.plan)
    return finish(started, predicted, {}, is_explained=config.explain, abstain_below=config.abstain_below)


main = partial(run_job, predict, PredictConfig, "plates predict")

if __name__ == "__main__":
    sys.exit(main())
