"""The sweep: learning rate and StepLR by cross-validation, the winner retrained on all labelled images."""

import sys
from collections.abc import Sequence

from plates.command import run_job
from plates.config import TuneConfig


def tune(config: TuneConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates.checkpoint import Bundle, save_bundle
    from plates.dataset import check_dataset, load_dataset, merge_labelled
    from plates.job import LoadedData, finish, start, task_of
    from plates.storage import remove_tree
    from plates.sweep import run_sweep
    from plates.sweep.scores import make_folds
    from plates.sweep.tuner import STATE_FOLDER
    from plates.train_loop import draw_examples
    from plates.weights import resolve_weights

    def load_data() -> LoadedData:
        dataset, skipped = check_dataset(load_dataset(config.data, config.seed), config.skip_unreadable)
        merged = merge_labelled(dataset)
        make_folds(merged.train, config)  # refuses what cannot be folded before anything is started
        return merged, skipped

    started = start(
        "tune",
        config,
        config.trainable,
        load_data,
        lambda: resolve_weights(config.backbone, config.weights, config.seed, config.image_size),
    )
    dataset, task = started.dataset, task_of(started, config)
    swept = run_sweep(task, make_folds(dataset.train, config), started.plan)
    figures = swept.figures | {key: float(swept.history[key].iloc[-1]) for key in ("train/loss", "train/accuracy")}
    info = {**started.resolved, "metrics": figures}
    save_bundle(
        started.run / "checkpoint",
        Bundle(task.weights.backbone, dataset.classes, task.preprocessing, swept.state, info),
    )
    code = finish(
        started,
        swept.predicted,
        figures,
        tables={
            "trials.csv": swept.trials,
            "history.csv": swept.history,
            "history_baseline.csv": swept.baseline_history,
        },
        examples=draw_examples(dataset, task.preprocessing, config.seed),
    )
    remove_tree(started.run / STATE_FOLDER)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(tune, TuneConfig, "plates tune", argv)


if __name__ == "__main__":
    sys.exit(main())
