"""The same work on each device and number of workers, beside the published loop, as one table and plots."""

import json
import sys
from functools import partial
from itertools import product

from plates.command import run_job
from plates.config import EXIT_FAILED, EXIT_OK, EXIT_SOME_UNREADABLE, BenchmarkConfig


def benchmark(config: BenchmarkConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    import pandas as pd
    from tqdm import tqdm

    from plates import cluster, rundir, scaling
    from plates.dataset import load_dataset
    from plates.report import align_columns, write_report
    from plates.report.benchmark import QUOTED, tabulate_rates, tabulate_seconds

    run = rundir.find_run(config.out, "benchmark", config)
    dataset = load_dataset(config.data, config.seed)
    nodes = cluster.find_nodes()
    rows = scaling.plan_rows(config, sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes))
    threads = scaling.share_threads(rows, partial(cluster.share_cpus, nodes=nodes))
    described = {"versions": rundir.versions(), "classes": list(dataset.classes), "rows": [row.name for row in rows]}
    rundir.claim_run(run, "benchmark", config, described)
    each = ", ".join(f"{count} on {device}" for device, count in threads.items())
    print(f"{len(rows)} rows x {config.repeats} repeats; CPU threads a Ray worker: {each}", flush=True)

    measured = []
    bar = tqdm(list(product(range(config.repeats), rows)), desc="measuring", unit="run")
    for repeat, row in bar:
        bar.set_postfix_str(row.name)
        measured.append({"repeat": repeat, **scaling.measure_row(row, config, threads[row.device], run)})
        rundir.write_csv(run / "benchmark.csv", pd.DataFrame(measured))
    entries = scaling.summarize(pd.DataFrame(measured), config.scaling)
    found = {"repeats": config.repeats, "scaling": config.scaling, "rows": entries}
    found["model"] = scaling.fit_model(entries, config.scaling)
    rundir.write_json(run / "benchmark.json", found)
    report = write_report(run, train_views=[], read_image=dataset.read_picture)
    rundir.finish_run(run)
    for table, text_columns in ((tabulate_seconds(entries), 1), (tabulate_rates(entries), 3)):
        print(align_columns(table, text_columns=text_columns, width=220), end="\n\n")
    for entry in entries:
        if "reason" in entry:
            print(f"{entry['row']} could not run: {entry['reason']}")
    if (run / "skipped.csv").exists():
        print(f"images that could not be read: {run / 'skipped.csv'}")
    print(f"{QUOTED}\nreport: {report}\n{json.dumps(rundir.only_finite(found))}")
    if all("reason" in entry for entry in entries):
        return EXIT_FAILED
    return EXIT_SOME_UNREADABLE if any(row["exit_code"] == EXIT_SOME_UNREADABLE for row in measured) else EXIT_OK


main = partial(run_job, benchmark, BenchmarkConfig, "plates benchmark")

if __name__ == "__main__":
    sys.exit(main())
