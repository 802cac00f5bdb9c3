"""A reader of a page: each step of it in a process of its own, forked from one that has torch.

To import torch anew takes longer than most commands do. What `smoothl1_deploy` imports of itself
and of everything else is imported by each step.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")


def follow(kind: str, text: str, folder: Path, environment: dict[str, str], log: Path) -> int:
    """The exit code of one step: `"command"`, by its words without the program's, or `"python"`."""
    # sympy comes along with onnx_ir and with torch, and no module of ours names it.
    forkserver.set_forkserver_preload(["torch", "sympy"])
    step = _CONTEXT.Process(target=_step, args=(kind, text, folder, environment, log))
    step.start()
    step.join()
    return int(step.exitcode or 0)


def _step(kind: str, text: str, folder: Path, environment: dict[str, str], log: Path) -> None:
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if kind == "python":
        exec(compile(text, "page", "exec"), {"__name__": "__main__"})
        return
    import shlex

    from smoothl1_deploy.cli import main

    sys.exit(main(shlex.split(text)))
