"""Preflight of a cluster, or of this machine: what a job would run on, and whether every node can do its part."""

import os
import sys
from functools import partial

from plates.command import run_job
from plates.config import EXIT_OK, EXIT_USER_ERROR
from plates.tool_config import CheckConfig


def check(config: CheckConfig) -> int:
    if config.address:
        os.environ["RAY_ADDRESS"] = config.address
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates.cluster import plan_job
    from plates.dataset import load_dataset
    from plates.preflight import probe_nodes
    from plates.report import align_columns
    from plates.storage import cache_root, place_of

    run = place_of("--out", config.out or ".")
    dataset = load_dataset(config.data, seed=0)
    plan = plan_job(config.num_workers, config.device)
    print(plan.line, flush=True)
    packages = ("python", "ray", "torch", "plates")
    rows = [["node", "device", "/dev/shm GiB", *packages, "problems"]]
    exit_code = EXIT_OK
    for probe in probe_nodes(plan, dataset, run, cache_root()):
        shm = "–" if probe.shm_bytes is None else f"{probe.shm_bytes / 2**30:.1f}"
        versions = [probe.versions.get(name, "–") for name in packages]
        rows.append([probe.node, probe.device, shm, *versions, "; ".join(probe.problems) or "none"])
        if probe.problems:
            exit_code = EXIT_USER_ERROR
    print(align_columns(rows, text_columns=len(rows[0]), width=240))
    return exit_code


main = partial(run_job, check, CheckConfig, "plates check")

if __name__ == "__main__":
    sys.exit(main())
