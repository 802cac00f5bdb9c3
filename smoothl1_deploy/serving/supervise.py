"""Looks after the models of a running server: each answers its canary, or is loaded anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import (
    ArtefactError,
    InvalidInputError,
    ServerError,
    SmoothL1DeployError,
    reason_of,
)
from ..parity.certificate import CertificateStatus, read_certificate
from .canary import Canary, make_canary
from .launcher import Server
from .model_config import CONFIG_FILE, read_config
from .stubs import is_alive, stubs_of
from .transport import Transport, open_transport

__all__ = ["Model", "Supervisor", "models_of"]

_CANARY_SECONDS = 10.0
_FILES = {"tensorrt_plan": "model.plan"}


@dataclass(frozen=True, slots=True)
class Model:
    """A model in service.

    Attributes:
        version: the one that answers.
        platform: Triton's.
        canary: None where the right answer can't be told; such a model is only loaded.
        certificate: what is beside the file that is served.
        processes: those that run it, under the embedded server.
    """

    name: str
    version: str
    platform: str
    canary: Canary | None
    certificate: CertificateStatus
    processes: frozenset[int] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "version": self.version,
            "platform": self.platform,
            "canary": self.canary is not None,
            "certificate": self.certificate.to_dict(),
        }


def models_of(server: Server, chosen: Iterable[str] | None = None) -> tuple[list[str], list[str]]:
    """The models of the server's repository that it can serve, and why it can't serve others.

    Args:
        server: its repository is read; it need not run.
        chosen: names; all by default.

    Raises:
        ArtefactError: when there is no model, a chosen one is missing, or a config is damaged.
    """
    found = sorted(path.parent.name for path in server.repository.glob(f"[!.]*/{CONFIG_FILE}"))
    names = found if chosen is None else list(chosen)
    for name in names:
        if name not in found:
            raise ArtefactError(
                f"{server.repository} has no model {name!r}; it has {', '.join(found) or 'none'}"
            )
    if not names:
        raise ArtefactError(
            f"{server.repository} has no folder with a {CONFIG_FILE}; smoothl1-deploy repository "
            "writes a model repository"
        )
    served, notes = [], []
    if chosen is None:
        folders = (path.name for path in server.repository.glob("[!.]*") if path.is_dir())
        notes = [
            f"{name} is left out: it has no {CONFIG_FILE}; smoothl1-deploy repository --lint "
            f"{server.repository} says what a model needs"
            for name in sorted({*folders} - {*found})
        ]
    for name in names:
        kind = _platform(server.repository / name)
        if server.triton.platforms is None or kind in server.triton.platforms:
            served.append(name)
        else:
            notes.append(
                f"{name} is left out: the embedded Triton has no {kind!r}; a tritonserver on PATH "
                "with that backend serves it"
            )
    if not served:
        raise ArtefactError("; ".join(notes))
    return served, notes


def _platform(folder: Path) -> str:
    try:
        config = read_config((folder / CONFIG_FILE).read_bytes())
    except (ArtefactError, OSError) as exc:
        reason = reason_of(exc) if isinstance(exc, OSError) else exc
        raise ArtefactError(f"can't read {folder / CONFIG_FILE}: {reason}") from exc
    return str(config.platform or config.backend)


class Supervisor:
    """The models of one server.

    Args:
        server: it runs.
        record: called with the name of each event and its fields; see `events`.
    """

    def __init__(self, server: Server, record: Callable[..., None]) -> None:
        self._server = server
        self._record = record
        self._transport: Transport = open_transport(
            server.addresses.to_dict()["grpc"], _CANARY_SECONDS, 0
        )
        self.models: dict[str, Model] = {}

    def bring_up(self, names: Iterable[str]) -> None:
        """Load every model and ask each its canary.

        Raises:
            ArtefactError: for a model that the server refuses, with its reason.
            ServerError: for a wrong answer.
        """
        for name in names:
            started = time.perf_counter()
            self._server.load(name)
            self.models[name] = self._model(name)
            self._check(self.models[name])
            self._record("loaded", model=name, seconds=time.perf_counter() - started)

    def _model(self, name: str) -> Model:
        metadata = self._server.metadata(name)
        version = max(metadata["versions"], key=int)
        platform = str(metadata["platform"])
        file = self._file(name, version, platform)
        source = file
        if platform == "tensorrt_plan":  # the ONNX model beside it has the same answers
            source = self._file(name.removesuffix("_trt"), version, "")
        canary = make_canary(source, name, version) if source.exists() else None
        model = Model(name, version, platform, canary, read_certificate(file))
        return replace(model, processes=self._processes(model))

    def _processes(self, model: Model) -> frozenset[int]:
        if not self._server.triton.embedded:
            return frozenset()
        folder = self._server.repository / model.name / model.version
        return stubs_of(self._server.pid, folder)

    def _file(self, name: str, version: str, platform: str) -> Path:
        folder = self._server.repository / name
        return folder / version / _FILES.get(platform, "model.onnx")

    def _check(self, model: Model) -> None:
        # One of a former load may have lived on for a moment when these were noted.
        if not all(map(is_alive, model.processes)) and not self._processes(model):
            raise ServerError(f"the process of {model.name!r} has died")
        if model.canary is not None:
            model.canary.check(self._transport)

    def check(self) -> bool:
        """One round: every model is asked, and one that fails is unloaded and loaded.

        Returns:
            Whether every model is well at the end of the round.

        Raises:
            ServerError: when the server itself has ended.
        """
        well = True
        for name, model in list(self.models.items()):
            try:
                self._check(self._current(model))
            except SmoothL1DeployError as exc:
                if self._server.exit_code is not None:
                    raise ServerError(
                        f"the Triton server ended by itself with {self._server.exit_code}; its "
                        "log says why"
                    ) from exc
                self._record("canary_failed", model=name, reason=str(exc))
                well &= self._reload(name)
        return well

    def _current(self, model: Model) -> Model:
        """The model as it is now: whoever has the admin key may have loaded another version."""
        version = max(self._server.metadata(model.name)["versions"], key=int)
        if version != model.version:
            self._record("version", model=model.name, version=version, before=model.version)
            self.models[model.name] = model = self._model(model.name)
        return model

    def _reload(self, name: str) -> bool:
        started = time.perf_counter()
        try:
            # Loading alone does nothing for a model whose files didn't change.
            self._server.unload(name)
            self._load_newest(name)
            self.models[name] = self._model(name)
            self._check(self.models[name])
        except (ArtefactError, InvalidInputError, ServerError) as exc:
            self._record("reload_failed", model=name, reason=str(exc))
            return False
        self._record("reloaded", model=name, seconds=time.perf_counter() - started)
        return True

    def _load_newest(self, name: str) -> None:
        """Load what the config asks for; the version that served before where that is broken."""
        try:
            self._server.load(name)
        except ArtefactError as exc:
            version = self.models[name].version
            self._record("version_refused", model=name, instead=version, reason=str(exc))
            self._server.load(name, version)

    def close(self) -> None:
        """Give the connection back."""
        self._transport.close()
