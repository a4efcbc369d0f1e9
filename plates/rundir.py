"""The run directory: where it is, who may write into it, and files written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from plates.config import UserError

CONFIG_FILE = "config.json"


def open_run(out: str | None, job: str, config: Any) -> Path:
    """Absolute run directory, made and claimed for these settings.

    A fresh or empty directory is taken; an unfinished run of the same job and settings is taken again.

    Raises: UserError for a finished run, a run of other settings, or a directory of other things.
    """
    settings = requested(job, config)
    run = Path(out).expanduser() if out else Path("runs") / f"{job}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    run = run.absolute()
    check_claimable(run, settings)
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / CONFIG_FILE, {"status": "unfinished", "requested": settings})
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
    return run


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
    settings = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    settings.pop("out", None)
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
