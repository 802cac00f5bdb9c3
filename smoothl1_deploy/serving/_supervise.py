"""A server in service: its models are loaded, tried and looked after, until it ends.

Triton calls a model "ready" whose process died, so each model is asked a *canary*: a small request
with a known answer. The oracle knows the answer of a loss, the ONNX reference evaluator that of
another model.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .._artefact import check_spec, read_model, signature
from .._files import check_writable, refusal_told, write_atomic
from .._floats import NUMPY_DTYPE, Array, dtype_name, ulp_distance
from .._model import axes_of, inputs_of
from ..errors import (
    ArtefactError,
    OutputError,
    ServerError,
    SmoothL1DeployError,
    require,
)
from ..graph._metadata import SPEC, read_spec
from ..parity._certificate import CertificateStatus, certificate_path, read_certificate
from ..reference._oracle import exact_outputs
from ._config import ONNX_FILE, PLAN_FILE, PLAN_PLATFORM
from ._onnxruntime_backend import CANARY_ID
from ._private import Stamp
from ._server import LOAD_SECONDS, Said, Server
from ._transport import HttpTransport, Transport, open_transport

_CANARY_SECONDS = 10.0

_BETA = 0.5
_ROWS = 2
_ULP = 8  # how far a loss may be off; the parity matrix is the judge of its accuracy
#: How far the output of another model may be off, relative to the largest number in it: the model
#: may sum any number of values, in any order.
_RELATIVE = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 1e-3, "float64": 1e-6}


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """A request to one version of a model, and the right answer.

    Attributes:
        model: the name of the model.
        version: the version of the model.
        inputs: what is sent, by the names of the model's inputs.
        expected: the right answer, by the names of its outputs.
        exact: whether the oracle gave the answer, which the server's must meet within a few ULP.
    """

    model: str
    version: str
    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]
    exact: bool

    def check(self, transport: Transport) -> None:
        """Ask, and compare.

        Raises:
            ServerError: on a wrong number, and as `Transport.infer`.
        """
        outputs = transport.infer(self.model, self.version, self.inputs, CANARY_ID)
        for name, expected in self.expected.items():
            got = outputs.get(name)
            if got is None or not self._same(got, expected):
                raise ServerError(
                    f"the canary of {self.model!r} is wrong: {name} is {_shown(got)}, and should "
                    f"be {_shown(expected)}"
                )

    def _same(self, got: Array, expected: Array) -> bool:
        # A served graph's output may have an axis of size 1 that the oracle's has not.
        if got.dtype != expected.dtype or got.size != expected.size:
            return False
        a, b = got.reshape(-1), expected.reshape(-1)
        if self.exact:
            return bool(np.all(ulp_distance(a, b) <= _ULP)) and not np.isnan(a).any()
        if dtype_name(a.dtype) not in _RELATIVE:
            return bool(np.array_equal(a, b))
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        allowed = _RELATIVE[dtype_name(a.dtype)] * float(np.max(np.abs(wide_b), initial=0.0))
        return bool(np.all(np.abs(wide_a - wide_b) <= allowed))


def _shown(array: Array | None) -> str:
    return "missing" if array is None else f"{np.ravel(array)[:4].tolist()} {array.dtype}"


def make_canary(file: Path, model: str, version: str) -> Canary | None:
    """The canary of a model file; None where nobody can tell the right answer.

    Args:
        file: the ONNX file that the server serves.
        model: the model's name on the server.
        version: the version of the model that the file is.

    Raises:
        ArtefactError: when the file can't be read, or its metadata say what isn't so.
    """
    graph = read_model(file)
    inputs = _inputs(graph)
    if inputs is None:
        return None
    spec = read_spec(graph)
    if spec is None:
        expected = _evaluated(graph, inputs)
        return expected and Canary(model, version, inputs, expected, False)
    ports = signature(graph)
    check_spec(ports, spec)
    roles = {role: inputs[port.name] for role, port in ports.inputs.items()}
    number = spec.at(roles.pop("beta").reshape(spec.beta_shape)) if spec.runtime_beta else spec
    try:
        return Canary(model, version, inputs, exact_outputs(number, **roles), True)
    except (TypeError, ValueError) as exc:  # the oracle refuses the dtypes, or the shapes
        raise ArtefactError(
            f"the model's metadata say that it computes {spec.to_dict()}, and its inputs don't fit "
            f"that ({exc}); delete its entry {SPEC}, or export the loss again"
        ) from exc


def _evaluated(graph: onnx.ModelProto, inputs: Mapping[str, Array]) -> Any:
    from onnx.reference import ReferenceEvaluator

    try:
        values = ReferenceEvaluator(graph).run(None, dict(inputs))
    except Exception:  # each operator that the evaluator lacks raises a class of its own
        return None
    names = [value.name for value in graph.graph.output]
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def _inputs(model: onnx.ModelProto) -> dict[str, Array] | None:
    """Arrays for the inputs, the same each time, with numbers on either side of beta = 1.

    None where numpy has no numbers of an input's type.
    """
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for value in inputs_of(model):
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        except KeyError:
            return None
        shape = [dim if isinstance(dim, int) else _ROWS for dim in axes_of(value) or ()]
        numbers = rng.normal(size=shape) * 2
        if value.name in ("weight", "beta", "divisor"):
            numbers = np.full(shape, _BETA)
        if dtype_name(dtype) not in NUMPY_DTYPE:
            numbers = np.ones(shape)
        arrays[value.name] = numbers.astype(dtype)
    return arrays


@dataclass(frozen=True, slots=True)
class Model:
    """A model in service.

    Attributes:
        name: the name of the model.
        version: the version that answers.
        platform: Triton's word for its kind.
        canary: None where nobody can tell the right answer; such a model is only loaded.
        certificate: what stands beside the file that is served.
        stamp: the files that the canary and the certificate were made from.
        processes: the embedded server's processes that run the model, as psutil has them.
    """

    name: str
    version: str
    platform: str
    canary: Canary | None
    certificate: CertificateStatus
    stamp: Stamp
    processes: frozenset[Any] = frozenset()

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
        server: one that runs.
        record: called with the name of each event and its fields; see docs/serving.md.
    """

    def __init__(self, server: Server, record: Callable[..., None]) -> None:
        self._server = server
        self._record = record
        self._transport: Transport = open_transport(
            server.addresses.to_dict()["grpc"], _CANARY_SECONDS, 0
        )
        self._psutil = require("psutil", "serve", "serving")
        self._refused: dict[str, Said] = {}
        self.models: dict[str, Model] = {}

    def bring_up(self, strict: bool = False) -> None:
        """Ask each model its canary; a model that the server refused is left out.

        Args:
            strict: whether a model that the server refused is an error.

        Raises:
            ArtefactError: with the server's reasons, when it refused all models; with `strict`,
                when it refused one.
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
        """What the server said last of each model; versions that it refused are withheld."""
        latest = {}
        for said in self._server.log.news():
            if self._server.mirror.withholds(said.model, said.version):
                continue  # Triton was about to try the version once more
            latest[said.model] = said
            known = self._refused.pop(said.model, None)
            if not said.reason:
                continue
            self._refused[said.model] = said
            if said.version and self._server.withhold(said.model, said.version):
                del latest[said.model]  # what Triton says of the other versions is still to come
                event, fields = "version_refused", {"version": said.version}
            else:
                event, fields = "refused", {}
            if said != known:  # Triton repeats itself every second
                self._record(event, model=said.model, **fields, reason=said.reason)
        return latest

    def _loaded(self, name: str, latest: dict[str, Said]) -> None:
        """Wait until the server has said that it loaded a model.

        Raises:
            ArtefactError: with the server's reason, when it can't load the model.
            ServerError: when it says nothing of the model.
        """
        deadline = time.monotonic() + LOAD_SECONDS
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
        plan = platform == PLAN_PLATFORM
        file = self._server.repository / name / version / (PLAN_FILE if plan else ONNX_FILE)
        source = file
        if plan:  # the ONNX model beside it has the same answers
            other = self._server.repository / name.removesuffix("_trt")
            source = other / version / ONNX_FILE
        canary = make_canary(source, name, version) if source.exists() else None
        absent = CertificateStatus("absent", "no file to certify", certificate_path(file))
        certificate = read_certificate(file) if file.exists() else absent
        processes = self._processes(name, version)
        return Model(name, version, platform, canary, certificate, stamp, processes)

    def _processes(self, name: str, version: str) -> frozenset[Any]:
        """The embedded server's processes that run a version: each was given the version's path.

        A request to a model whose process died waits a second, and so do the requests behind it,
        the canary among them. To look at the process is faster.
        """
        start = f"{self._server.mirror.folder / name / version}/"
        if not self._server.triton.embedded:
            return frozenset()
        found = set()
        with contextlib.suppress(self._psutil.NoSuchProcess):  # the server itself has ended
            for process in self._psutil.Process(self._server.pid).children():
                with contextlib.suppress(self._psutil.Error):  # this process has ended
                    if any(word.startswith(start) for word in process.cmdline()):
                        found.add(process)
        return frozenset(found)

    def _lives(self, process: Any) -> bool:
        """Whether a process runs; a zombie, which Triton leaves of a killed one, does not."""
        with contextlib.suppress(self._psutil.NoSuchProcess):
            return bool(process.is_running() and process.status() not in ("zombie", "dead"))
        return False

    def _check(self, model: Model) -> None:
        # Among the noted processes may be one of a former load, which has ended since.
        alive = all(map(self._lives, model.processes))
        if not alive and not self._processes(model.name, model.version):
            raise ServerError(f"the process of {model.name!r} has died")
        if model.canary is not None:
            model.canary.check(self._transport)

    def check(self) -> bool:
        """One round: every model is asked its canary, and a model that fails is loaded anew.

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
        """Check a model as it was noted, or as the server has it by now."""
        if self._differs(model):
            # It is no fault of the model if the server hasn't taken its new files yet.
            with contextlib.suppress(SmoothL1DeployError):
                return self._renew(model)
        try:
            self._check(model)
        except SmoothL1DeployError:
            if not self._differs(model):
                raise
            self._renew(model)  # the server has taken the new files just now

    def _differs(self, model: Model) -> bool:
        """Whether the server answers with another version, or the version's files have changed."""
        version = max(self._transport.metadata(model.name, "")["versions"], key=int)
        stamp = self._server.mirror.stamp(model.name, version)
        return (version, stamp) != (model.version, model.stamp)

    def _renew(self, before: Model) -> None:
        """Note a model as it is now, if it is well."""
        model = self._model(before.name)
        self._check(model)
        self.models[model.name] = model
        if (model.version, model.stamp) != (before.version, before.stamp):
            event = "changed" if model.version == before.version else "version"
            self._record(event, model=model.name, version=model.version, before=before.version)

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


# The ready file


def claim_ready_file(path: Path) -> None:
    """Make sure that the path is free; the file that a killed server left there is removed.

    Raises:
        OutputError: when the file there belongs to a server that runs or is no ready file, and when
            none can be written.
    """
    if path.is_symlink() or path.exists():
        facts = _ready_facts(path)
        if _runs(facts):
            raise OutputError(
                f"{path} is the ready file of a server that runs (process {facts['pid']}, "
                f"{facts['http']}); end that one, or name another file"
            )
        _remove(path)
    check_writable(path)  # before the models are loaded


def withdraw_ready_file(path: Path, written: bytes) -> None:
    """Remove the file that was written, if nobody has put another one there.

    Raises:
        OutputError: when the file can't be removed.
    """
    with contextlib.suppress(OSError):
        if path.read_bytes() != written:
            return
    _remove(path)


def _ready_facts(path: Path) -> dict[str, Any]:
    """What the ready file of any server says."""
    with refusal_told(f"can't use {path} as the ready file", "name another file"):
        data = path.read_bytes()
    with contextlib.suppress(ValueError):
        facts = json.loads(data)
        if isinstance(facts, dict) and {"pid", "http", "models"} <= facts.keys():
            return facts
    raise OutputError(
        f"{path} is there and no ready file of a server; name another file, or remove it"
    )


def _remove(path: Path) -> None:
    with refusal_told(f"can't remove {path}", "remove it by hand"):
        path.unlink(missing_ok=True)


def _runs(facts: Mapping[str, Any]) -> bool:
    """Whether a server runs: its process lives and it answers, for ids of processes come again."""
    psutil = require("psutil", "serve", "serving")
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # no id, or no address
        lives = psutil.pid_exists(int(facts["pid"]))
        transport = open_transport(str(facts["http"]), 2, 0)
        return lives and isinstance(transport, HttpTransport) and transport.is_live()
    return False


# In service


class Events:
    """A structured log: one JSON object a line for each thing that happened to a server.

    Each object has `time` (UTC), `level`, `event`, `pid` and the event's own fields; durations are
    seconds.

    Args:
        path: the file that the lines are appended to, until `close`.

    Raises:
        OutputError: when the file can't be written.
    """

    #: The events that tell of something wrong; each has the fields `model` and `reason`.
    WARNINGS = ("canary_failed", "refused", "reload_failed", "version_refused")

    def __init__(self, path: Path) -> None:
        with refusal_told(f"can't write {path}", "choose another folder with --logs"):
            self._file = path.open("ab", buffering=0)

    def record(self, event: str, **fields: Any) -> None:
        """Add one event with its fields."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": "warning" if event in self.WARNINGS else "info",
            "event": event,
            "pid": os.getpid(),
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()},
        }
        with contextlib.suppress(OSError):  # a full disk is no reason to stop serving
            self._file.write((json.dumps(line, default=str) + "\n").encode())

    def close(self) -> None:
        """End the log."""
        self._file.close()


@contextlib.contextmanager
def service(
    server: Server,
    logs: Path,
    strict: bool = False,
    ready_file: Path | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Iterator[Supervisor]:
    """Start a server, yield when every model answers its canary, and end it.

    Args:
        server: one that was not started yet.
        logs: the folder for `events.jsonl`, which exists.
        strict: whether a model that the server refuses is an error; else the model is left out.
        ready_file: the file that is written, whole, when every model answered right, and again when
            something in it has changed, and removed at the end. The one that a killed server left
            there is removed before the start.
        note: called with each remark for people, such as what the server refuses.

    Raises:
        ArtefactError: for a repository or model that can't be served.
        ServerError: when the server ends, or a model's answer is wrong.
        OutputError: when a file can't be written.
    """
    if ready_file is not None:
        claim_ready_file(ready_file)
    for name, reason in server.left_out.items():
        note(f"{name} is left out: {reason}")
    started, written = time.perf_counter(), b""

    def record(event: str, **fields: Any) -> None:
        events.record(event, **fields)
        if event in events.WARNINGS:
            note(f"{fields['model']}: {event.replace('_', ' ')}: {fields['reason']}")
        elif event in ("changed", "version"):
            write()

    def facts() -> dict[str, Any]:
        return {
            **server.addresses.to_dict(),
            "pid": os.getpid(),
            "server": {"pid": server.pid, "embedded": server.triton.embedded},
            "repository": str(server.repository),
            "models": [model.to_dict() for model in supervisor.models.values()],
            "left_out": server.left_out,
        }

    def write() -> None:
        nonlocal written
        if ready_file is not None:
            written = (json.dumps(facts(), indent=1) + "\n").encode()
            write_atomic(ready_file, written)

    with contextlib.closing(Events(logs / "events.jsonl")) as events:
        try:
            with server, contextlib.closing(Supervisor(server, record)) as supervisor:
                supervisor.bring_up(strict)
                record("ready", seconds=time.perf_counter() - started, **facts())
                try:
                    write()
                    yield supervisor
                finally:
                    if ready_file is not None and written:
                        withdraw_ready_file(ready_file, written)
        finally:
            record("stopped")
