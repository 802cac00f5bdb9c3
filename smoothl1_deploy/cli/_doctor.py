"""`smoothl1-deploy doctor`: what is installed, what can run here, and what to install."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from .._records import Record
from ..errors import SmoothL1DeployError
from ._console import print_fields, print_json, print_lines, print_table
from ._export import EXAMPLE as EXPORT
from ._options import AsJson, Next

EXAMPLE = "smoothl1-deploy doctor --json"


@dataclass(frozen=True, slots=True)
class Part(Record):
    """A backend, a flavour or a library; `reason` says why it can't be used and what to install."""

    kind: str
    name: str
    reason: str | None
    derived: ClassVar[tuple[str, ...]] = ("available",)

    @property
    def available(self) -> bool:
        """Whether it can be used here."""
        return self.reason is None


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def _parts() -> list[Part]:
    """Each is tried by importing what it lives on."""
    from ..backends._base import get_backend
    from ..backends._names import BACKENDS
    from ..ops import library
    from ..tensorrt._flavour import FLAVOURS, get_flavour

    tries: list[tuple[str, Iterable[str], Callable[[str], object]]] = [
        ("backend", BACKENDS, get_backend),
        ("operators", ("cpu", "cuda"), library),
        ("flavour", FLAVOURS, get_flavour),
    ]
    parts = []
    for kind, name, use in ((kind, name, use) for kind, names, use in tries for name in names):
        reason = None
        try:
            use(name)
        except SmoothL1DeployError as exc:
            reason = str(exc)
        except Exception as exc:  # a broken installation is what a doctor is for
            reason = f"importing it fails ({type(exc).__name__}: {exc}); reinstall it"
        parts.append(Part(kind, name, reason))
    return parts


def _warnings(
    packages: Mapping[str, str | None], lowest: Mapping[str, str], parts: Iterable[Part]
) -> list[str]:
    """What may go wrong here."""
    from ..backends._base import get_backend

    found = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. "
            "Keep one: pip uninstall onnxruntime onnxruntime-gpu, then install the one you want"
        )
    for name, least in lowest.items():
        installed = packages[name]
        if installed and _numbers(installed) < _numbers(least):
            found.append(
                f"{name} {installed} is older than {least}, the lowest that the tests pass "
                f"with; some of it may work. For all of it: pip install '{name}>={least}'"
            )
    for part in parts:
        slow = part.kind == "backend" and part.available and get_backend(part.name).slow
        if slow:
            found.append(f"{part.name} runs on {slow}: its numbers are right, and it is slow")
    return found


def _telemetry(found: dict[str, bool] | None) -> dict[str, str]:
    if found is None:
        return {}
    on = {True: "on", False: "off"}
    said = f"{on[found['process']]} in these commands, {on[found['own_sessions']]} in your own "
    said += "sessions"
    if found["own_sessions"]:
        said += ": they write below your cache folder, and send; ORT_DISABLE_TELEMETRY=1 ends it"
    return {"onnxruntime's telemetry": said}


def doctor(*, as_json: AsJson = False) -> Next:
    """Show what is installed, what can run here, and what to install.

    Ends with 0 whatever it finds.
    """
    from .._environment import environment, lowest_versions, telemetry
    from ..tensorrt._flavour import current_gpu

    facts, lowest, gpu, told = environment(), lowest_versions(), current_gpu(), telemetry()
    parts = _parts()
    warnings = _warnings(facts["packages"], lowest, parts)
    if as_json:
        print_json(
            {
                **facts,
                "lowest": lowest,
                "gpu": gpu,
                "telemetry": told,
                "backends": [part for part in parts if part.kind == "backend"],
                "flavours": [part for part in parts if part.kind == "flavour"],
                "warnings": warnings,
            }
        )
        return None
    print_fields(
        {
            "smoothl1-deploy": facts["smoothl1_deploy"],
            "python": facts["python"],
            "platform": facts["platform"],
            "processor": f"{facts['processor']}, {facts['cores']} cores",
            "gpu": "none"
            if gpu is None
            else f"{gpu.name}, compute capability {gpu.compute_capability}, driver {gpu.driver}",
            "operators": f"built, sha256 {facts['operators'][:12]}"
            if facts["operators"]
            else "not built: every file runs by its own graph",
        }
        | _telemetry(told)
    )
    print_table(
        ("package", "version", "lowest that passes"),
        [
            (name, version or "not installed", lowest.get(name, ""))
            for name, version in facts["packages"].items()
        ],
    )
    print_table(
        ("part", "kind", "here"),
        [(p.name, p.kind, "available" if p.available else "not available") for p in parts],
    )
    # Below the table and not in it: an install command must not be cut by a column.
    print_lines([f"{p.name} not available: {p.reason}" for p in parts if p.reason])
    print_lines([f"warning: {warning}" for warning in warnings])
    return [EXPORT]
