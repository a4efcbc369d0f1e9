"""The run directory: where it is, who may write into it, and files written whole or not at all."""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from plates.config import UserError

CONFIG_FILE = "config.json"


def find_run(out: str | None, job: str, config: Any) -> Path:
    """Absolute path of the run directory for these settings; nothing is made yet.

    A fresh or empty directory is fine, and so is an unfinished run of the same job and settings.

    Raises: UserError for a finished run, a run of other settings, or a directory of other things.
    """
    run = Path(out).expanduser() if out else Path("runs") / f"{job}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    run = run.absolute()
    check_claimable(run, requested(job, config))
    return run


def claim_run(run: Path, job: str, config: Any, resolved: dict[str, Any]) -> None:
    """Makes the directory and writes config.json, unfinished. Raises: UserError where it cannot be written."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        settings = requested(job, config)
        write_json(run / CONFIG_FILE, {"status": "unfinished", **settings, **resolved, "requested": settings})
    except OSError as error:
        raise UserError(f"--out {run}: cannot be written ({error.strerror})") from error


def write_results(
    run: Path,
    figures: dict[str, float | int],
    timing: pd.DataFrame,
    skipped: Sequence[Any],
) -> None:
    """metrics.json, timing.csv and, where images could not be read, skipped.csv; device names into config.json."""
    write_json(run / "metrics.json", figures)
    write_csv(run / "timing.csv", timing)
    if skipped:
        write_csv(run / "skipped.csv", pd.DataFrame([asdict(item) for item in skipped]))
    update_config(run, device_names=sorted(set(timing["device_name"])))


def finish_run(run: Path) -> None:
    """Marks the run as finished: from now on it is never written again."""
    update_config(run, status="finished")


def update_config(run: Path, **changes: Any) -> None:
    write_json(run / CONFIG_FILE, {**json.loads((run / CONFIG_FILE).read_text()), **changes})


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    packages = ("plates", "torch", "torchvision", "ray", "timm", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def check_claimable(run: Path, settings: dict[str, Any]) -> None:
    """Raises: UserError where a run of these settings may not be written into `run`."""
    if run.exists() and not run.is_dir():
        raise UserError(f"--out {run}: is a file; give a directory")
    if not run.exists() or not any(run.iterdir()):
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
    """The settings that make two runs the same run: everything but where it is written."""
    settings = asdict(config)
    settings.pop("out")
    return {"job": job, **settings}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file beside `path`, then renames it: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def current_umask() -> int:
    """mkstemp makes files private; a run directory follows the user's umask like any other output."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    write_whole(path, lambda file: file.write_text(json.dumps(value, indent=2) + "\n"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda file: table.to_csv(file, index=False))


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda file: table.to_parquet(file, index=False))
