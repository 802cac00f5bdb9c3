"""`Target`: an entry of the package, what is drawn for it, and one case of it from bytes."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoothl1_deploy._files import is_unfinished
from smoothl1_deploy.errors import SmoothL1DeployError

_BUFFER = 4096  # bytes a case is drawn from
_SHOWN = 4000  # characters of a case in its record


@dataclass(frozen=True)
class Target:
    """One entry.

    Attributes:
        name: on the command line.
        cases: what `check` gets.
        check: calls the entry; it may write in the folder it gets, which is the current one. It
            raises AssertionError where a result contradicts itself.
        share: of all cases, relative to the others.
        limit: seconds after which a case counts as a hang: far more than any needs.
    """

    name: str
    cases: st.SearchStrategy[Any]
    check: Callable[[Any, Path], object]
    share: int = 10
    limit: float = 60.0


@dataclass
class Outcome:
    """How a case ended.

    Attributes:
        kind: `"result"`, `"refused"` (an error of this package), `"fault"`, or `"nothing"` where
            the bytes gave no case.
        detail: the class of the error, or the traceback of the fault.
        case: what was drawn, as text.
    """

    kind: str = "nothing"
    detail: str = ""
    case: str = ""


def buffer_of(target: str, seed: int, index: int) -> bytes:
    """The bytes that case `index` of a run is drawn from."""
    return random.Random(f"{target}:{seed}:{index}").randbytes(_BUFFER)


def draw(target: Target) -> Callable[[bytes], list[Any]]:
    """Gives a function from bytes to the one case drawn from them, or to nothing."""
    drawn: list[Any] = []

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(target.cases)
    def body(case: Any) -> None:
        drawn.append(case)

    one: Callable[[bytes], object] = body.hypothesis.fuzz_one_input  # type: ignore[attr-defined]

    def from_bytes(buffer: bytes) -> list[Any]:
        drawn.clear()
        one(buffer)
        return drawn[:]

    return from_bytes


def check_case(target: Target, case: Any) -> Outcome:
    """Run one case in a folder of its own."""
    outcome = Outcome("result", case=show(case))
    folder = Path(tempfile.mkdtemp(prefix="case-")).resolve()
    before = os.getcwd()
    os.chdir(folder)
    try:
        target.check(case, folder)
    except SmoothL1DeployError as exc:
        outcome.kind, outcome.detail = "refused", f"{type(exc).__name__}: {exc}"
    except KeyboardInterrupt:
        raise
    except BaseException:
        outcome.kind, outcome.detail = "fault", traceback.format_exc()
    finally:
        left = [path.name for path in folder.rglob(".*") if is_unfinished(path.name)]
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
    if left:
        outcome.kind, outcome.detail = "fault", f"left behind: {left}\n{outcome.detail}"
    return outcome


def show(case: Any) -> str:
    """`case` as text, however long or unprintable it is."""
    try:
        text = repr(case)
    except Exception as exc:  # an integer of 5,000 digits has no repr
        text = f"<{type(case).__name__} without a repr: {exc}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
