"""The sweep: learning rate and StepLR by cross-validation, the winner retrained on all labelled images."""

import sys
from collections.abc import Sequence

from plates.config import EXIT_OK, EXIT_SOME_UNREADABLE, TuneConfig, run_job


def tune(config: TuneConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates import cluster, rundir
    from plates.checkpoint import Bundle, save_bundle
    from plates.dataset import check_dataset, load_dataset, merge_labelled
    from plates.device import decide_precision
    from plates.features import cache_root
    from plates.model import preprocessing_of, resolve_weights
    from plates.predict import predict, print_skipped, score_predictions, write_predictions
    from plates.preflight import check_nodes
    from plates.report import summary_table, write_report
    from plates.storage import remove_tree
    from plates.sweep import run_sweep
    from plates.sweep.scores import make_folds
    from plates.sweep.tuner import STATE_FOLDER
    from plates.timing import Phases, process_age_s, timing_table
    from plates.train_loop import draw_examples
    from plates.trainer import describe, make_task

    run = rundir.find_run(config.out, "tune", config)
    phases = Phases()
    with phases.measure("data"):
        dataset, skipped, digests = check_dataset(load_dataset(config.data, config.seed), config.skip_unreadable)
        dataset = merge_labelled(dataset)
    folds = make_folds(dataset.train, config)
    plan = cluster.plan_job(config.num_workers, config.device, config.cpus_per_worker, config.wait_for_nodes_s)
    best = check_nodes(plan, dataset, run, cache_root() if config.trainable == "head" else None)
    weights = resolve_weights(config.backbone, config.weights, config.seed, config.image_size)
    preprocessing = preprocessing_of(weights.backbone, config.image_size)
    precision = decide_precision(config.precision, weights.backbone, plan.device, best)
    task = make_task(config, dataset, digests, weights, preprocessing, precision, run)
    resolved = describe(task, plan) | {"num_images": {"train": len(dataset.train), "test": len(dataset.test)}}
    rundir.claim_run(run, "tune", config, resolved)
    print("\n".join([weights.reason, plan.line, *resolved["notes"]]), flush=True)

    phases.seconds["startup"] = process_age_s() - phases.seconds["data"]
    with phases.measure("fit"):
        swept = run_sweep(task, folds, plan)
    figures = swept.figures | {key: float(swept.history[key].iloc[-1]) for key in ("train/loss", "train/accuracy")}
    bundle = Bundle(weights.backbone, dataset.classes, preprocessing, swept.state, {**resolved, "metrics": figures})
    save_bundle(run / "checkpoint", bundle)

    with phases.measure("inference"):
        predictions = predict(bundle, dataset.source, dataset.test, plan, precision)
    figures |= score_predictions(predictions, dataset)
    timing = timing_table(phases, plan.num_workers, swept.timings, predictions.timings, len(dataset.test))
    rundir.write_csv(run / "trials.csv", swept.trials)
    rundir.write_csv(run / "history.csv", swept.history)
    rundir.write_csv(run / "history_baseline.csv", swept.baseline_history)
    write_predictions(run, predictions)
    rundir.write_results(run, figures, timing, [*skipped, *predictions.skipped])
    report = write_report(
        run, train_views=draw_examples(dataset, preprocessing, config.seed), read_image=dataset.read_picture
    )
    rundir.finish_run(run)
    remove_tree(run / STATE_FOLDER)
    print(f"{summary_table(run)}\nreport: {report}")
    print_skipped(predictions.skipped)
    return EXIT_SOME_UNREADABLE if skipped or predictions.skipped else EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(tune, TuneConfig, "plates tune", argv)


if __name__ == "__main__":
    sys.exit(main())
