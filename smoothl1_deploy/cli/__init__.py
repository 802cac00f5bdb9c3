"""The command line: `main` decides how a run ends, `registry` what commands there are.

Exit codes:

====  ==========================================================================================
0     done
1     a check failed (`verify`, `parity`)
2     bad usage, bad input, or less memory, files or room than it takes; the message says which
3     something needed is not installed or can't run here; the message says what to install
70    a bug in smoothl1-deploy (EX_SOFTWARE of sysexits.h)
130   interrupted (once more while the process ends: SIGINT itself, which a shell reports as 130)
141   whoever read the output stopped reading
====  ==========================================================================================
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence

from .._environment import silence
from ..errors import SmoothL1DeployError, is_shortage, reason_of, shortage
from ._console import (
    BROKEN_PIPE,
    INTERRUPTED,
    interrupts_told,
    print_error,
    safe_streams,
    warnings_as_notes,
)

__all__ = ["main"]

_BUG = 70

_DEBUG = "SMOOTHL1_DEPLOY_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; every way it can end is turned into an exit code and one message.

    Args:
        argv: without the program's name; None takes those of the process.

    Returns:
        One of the exit codes in this module's docstring.

    >>> main(["doctor", "--no-such-option"])  # the message goes to stderr
    2
    """
    silence()
    with safe_streams():
        return _ended(argv)


def _ended(argv: Sequence[str] | None) -> int:
    try:
        with warnings_as_notes(), interrupts_told():
            status = _invoke(argv)
        sys.stdout.flush()  # a broken pipe may show only here
        return _interrupted(argv) if status == INTERRUPTED else status
    except SmoothL1DeployError as exc:
        return _fail(str(exc), exc.exit_code)
    except KeyboardInterrupt:
        return _interrupted(argv)
    except BrokenPipeError:
        return BROKEN_PIPE
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("smoothl1_deploy"):
            return _report_bug(exc)
        return _fail(
            f"{exc}: an installation of smoothl1-deploy brings that package. "
            "Repair it with: pip install --force-reinstall smoothl1-deploy",
            3,
        )
    except Exception as exc:
        if isinstance(exc.__cause__, KeyboardInterrupt):
            # Python 3.11 makes a RuntimeError of an interrupt that comes in a `__set_name__`, as
            # dataclasses have while the module that they are in is imported.
            return _interrupted(argv)
        if is_shortage(exc):
            return _fail(_lack(exc), 2)
        return _report_bug(exc)  # whatever is left is one, and users get no traceback


def _invoke(argv: Sequence[str] | None) -> int:
    from ._registry import root_command

    arguments = None if argv is None else list(argv)
    try:
        root_command().main(args=arguments, prog_name="smoothl1-deploy")
    except SystemExit as exc:  # typer ends every run this way, usage errors (2) included
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    return 0


def _interrupted(argv: Sequence[str] | None) -> int:
    """After a second interrupt TensorRT may still build, and crash when the interpreter ends."""
    if threading.current_thread() is threading.main_thread():
        # Where the process is this command's, one more ends it, without a traceback.
        handler = signal.SIG_DFL if argv is None else signal.default_int_handler
        signal.signal(signal.SIGINT, handler)
    # A second interrupt may come before those who end their processes have begun to, and the
    # interpreter's end waits for each.
    processes = sys.modules.get("multiprocessing")
    for child in processes.active_children() if processes is not None else ():
        child.kill()
    build = sys.modules.get("smoothl1_deploy.tensorrt._build")
    if build is not None and build.is_building():
        os._exit(INTERRUPTED)
    return INTERRUPTED


def _fail(message: str, status: int) -> int:
    print_error(message)
    return status


def _lack(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.errno not in (None, errno.ENOMEM):
        where = f": {exc.filename}" if exc.filename else ""
        return (
            f"the system refuses more to this process ({reason_of(exc)}{where}); make room, or "
            "raise its limits (ulimit -a shows them)"
        )
    return f"not enough memory for this ({shortage(exc)}); use smaller arrays, or give it more"


def _report_bug(exc: Exception) -> int:
    debug = os.environ.get(_DEBUG) == "1"
    if debug:
        import traceback

        traceback.print_exception(exc)
    hint = "the traceback is above" if debug else f"{_DEBUG}=1 shows the traceback"
    return _fail(
        f"this is a bug in smoothl1-deploy ({type(exc).__name__}: {exc}). Please report it with "
        f"the command that you ran; {hint}",
        _BUG,
    )
