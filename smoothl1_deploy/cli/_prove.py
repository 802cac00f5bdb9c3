"""`smoothl1-deploy prove`: every pair of input and target of a half format."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._files import check_writable, write_atomic
from ._console import INTERRUPTED, open_console, print_lines, print_note, progress_bar, typed
from ._options import BackendNames, Next, PlainRoute, Workers, end_unless, one_of, processes

if TYPE_CHECKING:
    from ..parity._pairs import Claim, Proof

EXAMPLE = "smoothl1-deploy prove --dtype float16 --beta 1 -o pairs-float16.json"

_HALF = ("float16", "bfloat16")
_SAVED = 10.0  # seconds between two writes of what is known


def prove(
    *,
    dtype: Annotated[str, one_of(*_HALF)] = "float16",
    beta: list[float] | None = None,
    backend: BackendNames = None,
    route: PlainRoute = "function",
    output: Path = Path("pairs.json"),
    md: Path | None = None,
    workers: Workers = 0,
    quick: bool = False,
) -> Next:
    """Hold all 2^32 pairs of a half format against the exact loss and PyTorch: none, its gradient.

    Exits with 1 where a pair is red. Takes minutes a beta; after Ctrl-C, or whatever else ended it,
    the same command goes on where it was. The table has all that the file knows of the format and
    the route.

    Options:
        dtype: Of input, target and loss.
        beta: 1 by default. Repeat for more.
        backend: By default ort-cpu and ort-cpu-bare: with our operators, and the file alone.
        route: How the file is made.
        output: The file of what is known, JSON, with which the next run goes on.
        md: The table as Markdown.
        workers: Processes; 0: one a core, at most 8.
        quick: Only every 64th input: does it run?
    """
    from ..parity._pairs import BACKENDS, Claim, Proof, read_proofs, table
    from ..parity._pairs import prove as try_pairs

    for path in (output, md):
        if path is not None:
            check_writable(path)
    known = {made.claim: made for made in (read_proofs(output) if output.exists() else ())}
    backends, cores = tuple(backend or BACKENDS), processes(workers)
    proofs = [Proof.begun(Claim(dtype, number, backends, route)) for number in beta or [1.0]]
    for proof in proofs:
        found = known.get(proof.claim)
        if found and found.environment != proof.environment:
            print_note(f"beta {proof.claim.beta:g} is begun again: it was made by other versions")
        elif found:
            proof = found
        known[proof.claim] = proof
        saved = time.monotonic()
        try:
            with progress_bar("prove") as progress:
                most = 1 if quick else None
                for step in try_pairs(proof, workers=cores, most=most, progress=progress):
                    known[proof.claim] = step
                    if time.monotonic() > saved + _SAVED:
                        _write(output, known)
                        saved = time.monotonic()
        except KeyboardInterrupt:
            _write(output, known)
            print_lines([f"wrote {output}; the same command goes on"])
            raise typer.Exit(INTERRUPTED) from None
        _write(output, known)
    of_these = (dtype, route)
    distances = table(p for p in known.values() if (p.claim.dtype, p.claim.route) == of_these)
    open_console().print(distances)
    written = [output]
    if md is not None:
        written.append(write_atomic(md, "\n".join(distances.markdown()).encode()))
    print_lines(["", *(f"wrote {path}" for path in written)])
    end_unless(all(made.ok for proof in proofs for made in known[proof.claim].tallies))
    other = dtype if quick else _HALF[1 - _HALF.index(dtype)]
    betas = [word for number in beta or () for word in ("--beta", number)]
    named = [word for name in backend or () for word in ("--backend", name)]
    words = ("prove", "--dtype", other, *betas, *named, "--route", route)
    return [typed(*words, "-o", output)]


def _write(path: Path, known: dict[Claim, Proof]) -> None:
    entries = [proof.to_dict() for proof in known.values()]
    write_atomic(path, json.dumps({"entries": entries}, indent=1).encode())
