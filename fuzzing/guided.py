"""`scripts/fuzz --guided TARGET`: atheris chooses the bytes by the lines of the package they reach.

It helps where a reader is Python (sidecars, journals, .npy headers, arguments); the parsers in C++
are not instrumented. It runs in one process: a crash ends it, and atheris keeps the input.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NoReturn

import atheris

from .target import buffer_of, check_case, draw


def run_guided(module: str, name: str, cases: int, seed: int, output: Path) -> NoReturn:
    """Run about `cases` cases of one target; doesn't return: libFuzzer ends the process."""
    from .pool import targets_of

    with atheris.instrument_imports(include=["smoothl1_deploy"]):
        target = targets_of(module)[name]
    drawer = draw(target)
    counts: Counter[str] = Counter()
    calls = itertools.count(1)

    def one(data: bytes) -> None:
        number = next(calls)
        for case in drawer(data):
            outcome = check_case(target, case)
            counts[outcome.kind] += 1
            if outcome.kind == "fault":
                raise AssertionError(f"FAULT {name}: {outcome.case}\n{outcome.detail}")
        if number == cases:  # libFuzzer ends the process without a word to Python
            refused, faults = counts["refused"], counts["fault"]
            print(f"{counts.total()} cases, {refused} refused, {faults} faults", flush=True)

    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    for index in range(50):  # libFuzzer begins with short inputs, which give no case
        (corpus / str(index)).write_bytes(buffer_of(name, seed, index))
    output.mkdir(parents=True, exist_ok=True)
    options = [
        f"-runs={cases}",
        f"-seed={seed or 1}",
        "-max_len=4096",
        f"-artifact_prefix={output}/",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()
    raise SystemExit(0)
