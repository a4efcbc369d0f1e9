"""Send any of the other jobs to a Ray cluster, print its log as it grows, and end with its exit code."""

import argparse
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from plates.command import run_job
from plates.config import EXIT_FAILED, UserError
from plates.ray_private import limit_requests, ray_version_of, require
from plates.tool_config import JOB_CONFIGS, JobConfig

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# In a .gitignore's words. Beside ray_jobs may lie a user's data or all of site-packages: this project alone is sent.
EXCLUDES = ["/*", "!/.", "!/plates", "!/ray_jobs", "__pycache__"]
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, LOST_S = 5.0, 30.0, 120.0
MIN_POLL_S, MAX_POLL_S, SAY_PENDING_S = 1.0, 30.0, 10.0


def submit(own: argparse.Namespace, flags: Sequence[str], config: JobConfig) -> int:
    check_paths(config)
    client = connect(own.address)
    job_id = client.submit_job(
        entrypoint=shlex.join(["python", "-m", f"ray_jobs.{own.job.replace('-', '_')}", *flags]),
        runtime_env={"working_dir": str(Path(__file__).parents[1]), "excludes": EXCLUDES},
    )
    print(f"{job_id} was sent to {own.address}", flush=True)
    exit_code = follow(client, job_id, own)
    if (out := getattr(config, "out", None)) and own.job != "export":  # whose log names its file
        print(f"run directory: {out}")
    return exit_code


def check_paths(config: JobConfig) -> None:
    """Raises: UserError for a path that the nodes do not share: relative to here, or to the job's passing folder."""
    rule = "a job on a cluster needs an absolute path or a URI that all nodes reach, as /nfs/… or s3://…"
    if getattr(config, "out", "none") is None:
        raise UserError(f"--out is missing: {rule}")
    for name in ("out", "data", "run", "checkpoint", "weights"):
        path = getattr(config, name, None) or "none"
        is_word_or_uri = path in ("synthetic", "imagenet", "none") or ":" in path
        if not is_word_or_uri and not Path(path).is_absolute():
            raise UserError(f"--{name} {path}: {rule}")


def connect(address: str) -> "JobSubmissionClient":
    """Raises: UserError where no cluster answers, or one that wants another token or runs another Ray."""
    # Imported here, so that --help and a mistaken flag answer at once: Ray alone takes seconds.
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    require("ray.job_submission")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: must start with http:// or https://")
    logging.getLogger("ray").setLevel(logging.ERROR)  # each ignored file is a line
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # this variable and RAY_ADDRESS win over the client's argument
    try:
        requests.get(f"{address}/api/version", timeout=CONNECT_TIMEOUT_S)  # the client waits without a limit
        client = JobSubmissionClient(address)
        limit_requests(client, REQUEST_TIMEOUT_S)
        here, there = ray.__version__, ray_version_of(client)
    except AuthenticationError as error:
        reason = error.message.splitlines()[0].rstrip(".")
        todo = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
        raise UserError(f"--address {address}: {reason}; {todo}") from error
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"--address {address}: no Ray cluster answers there ({error})") from error
    if here.split(".")[:2] != there.split(".")[:2]:
        raise UserError(f"--address {address}: the cluster runs Ray {there}, this machine {here}; install the same")
    return client


def follow(client: "JobSubmissionClient", job_id: str, own: argparse.Namespace) -> int:
    """Prints the job's log until it ends and returns its exit code; 1 where it has none or is followed no longer."""
    began_s = said_s = heard_s = time.monotonic()
    num_printed = 0
    while True:
        try:
            asked_s = time.monotonic()
            job = client.get_job_info(job_id)
            log = client.get_job_logs(job_id)  # after the status, so that the log of a job that has ended is whole
            heard_s = time.monotonic()
            print(log[num_printed:], end="", flush=True)
            num_printed = max(num_printed, len(log))
            if job.status.is_terminal():
                code = job.driver_exit_code  # below 0 a signal's
                return code if code is not None and code >= 0 else fail(f"{job_id} {job.status}: {job.message}")
            if job.status == "PENDING" and heard_s - began_s > own.pending_timeout:
                client.stop_job(job_id)
                return fail(f"{job_id} was stopped: PENDING for {own.pending_timeout:g} s. {job.message}")
            if job.status == "PENDING" and heard_s - said_s > SAY_PENDING_S:
                said_s = heard_s
                print(f"PENDING for {heard_s - began_s:.0f} s: {job.message}", flush=True)
            # The log comes whole each time: no more than a tenth of the time is spent on it.
            time.sleep(min(max(MIN_POLL_S, 10 * (heard_s - asked_s)), MAX_POLL_S))
        except KeyboardInterrupt:
            answer = ask_what_next()
            if answer == "s":
                client.stop_job(job_id)
            if answer == "f":
                return fail(f"{job_id} goes on; stop it with: ray job stop --address {own.address} {job_id}")
        except BrokenPipeError:  # of our own stdout
            raise
        except (OSError, RuntimeError) as error:
            if time.monotonic() - heard_s > LOST_S:
                return fail(f"{own.address} answers no more ({error}); {job_id} may go on")
            time.sleep(MIN_POLL_S)


def ask_what_next() -> str:
    """The first letter of the answer to Ctrl-C; f where there is no terminal to ask at, or no patience."""
    if not sys.stdin.isatty():
        return "f"
    print("\n[s]top the job, [f]ollow no longer, [c]ontinue: ", end="", file=sys.stderr, flush=True)
    try:
        return input()[:1].lower()
    except (EOFError, KeyboardInterrupt):
        return "f"


def fail(message: str) -> int:
    print(f"plates submit: {message}", file=sys.stderr)
    return EXIT_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    named = [os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
    address = next((url for url in named if url.startswith("http")), "http://127.0.0.1:8265")
    parser = argparse.ArgumentParser(prog="plates submit", allow_abbrev=False, description=__doc__,
                                     epilog="All other flags are the job's own: plates JOB --help. --out is needed, "
                                     "as an absolute path or a URI that all nodes reach.")  # fmt: skip
    parser.add_argument("job", choices=JOB_CONFIGS, help="what to run there")
    parser.add_argument("--address", default=address, metavar="URL", help="of the cluster's dashboard [%(default)s]")
    parser.add_argument("--pending-timeout", type=float, default=600.0, metavar="S",
                        help="seconds that the job may wait for its start [%(default)g]")  # fmt: skip
    own, flags = parser.parse_known_args(argv)
    own.address = own.address.rstrip("/")
    job, prog = partial(submit, own, flags), f"plates submit {own.job}"
    return run_job(job, JOB_CONFIGS[own.job], prog, flags, makes_run=False)


if __name__ == "__main__":
    sys.exit(main())
