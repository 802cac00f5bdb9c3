"""The lint of a Triton model repository: this tool's or anyone's, without a server.

Triton's own parser takes much that its loader refuses, and its loader much that answers wrongly.
The rules stand in docs/serving-repository.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artefact import read_model
from ..errors import ArtefactError, CarriedEngineError
from ..graph.metadata import CHANGED, is_changed
from ..model import Loss
from ..parity.certificate import CertificateStatus, read_certificate
from ..tensorrt.sidecar import Sidecar
from .finding import Finding
from .lint_config import check_against_file, check_config, model_file
from .lint_graph import unguarded
from .lint_plan import check_versions, read_plan
from .losses import read_losses
from .model_config import CONFIG_FILE, read_config
from .ports import engine_ports, onnx_ports

__all__ = ["LintReport", "lint"]


@dataclass(frozen=True, slots=True)
class LintReport:
    """What the lint found. True where it found nothing.

    Attributes:
        repository: the folder.
        models: the names of its models.
        findings: in the order of the models.
        certificates: model file, as seen from the repository -> what its certificate says.
    """

    repository: Path
    models: tuple[str, ...]
    findings: tuple[Finding, ...]
    certificates: dict[str, CertificateStatus]

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
        }


def lint(repository: str | os.PathLike[str], *, tensorrt_version: str | None = None) -> LintReport:
    """Check every model of a repository.

    Args:
        repository: a folder of model folders.
        tensorrt_version: of the server that is to load its plans, as far as it is known; without
            it the plans are held against each other.

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
    visits = [_Visit(folder) for folder in folders]
    findings = [finding for visit in visits for finding in visit.findings]
    sidecars = {visit.name: visit.sidecar for visit in visits if visit.sidecar is not None}
    findings += check_versions(sidecars, tensorrt_version)
    return LintReport(
        root,
        tuple(visit.name for visit in visits),
        tuple(findings),
        {file: status for visit in visits for file, status in visit.certificates.items()},
    )


class _Visit:
    """One model folder, looked through."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.sidecar: Sidecar | None = None
        self.certificates: dict[str, CertificateStatus] = {}
        self._folder = folder
        self.findings: list[Finding] = []
        config = self._config()
        if config is None:
            return
        self.findings += check_config(self.name, config)
        if config.platform == "ensemble":
            return
        for version in self._versions():
            self.findings += self._check_version(config, version)

    def _found(self, rule: str, problem: str, remedy: str) -> None:
        self.findings.append(Finding(self.name, rule, problem, remedy))

    def _config(self) -> Any:
        path = self._folder / CONFIG_FILE
        try:
            return read_config(path.read_bytes())
        except FileNotFoundError:
            self._found(
                "no-config",
                f"there is no {CONFIG_FILE}, and a server that guesses one guesses batching too",
                "write one, or let smoothl1-deploy repository write it",
            )
        except OSError as exc:
            self._found("bad-config", f"{CONFIG_FILE}: {exc.strerror}", "make it readable")
        except ArtefactError as exc:
            self._found("bad-config", f"{CONFIG_FILE}: {exc}", "mend the text where it says so")
        return None

    def _versions(self) -> list[Path]:
        """The folders that Triton takes for versions: numbers from 1 on."""
        found = [p for p in self._folder.iterdir() if p.is_dir() and p.name.isdecimal()]
        found = sorted((p for p in found if p.name[0] != "0"), key=lambda path: int(path.name))
        if not found:
            self._found(
                "no-version",
                "there is no version folder, and Triton loads nothing without one",
                f"put the model file into {self.name}/1",
            )
        return found

    def _check_version(self, config: Any, version: Path) -> Iterator[Finding]:
        file = model_file(config)
        if file is None:  # of a backend that anyone may have written
            return
        path = version / file
        if not path.exists():
            yield Finding(
                self.name,
                "no-model-file",
                f"version {version.name} has no {file}",
                f"put it there, or delete the folder {self.name}/{version.name}",
            )
            return
        if path.is_file():
            yield from self._check_certificate(path, f"{self.name}/{version.name}/{file}")
        if path.suffix == ".onnx":
            yield from self._check_onnx(config, path / file if path.is_dir() else path)
        elif path.suffix == ".plan":
            self.sidecar, findings = read_plan(self.name, path)
            yield from findings
            if self.sidecar is not None:
                spec = self.sidecar.spec
                losses = () if spec is None else (Loss.of(spec),)
                yield from check_against_file(self.name, config, engine_ports(self.sidecar), losses)

    def _check_onnx(self, config: Any, path: Path) -> Iterator[Finding]:
        try:
            model = read_model(path)
        except CarriedEngineError as exc:
            remedy = "serve the model that it was built from"
            yield Finding(self.name, "engine-inside", str(exc), remedy)
            return
        except ArtefactError as exc:
            remedy = "write the file again"
            yield Finding(self.name, "bad-model", str(exc), remedy)
            return
        losses: tuple[Loss, ...] = ()
        try:
            losses = read_losses(model)
        except ArtefactError as exc:
            remedy = "write the model again with smoothl1-deploy repository"
            yield Finding(self.name, "damaged-metadata", str(exc), remedy)
        if is_changed(model) and read_certificate(path).state != "matches":
            remedy = f"smoothl1-deploy verify {path} --certificate; a green certificate settles it"
            yield Finding(self.name, "changed-model", CHANGED, remedy)
        ports = onnx_ports(model)
        yield from check_against_file(self.name, config, ports, losses)
        # Where Triton batches, it holds the rows of the inputs against each other itself.
        several = any(port.dims is not None and port.dims.count(-1) > 1 for port in ports.inputs)
        for target, input in (
            unguarded(model, losses) if not config.max_batch_size or several else ()
        ):
            yield Finding(
                self.name,
                "missing-guard",
                f"a {target!r} of one row would be broadcast to the rows of {input!r}, and the "
                "answer be wrong with status 200",
                f"put Reshape({target}, Shape({input})) before the loss: smoothl1-deploy "
                "repository --model does",
            )

    def _check_certificate(self, path: Path, shown: str) -> Iterator[Finding]:
        status = self.certificates[shown] = read_certificate(path)
        if status.state not in ("absent", "matches"):
            yield Finding(
                self.name,
                f"{status.state}-certificate",
                status.message,
                "write a new one with smoothl1-deploy verify --certificate",
            )
