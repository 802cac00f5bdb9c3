"""`smoothl1-deploy doctor`: what is installed, what can run here, and what to install."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from .._certainty import Certainty
from ..errors import SmoothL1DeployError, install_command
from ._console import print_fields, print_json, print_lines, print_table
from ._export import EXAMPLE as EXPORT
from ._options import AsJson, Next

EXAMPLE = "smoothl1-deploy doctor --json"


#: extra -> the module by which one sees that it is there.
_MODULES = {
    "cpu": "onnxruntime",
    "gpu": "tensorrt",
    "rtx": "tensorrt_rtx",
    "ort-rtx": "onnxruntime_ep_nv_tensorrt_rtx",
    "torch": "torch",
    "triton": "triton",
    "report": "jinja2",
    "serve": "tritonclient",
    "score": "pyarrow",
    "ray": "ray",
    "bench": "matplotlib",
}
#: What no extra brings.
_SERVER, _GPU = "smoothl1-deploy serve --install", "with an NVIDIA GPU: "
_WORKS = "works here"

#: What isn't done without -> the backends, flavours and commands that need it, and nothing else.
_NEEDED: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("export", "attach", "inspect", "bench"),
    ("cpu",): ("ort-cpu", "ort-cpu-bare", "run", "score", "compare"),
    ("torch",): ("torch", "export --route torch", "parity"),
    ("cpu", "torch"): ("verify", "prove"),
    ("rtx",): ("trt-network", "tensorrt_rtx", "build"),
    ("serve",): ("repository", "run --url"),
    ("serve", _SERVER): ("triton-http", "triton-grpc", "serve"),
    ("cpu", "torch", "serve"): ("deploy",),
    ("report",): ("parity's report.html",),
    ("score",): ("score of Parquet",),
    ("ray",): ("score --engine ray",),
    ("bench",): ("bench's plot",),
    (_GPU, "torch"): ("torch-cuda",),
    (_GPU, "torch", "triton"): ("torch-triton",),
    (_GPU, "torch", "gpu"): ("ort-cuda", "ort-tensorrt", "trt", "tensorrt"),
    (_GPU, "torch", "cpu", "ort-rtx"): ("ort-tensorrt-rtx",),
}
#: What a backend, a flavour or a command does not do without.
NEEDS = {name: needs for needs, names in _NEEDED.items() for name in names}


@dataclass(frozen=True, slots=True)
class Part:
    """A backend, a flavour or a library; `reason` says why it can't be used and what to install."""

    kind: str
    name: str
    reason: str | None
    available: bool


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def _parts() -> Iterator[Part]:
    """Each is tried by importing what it lives on."""
    from ..backends._base import get_backend
    from ..backends._names import BACKENDS, others
    from ..ops import library
    from ..tensorrt._flavour import FLAVOURS, get_flavour

    tries: list[tuple[str, Iterable[str], Callable[[str], object]]] = [
        ("backend", [*BACKENDS, *others()], get_backend),
        ("operators", ("cpu", "cuda"), library),
        ("flavour", FLAVOURS, get_flavour),
    ]
    for kind, name, use in ((kind, name, use) for kind, names, use in tries for name in names):
        reason = None
        try:
            use(name)
        except SmoothL1DeployError as exc:
            reason = str(exc)
        except Exception as exc:  # a broken installation is what a doctor is for
            reason = f"importing it fails ({type(exc).__name__}: {exc}); reinstall it"
        yield Part(kind, name, reason, reason is None)


def _here(parts: Iterable[Part], gpu: object) -> set[str]:
    """What is there of what is needed."""
    from ..serving._embedded import find_triton

    found = {extra for extra, module in _MODULES.items() if _is_found(module)}
    if any(part.kind == "flavour" and part.available for part in parts):
        found.add("rtx")  # the other flavour does as well
    if gpu is not None:
        found.add(_GPU)
    with contextlib.suppress(SmoothL1DeployError):
        find_triton()
        found.add(_SERVER)
    return found


def _is_found(module: str) -> bool:
    """Whether it is installed; to import all of them takes ten seconds."""
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(module) is not None
    return False


def _groups(parts: Iterable[Part], here: set[str]) -> dict[str, dict[str, list[str]]]:
    """What gives what, as heading -> kind -> names: what works, then installations, then a GPU."""
    tried = {p.name: (f"{p.kind}s", p.available) for p in parts if p.kind != "operators"}
    groups: dict[str, dict[str, list[str]]] = {_WORKS: {}}
    for name, needs in ((name, NEEDS.get(name, ())) for name in {**tried, **NEEDS}):
        missing = [need for need in needs if need not in here]
        kind, available = tried.get(name, ("commands", not missing))
        if available:
            heading = _WORKS
        elif missing:
            heading = _remedy(needs if _GPU in missing else missing)  # a GPU is on another machine
        else:
            continue  # what is wrong with it is said below
        groups.setdefault(heading, {}).setdefault(kind, []).append(name)
    return dict(sorted(groups.items(), key=lambda group: group[0].startswith(_GPU)))


def _certainties(parts: Iterable[Part]) -> dict[str, str]:
    """How sure one can be here, in the words of the report and the certificate; nothing is run."""
    from ..backends._base import backend_class
    from ..backends._names import REFERENCES

    backends = {part.name: part.available for part in parts if part.kind == "backend"}
    held = [name for name in backends if name not in REFERENCES]
    here = [name for name in held if backends[name] and backends["torch"]]  # it is compared with
    local = [name for name in here if not backend_class(name).over_the_wire]
    return {
        Certainty.PROVED: "the error bound of the graphs, whatever runs them",
        Certainty.EVERY_PAIR: f"by prove, half formats: {', '.join(local) or 'none'}",
        Certainty.SAMPLES: f"by verify and parity: {', '.join(here) or 'none'}",
        Certainty.NOT_RUN: ", ".join(name for name in held if name not in here) or "none",
    }


def _remedy(needs: Iterable[str]) -> str:
    """`pip install 'smoothl1-deploy[serve]' && smoothl1-deploy serve --install`."""
    extras = [need for need in needs if need in _MODULES]
    steps = [install_command(*extras)] if extras else []
    steps += [_SERVER] if _SERVER in needs else []
    return (_GPU if _GPU in needs else "") + " && ".join(steps)


def _warnings(
    packages: Mapping[str, str | None], lowest: Mapping[str, str], parts: Iterable[Part]
) -> Iterator[str]:
    """What may go wrong here."""
    from ..backends._base import get_backend

    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        yield (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. "
            "Keep one: pip uninstall onnxruntime onnxruntime-gpu, then install the one you want"
        )
    for name, least in lowest.items():
        installed = packages[name]
        if installed and _numbers(installed) < _numbers(least):
            yield (
                f"{name} {installed} is older than {least}, the lowest that the tests pass "
                f"with; some of it may work. For all of it: pip install '{name}>={least}'"
            )
    for part in parts:
        slow = part.kind == "backend" and part.available and get_backend(part.name).slow
        if slow:
            yield f"{part.name} runs on {slow}: its numbers are right, and it is slow"


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
    parts = [*_parts()]
    warnings = [*_warnings(facts["packages"], lowest, parts)]
    if as_json:
        print_json(
            {
                **facts,
                "lowest": lowest,
                "gpu": gpu,
                "telemetry": told,
                "backends": [part for part in parts if part.kind == "backend"],
                "flavours": [part for part in parts if part.kind == "flavour"],
                "certainty": _certainties(parts),
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
    here = _here(parts, gpu)
    for heading, found in _groups(parts, here).items():
        print_lines(["", heading])
        print_fields({f"  {kind}": ", ".join(names) for kind, names in found.items()})
    print_lines([""])
    print_table(("how sure one can be here", "of what"), [*_certainties(parts).items()])
    for part in parts:
        missing = {*NEEDS.get(part.name, ())} - here
        if not part.available and not missing:
            print_lines([f"{part.name} not available: {part.reason}"])
    packages = [
        (name, version or "not installed", lowest.get(name, ""))
        for name, version in facts["packages"].items()
    ]
    print_table(("package", "version", "lowest that passes"), packages)
    print_lines([f"warning: {warning}" for warning in warnings])
    return [EXPORT]
