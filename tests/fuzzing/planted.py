"""Targets with planted faults, for the tests of the fuzzing itself."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from hypothesis import strategies as st

from fuzzing.target import Target
from smoothl1_deploy import LossSpec


def _check(case: str, folder: Path) -> None:
    if case == "refused":
        LossSpec(beta=-1)
    elif case == "bug":
        raise ZeroDivisionError("planted")
    elif case == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif case == "hang":
        time.sleep(60)
    elif case == "litter":
        (folder / ".loss.onnx.0123456789abcdef").write_bytes(b"half")
    elif case == "exit":
        raise SystemExit(0)


TARGETS = [
    Target(
        name,
        st.tuples(st.just(name), st.integers(0, 9)).map(lambda pair: pair[0]),
        _check,
        share=1,
        limit=0.5 if name == "hang" else 60,  # a busy machine makes no hang of the others
    )
    for name in ("fine", "refused", "bug", "crash", "hang", "litter", "exit")
]
