"""Check, split and pack a data set into Parquet shards that training and prediction read row group by row group."""

import sys
from functools import partial

from plates.command import run_job
from plates.config import EXIT_OK, EXIT_SOME_UNREADABLE
from plates.tool_config import PrepareConfig


def prepare(config: PrepareConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    import pandas as pd

    from plates import rundir
    from plates.cluster import plan_job
    from plates.dataset import load_dataset
    from plates.pack import pack
    from plates.predict import print_skipped
    from plates.preflight import check_nodes

    run = rundir.find_run(config.out, "prepare", config)
    dataset = load_dataset(config.data, config.seed)
    plan = plan_job(config.num_workers, "cpu")
    check_nodes(plan, dataset, run)
    rundir.claim_run(run, "prepare", config, {"versions": rundir.versions(), "plan": plan.line})
    print("\n".join(filter(None, [dataset.left_out, plan.line])), flush=True)
    num_images, skipped = pack(dataset, plan, run, config.skip_unreadable)
    if skipped:
        rundir.write_csv(run / "skipped.csv", pd.DataFrame(skipped))
    rundir.finish_run(run)
    print(", ".join(f"{split} {count}" for split, count in num_images.items()) + f" images in {run}")
    print_skipped(skipped)
    return EXIT_SOME_UNREADABLE if skipped else EXIT_OK


main = partial(run_job, prepare, PrepareConfig, "plates prepare")

if __name__ == "__main__":
    sys.exit(main())
