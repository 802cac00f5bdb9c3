"""What the lint asks of TensorRT plans: were they built by the TensorRT that is to run them?

A plan says nothing by itself; its sidecar does. Of a plan without one nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..artefact import sha256
from ..errors import ArtefactError
from ..tensorrt.engine import read_verified
from ..tensorrt.sidecar import Sidecar, sidecar_path
from .finding import Fault, Finding
from .repository import ONNX_FILE

__all__ = ["check_versions", "read_plan"]


def read_plan(model: str, plan: Path) -> tuple[Sidecar | None, list[Fault]]:
    """The sidecar of a plan, where it has one that fits it, and what is wrong with the pair."""
    if not sidecar_path(plan).exists():
        return None, []
    try:
        sidecar = read_verified(plan).sidecar
    except ArtefactError as exc:
        return None, [("damaged-plan", str(exc))]
    return sidecar, list(_check_plan(model, plan, sidecar))


def _check_plan(model: str, plan: Path, sidecar: Sidecar) -> Iterator[Fault]:
    if sidecar.flavour != "tensorrt":
        yield (
            "other-tensorrt",
            f"{plan.name} was built by {sidecar.flavour} {sidecar.version}, and Triton's backend "
            "loads plans of tensorrt alone",
        )
    origin = plan.parents[2] / model.removesuffix("_trt") / plan.parent.name / ONNX_FILE
    if not model.endswith("_trt") or not origin.is_file():
        return
    if sha256(origin.read_bytes()) != sidecar.onnx_sha256:
        yield (
            "stale-plan",
            f"{plan.name} was built from another graph than {'/'.join(origin.parts[-3:])}, the "
            "model it is named after",
        )


def check_versions(sidecars: Mapping[str, Sidecar], version: str | None) -> Iterator[Finding]:
    """Plans that the server's TensorRT can't load: each loads those of its own version.

    Args:
        sidecars: model -> sidecar of its plan.
        version: of the server's TensorRT, as far as it is known (`"10.13"`); None: the plans are
            held against each other.
    """
    own = {name: car for name, car in sidecars.items() if car.flavour == "tensorrt"}
    versions = sorted({car.version for car in own.values()})
    for model, car in own.items():
        other = None
        if version is not None:
            other = None if _runs(car, version) else f"the server has {version}"
        elif len(versions) > 1:
            other = f"the plans of this repository by {' and '.join(versions)}; a server has one"
        if other:
            problem = f"its plan was built by TensorRT {car.version}, {other}"
            yield Finding(model, "other-tensorrt", problem)


def _runs(sidecar: Sidecar, version: str) -> bool:
    built, server = ([*map(_number, text.split("."))] for text in (sidecar.version, version))
    shared = min(len(built), len(server))
    if built[:shared] == server[:shared]:
        return True
    later = built[0] == server[0] and built[:shared] < server[:shared]
    return sidecar.options.version_compatible and later


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else -1
