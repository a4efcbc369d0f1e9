"""What jobs share: how a run starts, and how it writes its results, reports and finishes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from plates import rundir
from plates.cluster import Plan, plan_job
from plates.config import EXIT_OK, EXIT_SOME_UNREADABLE, PredictConfig, TrainConfig
from plates.dataset import Dataset, Skipped
from plates.device import decide_precision
from plates.features import cache_root
from plates.model import Weights, preprocessing_of
from plates.predict import print_skipped, tabulate_predictions, write_predictions
from plates.preflight import check_nodes
from plates.report import summary_table, write_report
from plates.storage import Place
from plates.timing import Phases, process_age_s, timing_table
from plates.train_loop.task import Predicted, Task
from plates.trainer import make_task

LoadedData = tuple[Dataset, list[Skipped]]  # as `check_dataset` returns it


@dataclass(frozen=True)
class Started:
    """A run with its directory, data, weights, and place to run; `resolved` is what its settings came to."""

    run: Place
    dataset: Dataset
    skipped: list[Skipped]
    plan: Plan
    weights: Weights
    precision: str
    resolved: dict[str, Any]
    phases: Phases


def start(
    job: str,
    config: TrainConfig | PredictConfig,
    trainable: str,
    load_data: Callable[[], LoadedData],
    find_weights: Callable[[], Weights],
) -> Started:
    """Finds all that a run needs, tries every node that it may run on, and only then claims the directory.

    Args:
        trainable: the part of the model that is trained, or was.

    Raises: UserError for what the user must mend.
    """
    run, phases = rundir.find_run(config.out, job, config), Phases()
    with phases.measure("data"):
        dataset, skipped = load_data()
    phases.seconds["process"] = process_age_s() - phases.seconds["data"]
    with phases.measure("ray"):
        plan = plan_job(config.num_workers, config.device, config.cpus_per_worker, config.wait_for_nodes_s)
    best = check_nodes(plan, dataset, run, cache_root() if trainable == "head" else None)
    weights = find_weights()
    precision = decide_precision(config.precision, weights.backbone, plan.device, best)
    val = () if dataset.val is dataset.train else dataset.val  # a sweep has all labelled images in both
    splits = {"train": dataset.train, "val": val, "test": dataset.test}
    resolved = {
        "backbone": weights.backbone,
        "backbone_reason": weights.reason,
        "weights_source": weights.source,
        "num_workers": plan.num_workers,
        "device": plan.device,
        "precision": precision,
        "threads_per_worker": None if plan.uses_whole_nodes else plan.cpus_per_worker,
        "plan": plan.line,
        "classes": list(dataset.classes),
        "num_images": {split: len(samples) for split, samples in splits.items() if samples},
        "versions": rundir.versions(),
        "notes": [] if dataset.test else ["The data set has no test split: nothing was predicted."],
    }
    if isinstance(config, TrainConfig):
        resolved |= {"seed": config.seed, "trainable": trainable, "num_views": config.num_views or config.epochs}
    rundir.claim_run(run, job, config, resolved)
    print("\n".join(filter(None, [weights.reason, plan.line, *resolved["notes"]])), flush=True)
    phases.seconds["startup"] = process_age_s() - phases.seconds["data"]
    return Started(run, dataset, skipped, plan, weights, precision, resolved, phases)


def task_of(started: Started, config: TrainConfig) -> Task:
    """What the workers of a run are told."""
    preprocessing = preprocessing_of(started.weights.backbone, config.image_size)
    return make_task(config, started.dataset, started.weights, preprocessing, started.precision, started.run)


def finish(
    started: Started,
    predicted: Predicted,
    figures: dict[str, float | int],
    *,
    tables: dict[str, pd.DataFrame] | None = None,
    examples: list[tuple[np.ndarray, str]] | None = None,
    described: dict[str, Any] | None = None,
) -> int:
    """Writes predictions, results and report, and marks the run as finished; returns the exit code.

    Args:
        tables: of this job alone, by file name.
        examples: training views for the report, each with its class.
        described: more for config.json.
    """
    run, dataset, phases = started.run, started.dataset, started.phases
    predictions = tabulate_predictions(predicted, dataset)
    skipped = [*started.skipped, *predictions.skipped]
    timing = timing_table(phases, started.plan.num_workers, predicted.timings, len(dataset.test))
    for name, table in (tables or {}).items():
        rundir.write_csv(run / name, table)
    write_predictions(run, predictions)
    rundir.write_results(run, figures | predictions.figures, timing, skipped)
    rundir.update_config(run, **(described or {}))
    report = write_report(run, train_views=examples or [], read_image=dataset.read_picture)
    rundir.finish_run(run)
    print(f"{summary_table(run)}\nreport: {report}")
    print_skipped(predictions.skipped)
    return EXIT_SOME_UNREADABLE if skipped else EXIT_OK
