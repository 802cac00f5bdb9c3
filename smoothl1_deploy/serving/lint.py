"""The lint of a Triton model repository: this tool's or anyone's.

A Triton says what it refuses; the rules here are for what it takes and answers wrongly. They stand
in docs/serving-repository.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artefact import read_model
from ..errors import ArtefactError, CarriedEngineError, reason_of
from ..files import read_file
from ..graph.metadata import CHANGED, is_changed
from ..model import Loss, engines_in
from ..ops import is_library
from ..parity.certificate import CertificateStatus, read_certificate
from ..tensorrt.sidecar import Sidecar
from .finding import Fault, Finding
from .lint_config import check_against_file, check_config, kind_of
from .lint_graph import unguarded
from .lint_plan import check_versions, read_plan
from .lint_server import refusals
from .losses import read_losses
from .model_config import CONFIG_FILE, read_config
from .ports import engine_ports, onnx_ports

__all__ = ["LintReport", "Visit", "lint"]


@dataclass(frozen=True, slots=True)
class LintReport:
    """What the lint found. True where it found nothing.

    Attributes:
        repository: the folder.
        models: the names of its models.
        findings: in the order of the models.
        certificates: model file, as seen from the repository -> what its certificate says.
        note: why no Triton was asked what it refuses; empty where one was.
    """

    repository: Path
    models: tuple[str, ...]
    findings: tuple[Finding, ...]
    certificates: dict[str, CertificateStatus]
    note: str

    def __bool__(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "ok": bool(self),
            "repository": str(self.repository),
            "models": list(self.models),
            "findings": [finding.to_dict() for finding in self.findings],
            "certificates": {file: status.to_dict() for file, status in self.certificates.items()},
            "note": self.note,
        }


def lint(
    repository: str | os.PathLike[str], *, tensorrt_version: str | None = None, server: bool = True
) -> LintReport:
    """Check every model of a repository. Nothing in it is run.

    Args:
        repository: a folder of model folders.
        tensorrt_version: of the server that is to load its plans, as far as it is known; without
            it the plans are held against each other.
        server: have a Triton of this machine load the configs, where there is one.

    Raises:
        ArtefactError: when there is no such folder, or it holds no model.
        MissingDependencyError: without tritonclient.
    """
    root = Path(repository)
    if not os.path.isdir(root):
        raise ArtefactError(f"{root} is no folder; give that of a Triton model repository")
    if (root / CONFIG_FILE).is_file():
        raise ArtefactError(f"{root} is a model; give the folder above it, the repository")
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]
    if not folders:
        raise ArtefactError(f"{root} holds no model; write one with smoothl1-deploy repository")
    visits = [Visit(folder) for folder in folders]
    findings = [finding for visit in visits for finding in visit.findings]
    sidecars = {visit.name: visit.sidecar for visit in visits if visit.sidecar is not None}
    findings += check_versions(sidecars, tensorrt_version)
    refused: dict[str, str] = {}
    note = "it was not asked"
    if server:
        refused, note = refusals([visit for visit in visits if visit.config is not None])
    findings += [Finding(name, "refused", words) for name, words in refused.items()]
    return LintReport(
        root,
        tuple(visit.name for visit in visits),
        tuple(sorted(findings, key=lambda finding: finding.model)),
        {file: status for visit in visits for file, status in visit.certificates.items()},
        note,
    )


class Visit:
    """One model folder, looked through.

    Attributes:
        config: its message; None where it can't be read.
        kind: backend, platform and file name that Triton completes it to; None for none it knows.
        versions: the folders that Triton takes for versions: numbers from 1 on.
        files: the names of what lies in them.
        sound: version -> its ONNX file, where that can be read and asks for no operator library
            but this installation's.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.folder = folder
        self.config: Any = None
        self.kind: tuple[str, str, str] | None = None
        self.sidecar: Sidecar | None = None
        self.certificates: dict[str, CertificateStatus] = {}
        numbers = [
            p for p in folder.iterdir() if re.fullmatch("[1-9][0-9]*", p.name) and p.is_dir()
        ]
        self.versions = sorted(numbers, key=lambda path: int(path.name))
        self.files = {path.name for version in self.versions for path in version.iterdir()}
        self.sound: dict[Path, Path] = {}
        self.findings = [Finding(self.name, *fault) for fault in self._faults()]

    def _faults(self) -> Iterator[Fault]:
        try:
            self.config = config = read_config(read_file(self.folder / CONFIG_FILE))
        except FileNotFoundError:
            yield (
                "no-config",
                f"there is no {CONFIG_FILE}, and a server that guesses one guesses batching too",
            )
            return
        except (OSError, ArtefactError) as exc:
            reason = reason_of(exc) if isinstance(exc, OSError) else exc
            yield "bad-config", f"{CONFIG_FILE}: {reason}"
            return
        yield from check_config(config)
        self.kind = kind_of(config, self.files)
        known = config.default_model_filename or (self.kind and self.kind[2])
        # A plan for each GPU there is may take the place of the one for any.
        files = sorted(config.cc_model_filenames.values()) or [known]
        for version in self.versions if config.platform != "ensemble" else ():
            for file in filter(None, files):
                if (version / file).exists():
                    yield from self._check_file(config, version, version / file)
                else:
                    yield "no-model-file", f"version {version.name} has no {file}"

    def _check_file(self, config: Any, version: Path, path: Path) -> Iterator[Fault]:
        if path.is_file():
            status = read_certificate(path)
            self.certificates[f"{self.name}/{version.name}/{path.name}"] = status
            if status.state not in ("absent", "matches"):
                yield f"{status.state}-certificate", status.message
        if path.suffix == ".onnx":
            yield from self._check_onnx(
                config, version, path / path.name if path.is_dir() else path
            )
        elif path.suffix == ".plan":
            self.sidecar, faults = read_plan(self.name, path)
            yield from faults
            if self.sidecar is not None:
                spec = self.sidecar.spec
                losses = () if spec is None else (Loss.of(spec),)
                yield from check_against_file(config, engine_ports(self.sidecar), losses)

    def _check_onnx(self, config: Any, version: Path, path: Path) -> Iterator[Fault]:
        try:
            model = read_model(path)
        except CarriedEngineError as exc:
            yield "engine-inside", str(exc)
            return
        except ArtefactError as exc:
            yield "bad-model", str(exc)
            return
        # No CPU server has the provider of an engine, or is to load what nobody has read.
        libraries = config.model_operations.op_library_filename
        if all(map(is_library, libraries)) and not engines_in(model):
            self.sound[version] = path
        losses: tuple[Loss, ...] = ()
        try:
            losses = read_losses(model)
        except ArtefactError as exc:
            yield "damaged-metadata", str(exc)
        if is_changed(model) and read_certificate(path).state != "matches":
            yield "changed-model", CHANGED
        ports = onnx_ports(model)
        yield from check_against_file(config, ports, losses)
        # Where Triton batches, it holds the rows of the inputs against each other itself.
        several = any(port.dims is not None and port.dims.count(-1) > 1 for port in ports.inputs)
        for target, input in (
            unguarded(model, losses) if not config.max_batch_size or several else ()
        ):
            yield (
                "missing-guard",
                f"a {target!r} of one row would be broadcast to the rows of {input!r}, and the "
                "answer be wrong with status 200",
            )
