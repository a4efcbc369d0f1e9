"""The run directory: where it is, who may write into it, and files written whole or not at all."""

import functools
import io
import json
import logging
import os
import platform
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from plates.config import UserError
from plates.storage import Place, UriPath, place_of, remove_tree

CONFIG_FILE, LOCK_FILE = "config.json", ".lock"
TRIAL_PREFIX = ".plates-"  # of what a preflight writes, and cannot delete when it is killed
WRITE_PREFIX = ".writing-"  # of files that are not whole yet, which stay when their process is killed
STATE_FILE = ".state.pt"  # of unfinished training
FEATURES_FOLDER = ".features"  # of a trunk that was trained, gone when the run is finished
BEAT_S, STALE_S = 20.0, 60.0  # a driver on another machine that gave no sign for so long is taken to be gone


def find_run(out: str | None, job: str, config: Any) -> Place:
    """The run directory for these settings, an absolute path or a URI; nothing is made yet.

    Raises: UserError where it is neither empty nor an unfinished run of the same job and settings, or closed to us.
    """
    assert out, "run_job gives every run a directory"
    run = place_of("--out", out)
    try:
        check_claimable(run, requested(job, config))
    except OSError as error:
        raise UserError(f"--out {run}: cannot be used ({error.strerror or error})") from error
    return run


def claim_run(run: Place, job: str, config: Any, resolved: dict[str, Any]) -> None:
    """Makes the directory, locks it and writes config.json, unfinished. Raises: UserError where any of it fails."""
    settings = requested(job, config)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock_run(run)
        check_claimable(run, settings)  # now that no other process can finish it
        write_json(run / CONFIG_FILE, {"status": "unfinished", **settings, **resolved, "requested": settings})
    except OSError as error:
        raise UserError(f"--out {run}: cannot be written ({error.strerror or error})") from error


def lock_run(run: Place) -> None:
    """Takes the directory for this process until it ends or `finish_run`. Raises: UserError where it is taken.

    On a disk the kernel keeps the lock (flock) and frees it with the process; over machines, too, where the file
    system carries it, as Linux's NFS does, whose server frees it some 90 s after a machine went away. In an object
    store it is a record of the holder, written again as long as that lives; of two at once the last one has it.
    """
    path = run / LOCK_FILE
    if isinstance(path, Path):
        lock = file_lock(path)
        lock.release(force=True)  # this process may take it again, in a directory made anew, too
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"--out {run}: another process is at work in it; wait, or give another") from None
        return
    me = {"host": socket.gethostname(), "processes": process_table(), "pid": os.getpid()}
    me["started"] = psutil.Process().create_time()
    if path.exists() and is_held(holder := json.loads(path.read_text()), me, time.time() - path.changed_at_s()):
        raise UserError(
            f"--out {run}: process {holder['pid']} on {holder['host']} is at work in it; wait, or give another"
        )
    write_json(path, me)
    time.sleep(1.0)
    if json.loads(path.read_text()) != me:
        raise UserError(f"--out {run}: another process has just started in it; give another directory")
    threading.Thread(target=keep_lock, args=(path,), daemon=True).start()


@functools.cache
def file_lock(path: Path) -> FileLock:
    """One a file and process."""
    return FileLock(path, thread_local=False)


def process_table() -> str:
    """What a process number counts in: each container has its own, and containers may share a host's name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def is_held(holder: dict[str, Any], me: dict[str, Any], age_s: float) -> bool:
    """Whether the process of a lock's record still lives: looked up where it can be, else by its last sign."""
    if holder.get("processes") != me["processes"]:
        return age_s < STALE_S
    if holder["pid"] == me["pid"]:
        return False
    try:
        return psutil.Process(holder["pid"]).create_time() == holder["started"]
    except psutil.NoSuchProcess:
        return False


def keep_lock(path: UriPath) -> None:
    """Gives a sign of life until the lock is gone."""
    while True:
        try:
            if not path.exists():
                return
            path.write_bytes(path.read_bytes())
        except OSError as error:  # of a store that does not answer now; the next sign may reach it
            logging.getLogger(__name__).warning("%s: no sign of life (%s)", path, error)
        time.sleep(BEAT_S)


def write_results(run: Place, figures: dict[str, float | int], timing: pd.DataFrame, skipped: Sequence[Any]) -> None:
    """metrics.json, timing.csv and, where images could not be read, skipped.csv; device names into config.json."""
    write_json(run / "metrics.json", figures)
    write_csv(run / "timing.csv", timing)
    if skipped:
        write_csv(run / "skipped.csv", pd.DataFrame([asdict(item) for item in skipped]))
    update_config(run, device_names=sorted(set(timing["device_name"])))


def write_data_check(run: Place, table: pd.DataFrame, counts: dict[str, dict[str, int]], lines: list[str]) -> None:
    """data_issues.csv, where it has rows; what the report tells beside it into config.json."""
    if len(table):
        write_csv(run / "data_issues.csv", table)
    update_config(run, data_check={"counts": counts, "lines": lines})


def finish_run(run: Place) -> None:
    """Marks the run as finished: from now on it is never written again."""
    update_config(run, status="finished")
    remove_tree(run / FEATURES_FOLDER)
    for name in (STATE_FILE, LOCK_FILE):
        (run / name).unlink(missing_ok=True)
    if isinstance(run, Path):
        for folder in list(run.rglob(f"{WRITE_PREFIX}*")):
            remove_tree(folder)
        file_lock(run / LOCK_FILE).release(force=True)


def update_config(run: Place, **changes: Any) -> None:
    write_json(run / CONFIG_FILE, {**json.loads((run / CONFIG_FILE).read_text()), **changes})


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    packages = ("plates", "torch", "torchvision", "torchcodec", "pillow", "ray", "timm", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def check_claimable(run: Place, settings: dict[str, Any]) -> None:
    """Raises: UserError where a run of these settings may not be written into `run`."""
    if run.exists() and not run.is_dir():
        raise UserError(f"--out {run}: is a file; give a directory")
    children = [child.name for child in run.iterdir()] if run.exists() else []
    if all(name == LOCK_FILE or name.startswith((TRIAL_PREFIX, WRITE_PREFIX)) for name in children):
        return
    try:
        found = json.loads((run / CONFIG_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(f"--out {run}: holds other files and no run; give a new or empty directory") from None
    if found.get("status") == "finished":
        raise UserError(f"--out {run}: holds a finished run; give another directory")
    before = found.get("requested", {})
    changed = sorted(key for key in before | settings if before.get(key) != settings.get(key))
    if changed:
        raise UserError(f"--out {run}: holds an unfinished run of other settings ({', '.join(changed)} differ)")


def requested(job: str, config: Any) -> dict[str, Any]:
    """The settings that make two runs the same run: all but where it is written, and how long it may wait."""
    settings = json.loads(json.dumps(asdict(config)))  # as it will be read back: a tuple is a list there
    return {"job": job} | {name: settings[name] for name in settings if name not in ("out", "wait_for_nodes_s")}


def write_atomically(path: Place, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file, beside `path` where that is a disk, then moves it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent if isinstance(path, Path) else None
    try:
        with tempfile.TemporaryDirectory(dir=beside, prefix=WRITE_PREFIX) as folder:
            temporary = Path(folder, path.name)
            temporary.touch()
            mode = temporary.stat().st_mode  # by the user's umask; safetensors makes its files private
            write(temporary)
            if isinstance(path, UriPath):
                path.upload(temporary)
            else:
                temporary.chmod(mode)
                temporary.replace(path)
    except (OSError, SafetensorError) as error:  # not every library names the file, nor tells the error as such
        in_text = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else in_text and int(in_text[1])
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_json(path: Place, value: Any) -> None:
    """JSON has no infinities and no NaN: what is not finite is null."""
    text = json.dumps(only_finite(value), indent=2)
    write_atomically(path, lambda file: file.write_text(text + "\n"))


def only_finite(value: Any) -> Any:
    """The value as JSON gives it back, with None for every number in it that is not finite."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def write_csv(path: Place, table: pd.DataFrame) -> None:
    write_atomically(path, lambda file: table.to_csv(file, index=False))


def read_csv(path: Place, **options: Any) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(path.read_bytes()), **options)


def write_parquet(path: Place, table: pd.DataFrame) -> None:
    write_atomically(path, lambda file: table.to_parquet(file, index=False))
