"""What is odd about a data set: every image decoded once, told in the terminal and as a page."""

import sys
from functools import partial

from plates.command import run_job
from plates.config import EXIT_OK, EXIT_SOME_UNREADABLE
from plates.tool_config import CheckDataConfig


def check_data(config: CheckDataConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    import pandas as pd

    from plates import rundir
    from plates.data_issues import find_issues
    from plates.dataset import load_dataset, look_over
    from plates.report import write_report

    run = rundir.find_run(config.out, "check-data", config)
    dataset = load_dataset(config.data, seed=0)
    rundir.claim_run(run, "check-data", config, {"classes": list(dataset.classes), "versions": rundir.versions()})
    splits = {name: samples for name in ("train", "val", "test") if (samples := getattr(dataset, name))}
    seen, skipped = look_over(splits, lambda path: dataset.source.read_and_look(path)[1])
    found = find_issues(dataset, seen, skipped)
    rundir.write_data_check(run, found.table, found.counts, found.lines)
    if skipped:
        rundir.write_csv(run / "skipped.csv", pd.DataFrame(skipped))
    report = write_report(run, train_views=[], read_image=dataset.read_picture)
    rundir.finish_run(run)
    print(*found.lines, f"report: {report}", sep="\n")
    return EXIT_SOME_UNREADABLE if skipped else EXIT_OK


main = partial(run_job, check_data, CheckDataConfig, "plates check-data")

if __name__ == "__main__":
    sys.exit(main())
