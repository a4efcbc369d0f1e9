"""The same work on each device and number of workers, beside the published loop, as one table and plots."""

import json
import sys
from collections.abc import Sequence

from plates.config import EXIT_FAILED, EXIT_OK, BenchmarkConfig, run_job


def benchmark(config: BenchmarkConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    import pandas as pd
    from tqdm import tqdm

    from plates import rundir, scaling
    from plates.cluster import count_devices
    from plates.dataset import load_dataset
    from plates.report import align_columns, write_report
    from plates.report.benchmark import HEADER, tabulate_benchmark

    run = rundir.find_run(config.out, "benchmark", config)
    dataset = load_dataset(config.data, config.seed)
    num_cpus, num_gpus = count_devices()
    rows = scaling.plan_rows(config, num_cpus, num_gpus)
    on_cpu = [row.num_workers for row in rows if row.device == "cpu" and row.num_workers <= num_cpus]
    cpus_per_worker = max(1, num_cpus // max([*on_cpu, 1]))
    described = {"versions": rundir.versions(), "classes": list(dataset.classes), "rows": [row.name for row in rows]}
    rundir.claim_run(run, "benchmark", config, described)
    print(f"{len(rows)} rows x {config.repeats} repeats, {cpus_per_worker} CPU threads a Ray worker", flush=True)

    measured = []
    with tqdm(total=len(rows) * config.repeats, desc="measuring", unit="run") as bar:
        for repeat in range(config.repeats):
            for row in rows:
                bar.set_postfix_str(row.name)
                measured.append({"repeat": repeat, **scaling.measure_row(row, config, cpus_per_worker, run)})
                rundir.write_csv(run / "benchmark.csv", pd.DataFrame(measured))
                bar.update()
    entries = scaling.summarize(pd.DataFrame(measured), config.scaling)
    found = {
        "repeats": config.repeats,
        "scaling": config.scaling,
        "rows": entries,
        "model": scaling.fit_model(entries, config.scaling),
    }
    rundir.write_json(run / "benchmark.json", found)
    report = write_report(run, train_views=[], read_image=dataset.read_picture)
    rundir.finish_run(run)
    print(align_columns([HEADER, *tabulate_benchmark(found)], text_columns=3, width=220))
    for entry in entries:
        if "reason" in entry:
            print(f"{entry['row']} could not run: {entry['reason']}")
    print(f"report: {report}\n{json.dumps(rundir.only_finite(found))}")
    return EXIT_OK if any("reason" not in entry for entry in entries) else EXIT_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(benchmark, BenchmarkConfig, "plates benchmark", argv)


if __name__ == "__main__":
    sys.exit(main())
