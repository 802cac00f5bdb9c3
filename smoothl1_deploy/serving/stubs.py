"""The processes in which the embedded Triton runs its models; told from Linux's /proc.

A request to a model whose process died waits a second for it, and so do those behind it, the
canary among them: looking at the process is faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["is_alive", "stubs_of"]

_NAME = "triton_python_b"  # triton_python_backend_stub, as the kernel cuts it


@dataclass(frozen=True, slots=True)
class _Process:
    name: str
    state: str
    parent: int


def _read(pid: int) -> _Process | None:
    """None for a process that is gone. Source: proc(5), /proc/PID/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    state, parent = rest.split()[:2]
    return _Process(name, state, int(parent))


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie, which Triton leaves of a killed one, does not."""
    process = _read(pid)
    return process is not None and process.state not in "ZX"


def stubs_of(server: int, folder: Path) -> frozenset[int]:
    """The processes of one version of a model that live now.

    Args:
        server: the process id of the server.
        folder: of the version.
    """
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        process = _read(pid)
        if process is None or (process.name, process.parent) != (_NAME, server):
            continue
        try:
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(word.startswith(f"{folder}/") for word in words) and is_alive(pid):
            found.add(pid)
    return frozenset(found)
