"""The main job: fine-tune a classifier on a data set, predict its test split, write a report."""

import sys
from collections.abc import Sequence

from plates.config import EXIT_OK, EXIT_SOME_UNREADABLE, TrainConfig, run_job


def train(config: TrainConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    import pandas as pd

    from plates import cluster, rundir
    from plates.checkpoint import Bundle, save_bundle
    from plates.dataset import check_dataset, load_dataset
    from plates.device import decide_precision
    from plates.features import cache_root
    from plates.metrics import score
    from plates.model import preprocessing_of, resolve_weights
    from plates.predict import predict, print_skipped, score_predictions, write_predictions
    from plates.preflight import check_nodes
    from plates.report import summary_table, write_report
    from plates.timing import Phases, process_age_s, startup_and_pace, timing_table
    from plates.train_loop import draw_examples
    from plates.train_loop import train as train_on_worker
    from plates.train_loop.group import labels_of
    from plates.trainer import describe, make_task, run_loop

    run = rundir.find_run(config.out, "train", config)
    phases = Phases()
    with phases.measure("data"):
        dataset, skipped, digests = check_dataset(load_dataset(config.data, config.seed), config.skip_unreadable)
    phases.seconds["process"] = process_age_s() - phases.seconds["data"]
    with phases.measure("ray"):
        plan = cluster.plan_job(config.num_workers, config.device, config.cpus_per_worker, config.wait_for_nodes_s)
    best = check_nodes(plan, dataset, run, cache_root() if config.trainable == "head" else None)
    weights = resolve_weights(config.backbone, config.weights, config.seed, config.image_size)
    preprocessing = preprocessing_of(weights.backbone, config.image_size)
    precision = decide_precision(config.precision, weights.backbone, plan.device, best)
    task = make_task(config, dataset, digests, weights, preprocessing, precision, run)
    resolved = describe(task, plan)
    rundir.claim_run(run, "train", config, resolved)
    print("\n".join([weights.reason, plan.line, *resolved["notes"]]), flush=True)

    phases.seconds["startup"] = process_age_s() - phases.seconds["data"]
    with phases.measure("fit"):
        trained = run_loop(train_on_worker, task, plan)
    figures = {key: trained.history[-1][key] for key in ("train/loss", "train/accuracy")}
    if precision == "fp16":
        figures["train/num_skipped_steps"] = trained.num_skipped_steps
    figures |= score(trained.val_logits, labels_of(dataset.val), dataset.classes, "val")
    bundle = Bundle(weights.backbone, dataset.classes, preprocessing, trained.state, {**resolved, "metrics": figures})
    save_bundle(run / "checkpoint", bundle)

    with phases.measure("inference"):
        predictions = predict(bundle, dataset.source, dataset.test, plan, precision)
    figures |= score_predictions(predictions, dataset)
    timing = timing_table(phases, plan.num_workers, trained.timings, predictions.timings, len(dataset.test))
    rundir.update_config(run, has_reused_features=trained.has_reused_features,
                         timing=startup_and_pace(phases, trained.timings))  # fmt: skip
    rundir.write_csv(run / "history.csv", pd.DataFrame(trained.history))
    write_predictions(run, predictions)
    rundir.write_results(run, figures, timing, [*skipped, *predictions.skipped])
    report = write_report(run, train_views=draw_examples(dataset, preprocessing, config.seed),
                          read_image=dataset.read_picture)  # fmt: skip
    rundir.finish_run(run)
    print(f"{summary_table(run)}\nreport: {report}")
    print_skipped(predictions.skipped)
    return EXIT_SOME_UNREADABLE if skipped or predictions.skipped else EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(train, TrainConfig, "plates train", argv)


if __name__ == "__main__":
    sys.exit(main())
