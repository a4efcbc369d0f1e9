"""The sweep: what the head sees and how it is trained, by cross-validation; the winner on all labelled images."""

import sys
from dataclasses import replace
from functools import partial

from plates.address import start_ray_early
from plates.command import run_job
from plates.config import TuneConfig


def tune(config: TuneConfig) -> int:
    start_ray_early(config)
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates.dataset import merge_labelled
    from plates.job import LoadedData, finish, load_labelled, start
    from plates.storage import remove_tree
    from plates.sweep import run_sweep
    from plates.sweep.scores import make_folds
    from plates.sweep.tuner import STATE_FOLDER

    def load_data() -> LoadedData:
        loaded = load_labelled(config, merge_labelled)
        make_folds(loaded.dataset.train, config)  # refuses what cannot be folded before anything is started
        return loaded

    started = start("tune", config, load_data)
    task = started.task
    swept = run_sweep(task, make_folds(task.dataset.train, config), started.plan)
    figures = swept.figures | {key: float(swept.history[key].iloc[-1]) for key in ("train/loss", "train/accuracy")}
    histories = {"history.csv": swept.history, "history_baseline.csv": swept.baseline_history}
    tables = {"trials.csv": swept.trials, **histories, **swept.tables}
    described = swept.described | {"notes": started.resolved["notes"] + swept.notes}
    won = replace(started, task=swept.task, resolved=started.resolved | described)
    code = finish(won, swept.predicted, figures, swept.state, tables=tables, described=described)
    remove_tree(task.run / STATE_FOLDER)
    return code


main = partial(run_job, tune, TuneConfig, "plates tune")

if __name__ == "__main__":
    sys.exit(main())
