"""`smoothl1-deploy inspect`: what is inside an ONNX file or an engine, and whether it runs here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ArtefactError, InvalidInputError, reason_of
from ..files import open_file
from .console import human_size, print_fields, print_json, print_lines, print_table

if TYPE_CHECKING:
    from .inspection import Inspection

__all__ = ["EXAMPLE", "inspect"]

EXAMPLE = "smoothl1-deploy inspect loss.onnx"

#: How plans of tensorrt (10.x) and of tensorrt_rtx (1.7) begin.
_ENGINE_MAGIC = (b"ftrt", b"vtrt")


def _is_engine(path: Path) -> bool:
    from ..backends.base import ENGINE_SUFFIXES

    try:
        with open_file(path) as file:
            start = file.read(4)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise InvalidInputError(
            f"{path} can't be read ({reason_of(exc)}); give the path of an .onnx file or an engine"
        ) from exc
    if path.suffix == ".json" and path.with_suffix("").suffix in ENGINE_SUFFIXES:
        raise InvalidInputError(
            f"{path} is the sidecar of an engine; give the engine, {path.with_suffix('')}"
        )
    if start in _ENGINE_MAGIC or _has_sidecar(path):
        return True
    if path.suffix in ENGINE_SUFFIXES:
        raise InvalidInputError(
            f"{path} is no engine: it doesn't begin as TensorRT's do, and has no sidecar that can "
            "be read; give the path of an .onnx file or an engine"
        )
    return False


def _has_sidecar(path: Path) -> bool:
    from ..tensorrt.sidecar import Sidecar, sidecar_path

    with contextlib.suppress(ArtefactError):
        return Sidecar.read(sidecar_path(path)).context_sha256 is None
    return False


def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file, or an engine beside its sidecar.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is inside an ONNX file or an engine, and whether this machine can run it.

    An engine is executable code: only one that fits its sidecar and this machine's GPU is
    deserialised; any other, also one that an ONNX file carries, is measured and not run.
    """
    from .inspection import inspect_engine, inspect_model

    found = inspect_engine(file) if _is_engine(file) else inspect_model(file)
    if as_json:
        print_json(found.to_dict())
        return
    print_fields({"file": f"{file} ({found.kind})", **{k: _text(k, v) for k, v in _shown(found)}})
    if found.operators:
        print_table(
            ("where", "operators"),
            [
                (where, ", ".join(f"{n} {op}" if n > 1 else op for op, n in counts.items()))
                for where, counts in found.operators.items()
            ],
        )
    for name, reason in found.runs.items():
        can = "yes" if name.startswith("build") else "can run it here"
        print_lines([f"{name}: {can if reason is None else reason}"])
    print_lines([f"problem: {problem}" for problem in found.problems])


def _shown(found: Inspection) -> list[tuple[str, Any]]:
    """The facts without those that are empty, or that another says too."""
    return [(k, v) for k, v in found.facts.items() if k != "options" and v not in (None, [], "")]


def _text(name: str, value: Any) -> str:
    if name in ("inputs", "outputs"):
        from .ports import show_ports

        return show_ports(value)
    if name == "attached":
        parts = ("inputs", "outputs", "spec")
        return "; ".join(", ".join(_text("", loss.get(part)) for part in parts) for loss in value)
    if name == "engines":
        return "; ".join(_text("", engine) for engine in value)
    if name == "bytes":
        return human_size(value)
    if name == "certificate":
        return f"{value['state']}: {value['message']}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
