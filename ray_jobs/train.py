"""The main job: fine-tune a classifier on a data set, predict its test split, write a report."""

import sys
from collections.abc import Sequence

from plates.command import run_job
from plates.config import TrainConfig


def train(config: TrainConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    import pandas as pd

    from plates.checkpoint import Bundle, save_bundle
    from plates.dataset import check_dataset, load_dataset
    from plates.job import finish, start, task_of
    from plates.metrics import score
    from plates.timing import startup_and_pace
    from plates.train_loop import draw_examples
    from plates.train_loop import train as train_on_worker
    from plates.trainer import run_loop
    from plates.weights import resolve_weights

    started = start(
        "train",
        config,
        config.trainable,
        lambda: check_dataset(load_dataset(config.data, config.seed), config.skip_unreadable),
        lambda: resolve_weights(config.backbone, config.weights, config.seed, config.image_size),
    )
    dataset, task = started.dataset, task_of(started, config)
    trained = run_loop(train_on_worker, task, started.plan)
    figures = {key: trained.history[-1][key] for key in ("train/loss", "train/accuracy")}
    if task.precision == "fp16":
        figures["train/num_skipped_steps"] = trained.num_skipped_steps
    figures |= score(trained.val_logits, dataset.val.labels, dataset.classes, "val")
    info = {**started.resolved, "metrics": figures}
    save_bundle(
        started.run / "checkpoint",
        Bundle(task.weights.backbone, dataset.classes, task.preprocessing, trained.state, info),
    )
    return finish(
        started,
        trained.predicted,
        figures,
        tables={"history.csv": pd.DataFrame(trained.history)},
        examples=draw_examples(dataset, task.preprocessing, config.seed),
        described={
            "has_reused_features": trained.has_reused_features,
            "timing": startup_and_pace(started.phases, trained.timings),
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(train, TrainConfig, "plates train", argv)


if __name__ == "__main__":
    sys.exit(main())
