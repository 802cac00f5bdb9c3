"""The hooks of pytest: options, header, skips and expected failures, results as JSON.

Every pytest finds this module, by its entry point, where the package is installed. It adds nothing
until the suite is asked for: `--loss` and `--backend` may be options of a stranger's tests too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..errors import SmoothL1DeployError, SpecError, reason_of, require

if TYPE_CHECKING:
    from ..backends._base import Backend

_ASKED = re.compile(r"smoothl1_deploy\.conformance(\._suite)?(::|$)")
_MODULE = Path(__file__).with_name("_suite.py")

_HOSTILE = ("test_read_only", "test_strided", "test_one_core")

#: Option -> its value, and what `--help` says.
_OPTIONS = {
    "--loss": ("NAME", "try module:callable, or one of ours: eager, compiled, aot, openvino, ..."),
    "--backend": ("NAME", "try a runner of ONNX files: module:Class, or an installed backend"),
    "--skips-file": ("FILE", "tests not to run: a line each, pattern  # reason"),
    "--xfails-file": ("FILE", "tests that are known to fail, and have to: likewise"),
    "--results": ("FILE", "write what was found as JSON"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> None:
    """Bring the suite's options and hooks, where an argument names the suite."""
    if not any(_ASKED.match(word) for word in args):
        return
    group = parser.getgroup("conformance", "conformance of a Smooth L1 loss")
    for option, (value, text) in _OPTIONS.items():
        group.addoption(option, metavar=value, help=text)
    early_config.pluginmanager.register(_Conformance())


class _Conformance:
    """The hooks of a run of the suite, and what it has found."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        """Name the mark of the hostile variants."""
        config.addinivalue_line("markers", "hostile: arrays or threads that a loss may trip over")

    @pytest.hookimpl(wrapper=True)
    def pytest_collect_file(
        self, file_path: Path, parent: pytest.Collector
    ) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
        """The suite's tests, once, whatever names of files pytest was told to look for."""
        found = yield
        is_ours = file_path == _MODULE and not found
        return [pytest.Module.from_parent(parent, path=file_path)] if is_ours else found

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Find what is to be tried, or say why it can't be."""
        try:
            require("torch", "torch", "the suite, which compares with PyTorch,")
            from ._suite import SUBJECT

            session.config.stash[SUBJECT] = _subject(session.config)
        except SmoothL1DeployError as exc:
            raise pytest.UsageError(str(exc)) from exc

    def pytest_report_header(self, config: pytest.Config) -> str:
        """What is tried, and against what."""
        from .. import __version__
        from .._environment import version_of
        from ._suite import BETAS, SPECS, VALUES

        return (
            f"conformance of {_tried(config)} by smoothl1-deploy {__version__}, against PyTorch "
            f"{version_of('torch')} and the exact value: {len(SPECS)} specs of {len(BETAS)} betas, "
            f"{len(VALUES)} cases each, then shapes, sizes and hostile arrays"
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Say of each test of the suite what it is of; mark what the files name."""
        ours = [item for item in items if item.path == _MODULE]
        for item in ours:
            spec = item.callspec.params["spec"]  # type: ignore[attr-defined]
            item.user_properties.append(("spec", spec.to_dict()))
            if item.name.startswith(_HOSTILE):
                item.add_marker("hostile")
        for option, mark in (
            ("skips_file", pytest.mark.skip),
            ("xfails_file", partial(pytest.mark.xfail, strict=True)),
        ):
            for where, pattern, reason in _rules(config.getoption(option)):
                met = [item for item in ours if _is_named(item.name, pattern)]
                for item in met:
                    item.add_marker(mark(reason=reason))
                if not met:
                    raise pytest.UsageError(f"{where}: {pattern} names no test; take it out")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a test has found."""
        name, told = report.nodeid.rpartition("::")[2], dict(report.user_properties)
        if "spec" in told and (report.when == "call" or not report.passed):
            self.found[name] = {"test": name, "outcome": _outcome(report), "wrong": [], **told}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the results: once, where several processes have found them."""
        file = session.config.getoption("results")
        if not (file and self.found) or hasattr(session.config, "workerinput"):
            return
        from .._environment import environment, now
        from .._files import write_atomic
        from ._losses import versions_of

        facts, name = environment(), _tried(session.config)
        facts = {**facts, "packages": {**facts["packages"], **versions_of(name)}}
        found = {"tried": name, "date": now(), **facts, "tests": [*self.found.values()]}
        write_atomic(file, json.dumps(found, indent=1).encode() + b"\n")


def _tried(config: pytest.Config) -> str:
    return str(config.getoption("loss") or config.getoption("backend"))


def _subject(config: pytest.Config) -> Callable[[int], Backend]:
    """Makes what is tried, for a number of threads.

    Raises:
        SpecError: for none, for two, and for what isn't there.
        MissingDependencyError: where what it lives on isn't installed.
    """
    from ..backends._base import get_backend
    from ._losses import find_loss
    from ._subject import LossBackend

    loss, backend = config.getoption("loss"), config.getoption("backend")
    if bool(loss) == bool(backend):
        raise SpecError("give one of --loss module:callable and --backend module:Class")
    if backend:
        get_backend(backend)
        return partial(get_backend, backend)
    found = LossBackend(find_loss(loss))
    return lambda threads: found


def _rules(file: str | None) -> Iterator[tuple[str, str, str]]:
    """Where each line of a file stands, its pattern and its reason."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, ValueError) as exc:
        raise pytest.UsageError(f"{file} can't be read: {reason_of(exc)}") from exc
    for number, line in enumerate(lines, 1):
        pattern, _, reason = map(str.strip, line.partition("#"))
        where = f"{file}, line {number}"
        if pattern and not reason:
            raise pytest.UsageError(f"{where}: {pattern} has no reason; add one behind a #")
        if pattern:
            yield where, pattern, reason


def _is_named(name: str, pattern: str) -> bool:
    """Whether a pattern, in which `*` stands for anything, is a test's name."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def _outcome(report: pytest.TestReport) -> str:
    """What came of a test, by pytest's own words."""
    if hasattr(report, "wasxfail"):
        return "xfailed"
    return "xpassed" if str(report.longrepr).startswith("[XPASS") else report.outcome
