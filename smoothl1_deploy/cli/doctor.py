"""`smoothl1-deploy doctor`: what is installed, what can run here, and what to install."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..errors import SmoothL1DeployError
from .console import print_fields, print_json, print_lines, print_table

__all__ = ["EXAMPLE", "Checkup", "Part", "doctor", "examine"]

EXAMPLE = "smoothl1-deploy doctor --json"


@dataclass(frozen=True, slots=True)
class Part:
    """A backend or a flavour; `reason` says why it can't be used here and what to install."""

    kind: str
    name: str
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"name": self.name, "available": self.reason is None, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Checkup:
    """What `doctor` found.

    Attributes:
        environment: `smoothl1_deploy.environment.environment()`.
        lowest: the lowest version of a package that the tests pass with.
        gpu: the GPU in use.
        telemetry: `smoothl1_deploy.environment.telemetry()`.
        parts: backends and flavours.
        warnings: what may go wrong here.
    """

    environment: dict[str, Any]
    lowest: dict[str, str]
    gpu: dict[str, Any] | None
    telemetry: dict[str, bool] | None
    parts: tuple[Part, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.environment,
            "lowest": self.lowest,
            "gpu": self.gpu,
            "telemetry": self.telemetry,
            "backends": [part.to_dict() for part in self.parts if part.kind == "backend"],
            "flavours": [part.to_dict() for part in self.parts if part.kind == "flavour"],
            "warnings": list(self.warnings),
        }


def _reason(kind: str, name: str, use: Callable[[str], object]) -> Part:
    try:
        use(name)
    except SmoothL1DeployError as exc:
        return Part(kind, name, str(exc))
    except Exception as exc:  # a broken installation is what a doctor is for
        return Part(kind, name, f"importing it fails ({type(exc).__name__}: {exc}); reinstall it")
    return Part(kind, name, None)


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def examine() -> Checkup:
    """Look at packages, backends, flavours and GPU; a backend is tried by importing it."""
    from ..backends.base import BACKENDS, get_backend
    from ..environment import environment, lowest_versions, telemetry
    from ..ops import library
    from ..tensorrt.flavour import FLAVOURS, get_flavour
    from ..tensorrt.gpu import current_gpu

    facts, lowest = environment(), lowest_versions()
    gpu = current_gpu()
    packages = facts["packages"]
    warnings = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        warnings.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. "
            "Keep one: pip uninstall onnxruntime onnxruntime-gpu, then install the one you want"
        )
    for name, least in lowest.items():
        if packages[name] and _numbers(packages[name]) < _numbers(least):
            warnings.append(
                f"{name} {packages[name]} is older than {least}, the lowest that the tests pass "
                f"with; some of it may work. For all of it: pip install '{name}>={least}'"
            )
    parts = [_reason("backend", name, get_backend) for name in BACKENDS]
    parts += [_reason("operators", provider, library) for provider in ("cpu", "cuda")]
    for part in parts:
        slow = part.kind == "backend" and not part.reason and get_backend(part.name).slow
        if slow:
            warnings.append(f"{part.name} runs on {slow}: its numbers are right, and it is slow")
    return Checkup(
        facts,
        lowest,
        None if gpu is None else gpu.to_dict(),
        telemetry(),
        tuple(parts + [_reason("flavour", name, get_flavour) for name in FLAVOURS]),
        tuple(warnings),
    )


def _telemetry(found: dict[str, bool] | None) -> dict[str, str]:
    if found is None:
        return {}
    on = {True: "on", False: "off"}
    said = f"{on[found['process']]} in these commands, {on[found['own_sessions']]} in your own "
    said += "sessions"
    if found["own_sessions"]:
        said += ": they write below your cache folder, and send; ORT_DISABLE_TELEMETRY=1 ends it"
    return {"onnxruntime's telemetry": said}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is installed, what can run here, and what to install.

    Ends with 0 whatever it finds.
    """
    found = examine()
    if as_json:
        print_json(found.to_dict())
        return
    facts, gpu = found.environment, found.gpu
    print_fields(
        {
            "smoothl1-deploy": facts["smoothl1_deploy"],
            "python": facts["python"],
            "platform": facts["platform"],
            "processor": f"{facts['processor']}, {facts['cores']} cores",
            "gpu": "none"
            if gpu is None
            else f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"driver {gpu['driver']}",
            "operators": f"built, sha256 {facts['operators'][:12]}"
            if facts["operators"]
            else "not built: every file runs by its own graph",
        }
        | _telemetry(found.telemetry)
    )
    print_table(
        ("package", "version", "lowest that passes"),
        [
            (name, version or "not installed", found.lowest.get(name, ""))
            for name, version in facts["packages"].items()
        ],
    )
    print_table(
        ("part", "kind", "here"),
        [
            (p.name, p.kind, "available" if p.reason is None else "not available")
            for p in found.parts
        ],
    )
    # Below the table and not in it: an install command must not be cut by a column.
    print_lines([f"{p.name} not available: {p.reason}" for p in found.parts if p.reason])
    print_lines([f"warning: {warning}" for warning in found.warnings])
