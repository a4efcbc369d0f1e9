"""Batch inference: predict a test split, or a plain folder of images, from a checkpoint alone."""

import sys
from collections.abc import Sequence

from plates.config import EXIT_OK, EXIT_SOME_UNREADABLE, PredictConfig, UserError, run_job


def run_prediction(config: PredictConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates import cluster, rundir
    from plates.checkpoint import load_bundle
    from plates.dataset import load_test_split
    from plates.device import decide_precision
    from plates.predict import predict, print_skipped, score_predictions, write_predictions
    from plates.preflight import check_nodes
    from plates.report import summary_table, write_report
    from plates.storage import place_of
    from plates.timing import Phases, process_age_s, timing_table

    run = rundir.find_run(config.out, "predict", config)
    phases = Phases()
    bundle = load_bundle(place_of("--checkpoint", config.checkpoint))
    with phases.measure("data"):
        dataset = load_test_split(config.data, bundle.info.get("seed", 0))
    if dataset.classes and dataset.classes != bundle.classes:
        raise UserError(
            f"--checkpoint {config.checkpoint}: was trained on the classes {', '.join(bundle.classes)}; "
            f"--data {config.data} has {', '.join(dataset.classes)}"
        )
    if not dataset.test:
        raise UserError(f"--data {config.data}: has no test/ folder with images to predict")
    plan = cluster.plan_job(config.num_workers, config.device, config.cpus_per_worker, config.wait_for_nodes_s)
    best = check_nodes(plan, dataset, run)
    precision = decide_precision(config.precision, bundle.backbone, plan.device, best)
    resolved = {
        "backbone": bundle.backbone,
        "backbone_reason": bundle.info.get("backbone_reason", ""),
        "weights_source": bundle.info.get("weights_source", ""),
        "num_workers": plan.num_workers,
        "device": plan.device,
        "precision": precision,
        "plan": plan.line,
        "classes": list(bundle.classes),
        "num_images": {"test": len(dataset.test)},
        "versions": rundir.versions(),
        "notes": [],
    }
    rundir.claim_run(run, "predict", config, resolved)
    print(plan.line, flush=True)

    phases.seconds["startup"] = process_age_s() - phases.seconds["data"]
    with phases.measure("inference"):
        predictions = predict(bundle, dataset.source, dataset.test, plan, precision)
    figures = score_predictions(predictions, dataset)
    timing = timing_table(phases, plan.num_workers, [], predictions.timings, len(dataset.test))
    write_predictions(run, predictions)
    rundir.write_results(run, figures, timing, predictions.skipped)
    report = write_report(run, train_views=[], read_image=dataset.read_picture)
    rundir.finish_run(run)
    print(f"{summary_table(run)}\nreport: {report}")
    print_skipped(predictions.skipped)
    return EXIT_SOME_UNREADABLE if predictions.skipped else EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(run_prediction, PredictConfig, "plates predict", argv)


if __name__ == "__main__":
    sys.exit(main())
