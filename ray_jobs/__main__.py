"""`python -m ray_jobs JOB …`, also the console script `plates JOB …`."""

import importlib
import sys

JOBS = {
    "prepare": "check, split and pack a data set into Parquet shards",
    "train": "train, predict the test split, report",
    "tune": "sweep lr and StepLR, retrain the winner, report",
    "predict": "batch inference from a checkpoint",
    "export": "a checkpoint as one file for ONNX Runtime, torch or timm",
    "serve": "predict images that are sent over HTTP, and a page to try it",
    "benchmark": "the same work on each device and number of workers, as one table",
    "show": "every image on one page, with what a run says of it",
    "check": "preflight of a cluster, as a table",
    "check-data": "what is odd about a data set",
    "compare": "finished runs side by side, as a table and a page",
    "submit": "send any of these to a cluster and follow it",
}


def main() -> int:
    """Runs the job named by the first argument; 2 where there is no such job."""
    name, argv = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in JOBS:
        return importlib.import_module(f"ray_jobs.{name.replace('-', '_')}").main(argv)
    usage = "usage: plates JOB [flags]; plates JOB --help tells a job's flags\n\n"
    usage += "\n".join(f"  {job:<10} {what}" for job, what in JOBS.items())
    if name in ("-h", "--help"):
        print(usage)
        return 0
    print(f"plates: no job {name}\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
