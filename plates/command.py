"""How a job starts from its flags and ends with an exit code."""

import errno
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TypeVar

import tyro

from plates.config import EXIT_FAILED, EXIT_USER_ERROR, DataConfig, UserError
from plates.tool_config import CompareConfig, ShowConfig

ConfigT = TypeVar("ConfigT")


def parse(config_class: type[ConfigT], argv: Sequence[str], prog: str) -> ConfigT:
    """Flags to a config. An unknown or malformed flag ends the process with tyro's message and exit code 2."""
    how = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    return tyro.cli(config_class, prog=prog, args=list(argv), config=how)


def run_job(
    job: Callable[[ConfigT], int],
    config_class: type[ConfigT],
    prog: str,
    argv: Sequence[str] | None = None,
    makes_run: bool = True,
) -> int:
    """Parses the flags, runs the job and returns the exit code: 2 with one line for a user's mistake.

    A run without --out gets its directory here, so that what cuts it off can name it. SIGTERM ends a job as Ctrl-C
    does: what is unfinished stays, and the same command takes it up.
    """
    before, resume = signal.signal(signal.SIGTERM, signal.default_int_handler), ""
    try:
        config = parse(config_class, sys.argv[1:] if argv is None else argv, prog)
        if makes_run and isinstance(config, DataConfig | ShowConfig | CompareConfig):
            out = config.out or f"runs/{prog.split()[-1]}-{datetime.now():%Y%m%d-%H%M%S-%f}"
            config, resume = replace(config, out=out), f"; the same command with --out {shlex.quote(out)} goes on"
        return job(config)
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"{prog}: interrupted{resume}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"{prog}: {error.strerror}: {error.filename}; make room{resume}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        signal.signal(signal.SIGTERM, before)
