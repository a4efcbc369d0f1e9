"""What jobs share: how a run starts, and how it writes its results, reports and finishes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pandas as pd
from torch import Tensor

from plates import rundir
from plates.backbones import OWN_READOUT
from plates.balance import weigh_classes
from plates.checkpoint import Bundle, save_bundle
from plates.cluster import Plan, plan_job
from plates.config import EXIT_OK, EXIT_SOME_UNREADABLE, PredictConfig, TrainConfig, UserError
from plates.data_issues import drop_duplicates, find_issues, find_near
from plates.dataset import Dataset, Seen, Skipped, check_dataset, count_classes, load_dataset, look_over
from plates.device import decide_precision
from plates.model import Weights, assemble, preprocessing_of
from plates.predict import explain, list_answers, print_skipped, tabulate_predictions, write_predictions
from plates.preflight import check_nodes
from plates.reference import spread_evenly
from plates.report import summary_table, write_report
from plates.report.card import write_card
from plates.report.explained import FOLDER
from plates.storage import cache_root
from plates.store import limit_size
from plates.timing import Phases, process_age_s, timing_table
from plates.tracking import check_tracker, log_run
from plates.train_loop import draw_examples
from plates.train_loop.task import Predicted, Task
from plates.trainer import make_task
from plates.weights import resolve_weights


@dataclass(frozen=True)
class LoadedData:
    """What a run works on, and what its check found: images that cannot be read, what was seen by split, and the
    rows of data_issues.csv of what was dropped."""

    dataset: Dataset
    skipped: list[Skipped]
    seen: dict[str, Seen] = field(default_factory=dict)
    dropped: pd.DataFrame | None = None


@dataclass(frozen=True)
class Started:
    """A run with its directory: its task, and the workers for it; `resolved` is what its settings came to, `told`
    what was said of its data, and `bundle` the model to predict with, None where one is trained."""

    task: Task
    plan: Plan
    loaded: LoadedData
    told: list[str]
    resolved: dict[str, Any]
    phases: Phases
    bundle: Bundle | None


def start(
    job: str, config: TrainConfig | PredictConfig, load_data: Callable[[], LoadedData], bundle: Bundle | None = None
) -> Started:
    """Finds all that a run needs, tries every node that it may run on, and only then claims the directory.

    Args:
        bundle: the model to predict with; None where one is trained.

    Raises: UserError for what the user must mend.
    """
    info = bundle.info if bundle else {}
    training = settings_of(bundle, cast(PredictConfig, config)) if bundle else cast(TrainConfig, config)
    run, phases = rundir.find_run(config.out, job, config), Phases()
    check_tracker(training.log_to)
    with phases.measure("data"):
        loaded = load_data()
        dataset = loaded.dataset
        told = find_issues(dataset, loaded.seen, loaded.skipped, loaded.dropped).lines if loaded.seen else []
    class_weights = weigh_classes(training.class_weights, dataset)  # refuses a class that there is not
    plan = plan_job(config.num_workers, config.device, config.cpus_per_worker, config.wait_for_nodes_s)
    phases.seconds["process"] = process_age_s() - phases.seconds["data"]
    best = check_nodes(plan, dataset, run, cache_root() if training.trainable == "head" else None)
    if bundle:
        weights = Weights(bundle.backbone, {}, info.get("weights_source", ""), info.get("backbone_reason", ""))
        preprocessing = bundle.preprocessing
    else:
        weights = resolve_weights(training.backbone, training.weights, training.seed, training.image_size)
        preprocessing = preprocessing_of(weights.backbone, training.image_size, training.crop, training.resize)
        check_readout(training, weights.backbone)
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
        "seed": training.seed,  # of drawn plates, also where they are predicted from a checkpoint
        "crop": preprocessing.crop,
        "threads_per_worker": None if plan.uses_whole_nodes else plan.cpus_per_worker,
        "plan": plan.line,
        "classes": list(dataset.classes),
        "num_images": {split: len(samples) for split, samples in splits.items() if samples},
        "versions": rundir.versions(),
        "notes": [] if dataset.test else ["The data set has no test split: nothing was predicted."],
    }
    if not bundle:
        resolved |= {
            **{name: getattr(training, name) for name in ("trainable", "head", "readout", "augment", "tta")},
            "num_views": len(training.train_views),
            "weights_license": weights.license,
            "num_train_by_class": count_classes(dataset.train, dataset.classes),
            "num_val_by_class": count_classes(val, dataset.classes) if val else None,
        }
    if training.class_weights != "none":
        resolved["class_weights"] = dict(zip(dataset.classes, class_weights, strict=True))
    rundir.claim_run(run, job, config, resolved)
    said = [dataset.left_out, weights.reason, plan.line, *resolved["notes"], *told]
    print("\n".join(filter(None, said)), flush=True)
    phases.seconds["startup"] = process_age_s() - phases.seconds["data"]
    task = make_task(training, dataset, weights, preprocessing, precision, run)
    return Started(task, plan, loaded, told, resolved, phases, bundle)


def load_labelled(config: TrainConfig, prepare: Callable[[Dataset], Dataset] = lambda dataset: dataset) -> LoadedData:
    """The data set of a training run, checked, prepared and, where that is asked for, without duplicates; only for
    them is the test split looked at before the workers do. Raises: UserError for what the user must mend."""
    listed, seen = load_dataset(config.data, config.seed), {}
    dataset, skipped = check_dataset(listed, config.skip_unreadable, seen)
    dataset, dropped = prepare(dataset), None
    if config.drop_duplicates:
        seen |= look_over({"test": dataset.test}, dataset.source.check)[0]
        dataset, dropped = drop_duplicates(dataset, seen)
    return LoadedData(dataset, skipped, seen, dropped)


def settings_of(bundle: Bundle, config: PredictConfig) -> TrainConfig:
    """What of a training run's settings its predictions follow from. Raises: UserError for too many views."""
    known = {"seed": 0, "trainable": "all", "readout": OWN_READOUT, "augment": "crop", "tta": 1}
    settings = {name: bundle.info.get(name, value) for name, value in known.items()}
    settings |= {"data": config.data, "cache_gb": config.cache_gb, "tta": config.tta or settings["tta"]}
    return TrainConfig(**settings)


def check_readout(config: TrainConfig, backbone: str) -> None:
    """Raises: UserError where the backbone has no such readout."""
    if config.readout != OWN_READOUT:
        try:
            assemble(backbone, 2, config.image_size, config.readout)
        except ValueError as error:
            raise UserError(f"--readout {config.readout}: {error}") from error


def finish(
    started: Started,
    predicted: Predicted,
    figures: dict[str, float | int],
    state: dict[str, Tensor] | None = None,
    *,
    val_logits: Tensor | None = None,
    is_explained: bool = True,
    abstain_below: float | None = None,
    tables: dict[str, pd.DataFrame] | None = None,
    described: dict[str, Any] | None = None,
) -> int:
    """Writes checkpoint, predictions, results and report, and marks the run as finished; returns the exit code.

    Args:
        state: of the model that was trained.
        val_logits: (M, C) of the validation split, where there is one.
        is_explained: whether to show what decided; of a model to predict with, in files, too.
        abstain_below: as `tabulate_predictions` has it.
        tables: of this job alone, by file name.
        described: more for config.json.
    """
    task, phases = started.task, started.phases
    run, dataset = task.run, task.dataset
    bundle, examples = started.bundle, []
    if state:
        info = {**started.resolved, "metrics": figures}
        bundle = Bundle(task.weights.backbone, dataset.classes, task.preprocessing, state, info, predicted.reference)
        save_bundle(run / "checkpoint", bundle)
        examples = draw_examples(task)
    predictions = tabulate_predictions(predicted, dataset, abstain_below)
    explained = None
    if bundle and is_explained:
        answers = [predictions.answers]
        answers += [list_answers(dataset.val, val_logits, dataset.classes)] if val_logits is not None else []
        folder = run / FOLDER if started.bundle else None
        explained = explain(task, bundle, pd.concat(answers, ignore_index=True), folder)
    skipped = [*started.loaded.skipped, *predictions.skipped]
    if started.loaded.seen:
        write_issues(started, predicted, skipped, (tables or {}).get("out_of_fold.csv"))
    timing = timing_table(phases, started.plan.num_workers, predicted.timings, len(dataset.test))
    for name, table in (tables or {}).items():
        rundir.write_csv(run / name, table)
    write_predictions(run, predictions)
    rundir.write_results(run, figures | predictions.figures, timing, skipped)
    rundir.update_config(run, **(described or {}))
    if state:
        write_card(run)
    report = write_report(run, train_views=examples, read_image=dataset.read_picture, explained=explained)
    if task.config.log_to:
        log_run(run, task.config.log_to)
    limit_size(task.cache_root / "features", task.config.cache_gb * 1e9)
    rundir.finish_run(run)
    print(f"{summary_table(run)}\nreport: {report}")
    print_skipped(predictions.skipped)
    return EXIT_SOME_UNREADABLE if skipped else EXIT_OK


def write_issues(
    started: Started, predicted: Predicted, skipped: list[Skipped], out_of_fold: pd.DataFrame | None
) -> None:
    """data_issues.csv, now that the test split was seen, too; tells what was not told at the start."""
    loaded, seen, dataset = started.loaded, dict(started.loaded.seen), started.task.dataset
    if predicted.seen and "test" not in seen:
        seen["test"] = predicted.seen
    near = None
    if "test" in seen and predicted.compared is not None:
        known = dataset.train.take(spread_evenly(len(dataset.train)))
        near = find_near(seen["test"], predicted.compared[:, 1:].numpy(), known)
    found = find_issues(dataset, seen, skipped, loaded.dropped, out_of_fold, near)
    rundir.write_data_check(started.task.run, found.table, found.counts, found.lines)
    new = [line for line in found.lines[1:] if line not in started.told]
    print(*new, sep="\n", end="\n" * bool(new))
