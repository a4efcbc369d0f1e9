"""Look: one page of every image by class and split, with what a run says of it."""

import sys
from functools import partial

from plates.command import run_job
from plates.config import EXIT_OK, EXIT_SOME_UNREADABLE
from plates.tool_config import ShowConfig


def show(config: ShowConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates import rundir
    from plates.dataset import load_test_split
    from plates.predict import print_skipped
    from plates.show import write_page
    from plates.show.findings import read_run
    from plates.storage import place_of

    shown = read_run(place_of("--run", config.run)) if config.run else None
    data = config.data or (shown.data if shown else "synthetic")
    seed = config.seed if config.seed is not None else shown.seed if shown else 0
    run = rundir.find_run(config.out, "show", config)
    dataset = load_test_split(data, seed)  # with all splits where there are some
    rundir.claim_run(run, "show", config, {"data": data, "seed": seed, "versions": rundir.versions()})
    skipped = write_page(run, dataset, shown, title=data, seed=seed)
    rundir.finish_run(run)
    print(f"page: {run / 'index.html'}")
    print_skipped(skipped)
    return EXIT_SOME_UNREADABLE if skipped else EXIT_OK


main = partial(run_job, show, ShowConfig, "plates show")

if __name__ == "__main__":
    sys.exit(main())
