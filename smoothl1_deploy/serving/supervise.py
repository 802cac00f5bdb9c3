"""Looks after the models of a running server: each answers its canary, or is loaded anew."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ArtefactError, ServerError, SmoothL1DeployError
from ..parity.certificate import CertificateStatus, certificate_path, read_certificate
from .canary import Canary, make_canary
from .launcher import Server
from .mirror import Stamp
from .stubs import is_alive, stubs_of
from .transport import Transport, open_transport
from .triton_log import Said

__all__ = ["Model", "Supervisor"]

_CANARY_SECONDS = 10.0
_LOAD_SECONDS = 120.0
_FILES = {"tensorrt_plan": "model.plan"}


@dataclass(frozen=True, slots=True)
class Model:
    """A model in service.

    Attributes:
        version: the one that answers.
        platform: Triton's.
        canary: None where the right answer can't be told; such a model is only loaded.
        certificate: what is beside the file that is served.
        stamp: the files that canary and certificate were made from.
        processes: those that run it, under the embedded server.
    """

    name: str
    version: str
    platform: str
    canary: Canary | None
    certificate: CertificateStatus
    stamp: Stamp
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


class Supervisor:
    """The models of one server.

    Args:
        server: it runs.
        record: called with the name of each event and its fields; see `events`.
        changed: called when another version of a model answers, or its files have changed.
    """

    def __init__(
        self,
        server: Server,
        record: Callable[..., None],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._server = server
        self._record = record
        self._changed = changed
        self._transport: Transport = open_transport(
            server.addresses.to_dict()["grpc"], _CANARY_SECONDS, 0
        )
        self._refused: dict[str, Said] = {}
        self.models: dict[str, Model] = {}

    def bring_up(self, strict: bool = False) -> None:
        """Ask each model its canary; one that the server refused is left out.

        Args:
            strict: whether one that is refused is an error.

        Raises:
            ArtefactError: with the server's reasons, when it refused all; with `strict`, one.
            ServerError: for a wrong answer.
        """
        said = self._listen()
        for name in list(self._server.models):
            try:
                self._loaded(name, said)
            except ArtefactError as exc:
                if strict:
                    raise
                self._server.leave_out(name, str(exc))
                continue
            self.models[name] = self._model(name)
            self._check(self.models[name])
            self._record("loaded", model=name)
        if not self.models:
            raise ArtefactError("; ".join(self._server.left_out.values()))

    def _listen(self) -> dict[str, Said]:
        """What the server said last of each model; a version that it refused is withheld."""
        latest = {}
        for said in self._server.log.news():
            if self._server.mirror.withholds(said.model, said.version):
                continue  # it was about to try it once more
            latest[said.model] = said
            known = self._refused.pop(said.model, None)
            if not said.reason:
                continue
            self._refused[said.model] = said
            if said.version and self._server.withhold(said.model, said.version):
                del latest[said.model]  # what it says of the other versions is still to come
                event, fields = "version_refused", {"version": said.version}
            else:
                event, fields = "refused", {}
            if said != known:  # Triton says it every second
                self._record(event, model=said.model, **fields, reason=said.reason)
        return latest

    def _loaded(self, name: str, latest: dict[str, Said]) -> None:
        """Wait until the server has said that it loaded a model.

        Raises:
            ArtefactError: with its reason, when it says that it can't.
            ServerError: when it says nothing.
        """
        deadline = time.monotonic() + _LOAD_SECONDS
        while name not in latest:
            if self._server.exit_code is not None or time.monotonic() > deadline:
                raise ServerError(f"the Triton server says nothing of the model {name!r}")
            time.sleep(0.02)
            latest = self._listen()
        if reason := latest[name].reason:
            raise ArtefactError(f"the Triton server can't load the model {name!r}: {reason}")

    def _model(self, name: str) -> Model:
        metadata = self._transport.metadata(name, "")
        version = max(metadata["versions"], key=int)
        platform = str(metadata.get("platform", ""))
        stamp = self._server.mirror.stamp(name, version)
        file = self._file(name, version, platform)
        source = file
        if platform == "tensorrt_plan":  # the ONNX model beside it has the same answers
            source = self._file(name.removesuffix("_trt"), version, "")
        canary = make_canary(source, name, version) if source.exists() else None
        absent = CertificateStatus("absent", "no file to certify", certificate_path(file))
        certificate = read_certificate(file) if file.exists() else absent
        model = Model(name, version, platform, canary, certificate, stamp)
        return replace(model, processes=self._processes(model))

    def _processes(self, model: Model) -> frozenset[int]:
        if not self._server.triton.embedded:
            return frozenset()
        folder = self._server.mirror.folder / model.name / model.version
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
        """One round: every model is asked, and one that fails is loaded anew.

        Returns:
            Whether every model is well at the end of the round.

        Raises:
            ServerError: when the server itself has ended.
        """
        well = True
        self._server.mirror.update()
        self._listen()
        for model in list(self.models.values()):
            try:
                self._check_current(model)
            except SmoothL1DeployError as exc:
                if self._server.exit_code is not None:
                    raise ServerError(
                        f"the Triton server ended by itself with {self._server.exit_code}; its "
                        f"last words: {self._server.log.last_words()}"
                    ) from exc
                self._record("canary_failed", model=model.name, reason=str(exc))
                well &= self._reload(model)
        return well

    def _check_current(self, model: Model) -> None:
        """Check a model as it was, or as the server has it by now."""
        if self._differs(model):
            # The server may not have taken the new files yet, or never will.
            with contextlib.suppress(SmoothL1DeployError):
                return self._renew(model)
        try:
            self._check(model)
        except SmoothL1DeployError:
            if not self._differs(model):
                raise
            self._renew(model)  # it has taken them just now

    def _differs(self, model: Model) -> bool:
        version = max(self._transport.metadata(model.name, "")["versions"], key=int)
        stamp = self._server.mirror.stamp(model.name, version)
        return (version, stamp) != (model.version, model.stamp)

    def _renew(self, before: Model) -> None:
        """Take a model as it is now, if it is well."""
        model = self._model(before.name)
        self._check(model)
        self.models[model.name] = model
        if (model.version, model.stamp) != (before.version, before.stamp):
            event = "changed" if model.version == before.version else "version"
            self._record(event, model=model.name, version=model.version, before=before.version)
            self._changed()

    def _reload(self, model: Model) -> bool:
        started = time.perf_counter()
        try:
            self._server.reload(model.name)
            self._loaded(model.name, {})
            self._renew(model)
        except SmoothL1DeployError as exc:
            self._record("reload_failed", model=model.name, reason=str(exc))
            return False
        self._record("reloaded", model=model.name, seconds=time.perf_counter() - started)
        return True

    def close(self) -> None:
        """Give the connection back."""
        self._transport.close()
