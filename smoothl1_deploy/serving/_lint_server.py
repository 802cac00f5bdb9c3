"""Triton's own words on a repository: a server loads each model, and says what it refuses.

Nothing of the repository runs. The server gets a mirror of it in a private folder, under names of
ours, since its Python backend hands paths to a shell. In the place of what is code (a backend, a
plan, an operator library, an agent, an environment) stands `_stand_in`, and an ONNX file is written
anew after it was read without trust. Of operator libraries only this installation's is named.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import secrets
import shutil
import signal
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from .._artefact import read_model
from ..errors import ArtefactError, BackendUnavailableError, MissingDependencyError, ServerError
from ..ops import library
from . import _stand_in as stand_in
from ._config import BACKENDS, CONFIG_FILE, ONNX_FILE, dump_config
from ._embedded import Triton, find_triton
from ._private import PrivateFolder
from ._server import Server

if TYPE_CHECKING:
    from ._lint import Visit

_POLL_FAILED = re.compile(r"Poll failed for model directory '(.+?)': (.*?)\"?$", re.MULTILINE)

#: The fields of a config that have code run or files written, that name the model's file, or that
#: are newer than Triton 2.51.
_LEFT_OUT = (
    *("runtime", "parameters", "optimization", "model_repository_agents", "model_operations"),
    *("default_model_filename", "cc_model_filenames", "model_transaction_policy", "model_metrics"),
)

#: The bytes that a server may take beside what the models weigh: a warm-up can ask for any number.
_MEMORY = 4 << 30
_SECONDS = 60.0  # how long the server may take to load one model


def refusals(visits: Iterable[Visit]) -> tuple[dict[str, str], str]:
    """The models that Triton refuses, each with its words, and why it was not asked if it was not.

    Args:
        visits: the models whose configs can be read.
    """
    try:
        triton = find_triton()
        with PrivateFolder() as folder:
            return _Mirror(folder, triton).ask(visits)
    except (MissingDependencyError, BackendUnavailableError, ServerError) as exc:
        return {}, str(exc)


class _Mirror:
    """A repository of ours in whose configs a server finds the faults that the stranger's have."""

    def __init__(self, folder: Path, triton: Triton) -> None:
        self._root, self._log = folder / "models", folder / "triton.log"
        self._triton = triton
        self._token = f"x{secrets.token_hex(6)}-"
        self._names = {"": ""}  # the stranger's name -> ours

    def ask(self, visits: Iterable[Visit]) -> tuple[dict[str, str], str]:
        """What `refusals` gives.

        Raises:
            ServerError: when no server can be started.
        """
        own = self._root / f"{self._token}own"
        (own / "1").mkdir(parents=True)
        shutil.copy(stand_in.__file__, own / "1" / "model.py")
        (own / CONFIG_FILE).write_text('backend: "python"')
        names = [own.name, *map(self._add, visits)]  # a model of our own goes first
        refused: dict[str, str] = {}
        while names and own.name not in refused:
            server = Server(self._root, self._triton, log=self._log, private=True)
            server.start()
            try:
                memory = _MEMORY + 4 * sum(f.stat().st_size for f in self._root.rglob(ONNX_FILE))
                resource.prlimit(server.pid, resource.RLIMIT_DATA, (memory, memory))
                for asked, name in enumerate(list(names)):
                    try:
                        _load(server, name)
                        server.unload(name)
                    except ArtefactError as exc:
                        refused[name] = str(exc).partition(f"{name!r}: ")[2].rstrip(";")
                    except ServerError:
                        if asked:  # the model before may be the cause: a new server tells
                            break
                        refused[name] = "nothing, and crashes or hangs while it loads this"
                    names.remove(name)
            finally:
                server.stop(at_once=True)
        # Of a model that fails before it is loaded, the log alone says why.
        logged = _POLL_FAILED.findall(self._log.read_text(errors="replace"))
        refused |= {name: words for name, words in logged if name in refused}
        if own.name in refused:
            return {}, f"{self._triton.binary} can't load a model of Python: {refused[own.name]}"
        return {self._shown(n): f"Triton says: {self._shown(w)}" for n, w in refused.items()}, ""

    def _ours(self, given: str) -> str:
        """A name that is safe in a path, always the same for the same given name."""
        return self._names.setdefault(given, f"{self._token}{len(self._names):06}")

    def _shown(self, text: str) -> str:
        """A text of the server, with the names as the repository has them."""
        text = text.replace(f"{self._root}/", "")
        for given, ours in self._names.items():
            text = text.replace(ours, given) if ours else text
        return text

    def _add(self, visit: Visit) -> str:
        """Add a model to the mirror; gives its name there."""
        folder = self._root / self._ours(visit.name)
        folder.mkdir()
        config = self._config(visit, folder)
        (folder / CONFIG_FILE).write_bytes(dump_config(config))
        for version in visit.versions:
            mirrored = folder / version.name
            mirrored.mkdir()
            if config.backend == "python":
                shutil.copy(stand_in.__file__, mirrored / "model.py")
            if version in visit.sound:
                onnx.save(read_model(visit.sound[version]), mirrored / ONNX_FILE)
        return folder.name

    def _config(self, visit: Visit, folder: Path) -> Any:
        config = type(visit.config)()
        config.CopyFrom(visit.config)
        config.name = self._ours(config.name)
        for field in _LEFT_OUT:
            config.ClearField(field)
        if visit.sound and visit.config.model_operations.op_library_filename:
            config.model_operations.op_library_filename.append(str(library()))
        for step in config.ensemble_scheduling.step:
            step.model_name = self._ours(step.model_name)
        if config.HasField("ensemble_scheduling"):
            config.ensemble_scheduling.ClearField("max_inflight_requests")
        for sample in config.model_warmup:
            sample.batch_size, sample.count = min(sample.batch_size, 1), 1
        self._link_files(visit, config, folder)
        if config.platform == "ensemble":
            return config
        # An instance group is kept only if it is wrong on a machine with GPUs too: if it names some
        # and is of KIND_CPU or KIND_MODEL, 2 and 3.
        groups = [group for group in config.instance_group if group.gpus and group.kind > 1]
        config.ClearField("instance_group")
        config.instance_group.extend(groups[:1])
        custom = config.backend not in BACKENDS and (config.backend or "." in visit.name)
        if (visit.kind or custom) and (self._triton.embedded or not visit.sound):
            config.backend = "python"
            # By its platform Triton knows a TensorRT model, which may have inputs of more kinds.
            config.platform = config.platform or (visit.kind[1] if visit.kind else "")
        return config  # a config without a backend that anyone knows is one that Triton refuses

    def _link_files(self, visit: Visit, config: Any, folder: Path) -> None:
        """Name the files beside a config by links of ours, which are there where the files are."""
        warm = (i for sample in config.model_warmup for i in sample.inputs.values())
        starts = (i for state in config.sequence_batching.state for i in state.initial_state)
        for beside, field, messages in (
            ("", "label_filename", config.output),
            ("warmup", "input_data_file", warm),
            ("initial_state", "data_file", starts),
        ):
            for message in messages:
                if given := getattr(message, field):
                    setattr(message, field, self._ours(given))
                    link = folder / beside / self._ours(given)
                    source = visit.folder / beside / given
                    if os.path.isfile(source) and not os.path.lexists(link):
                        link.parent.mkdir(exist_ok=True)
                        link.symlink_to(os.path.abspath(source))


def _load(server: Server, name: str) -> None:
    """Load a model, within the time that it may take; at once where the server crashes over it."""
    with ThreadPoolExecutor(1) as pool:
        loading, end = pool.submit(server.load, name), time.monotonic() + _SECONDS
        try:
            while server.exit_code is None and time.monotonic() < end:
                if wait([loading], 0.1).done:
                    break
        finally:
            if not loading.done():  # the children of a dead server keep its connection open
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
    loading.result()
