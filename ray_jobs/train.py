"""The main job: fine-tune a classifier on a data set, predict its test split, write a report."""

import sys
from functools import partial

from plates.address import start_ray_early
from plates.command import run_job
from plates.config import TrainConfig


def train(config: TrainConfig) -> int:
    start_ray_early(config)
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    import pandas as pd

    from plates.job import finish, load_labelled, start
    from plates.metrics import score
    from plates.timing import startup_and_pace
    from plates.train_loop import train as train_on_worker
    from plates.trainer import run_loop

    started = start("train", config, partial(load_labelled, config))
    task = started.task
    trained = run_loop(train_on_worker, task, started.plan)
    figures = {key: trained.history[-1][key] for key in ("train/loss", "train/accuracy")}
    figures |= trained.figures | score(trained.val_logits, task.dataset.val.labels, task.dataset.classes, "val")
    pace = startup_and_pace(started.phases, trained.timings)
    return finish(
        started,
        trained.predicted,
        figures,
        trained.state,
        val_logits=trained.val_logits,
        tables={"history.csv": pd.DataFrame(trained.history)},
        described={"has_reused_features": trained.has_reused_features, "timing": pace},
    )


main = partial(run_job, train, TrainConfig, "plates train")

if __name__ == "__main__":
    sys.exit(main())
