"""`scripts/prove_bounds`: what parity/_bounds.py says of one element, checked by Gappa.

Gappa (https://gappa.gitlabpages.inria.fr, Debian's package gappa) proves bounds of rounded
arithmetic, and its proofs can be checked by Coq. The scripts here hold for `_ELEMENT` roundings,
and one of them for no half of a rounding less: a bound that anything satisfies would say nothing.
By hand, with their sources, stay in parity/_bounds.py: the sums (Higham; Rump, Ogita, Oishi), the
products of the terms, and the steps from a relative error to ULP.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from smoothl1_deploy.parity._bounds import _ELEMENT, UNIT_ROUNDOFF, gamma

#: Dtype that a loss is computed in -> Gappa's name of it; 4 times the smallest normal number, from
#: which on `in_range` lets a bound count; and a number that leaves room before overflow.
FORMATS = {
    "float32": ("ieee_32", "1b-124", "1b126"),
    "float64": ("ieee_64", "1b-1020", "1b1022"),
}


def holds(script: Path, dtype: str, roundings: float) -> bool:
    """Whether Gappa proves `script` for the bound of so many roundings."""
    name, small, large = FORMATS[dtype]
    limit = repr(gamma(roundings, UNIT_ROUNDOFF[dtype]))  # type: ignore[arg-type]
    text = script.read_text()
    for mark, value in (("FORMAT", name), ("SMALL", small), ("LARGE", large), ("BOUND", limit)):
        text = text.replace(mark, value)
    done = subprocess.run(["gappa"], input=text, text=True, capture_output=True, check=False)
    if "syntax error" in done.stderr:
        raise ValueError(f"{script.name}: {done.stderr.strip()}")
    return done.returncode == 0


def main(roundings: int = _ELEMENT) -> int:
    """Print a line for each proof; 1 where one is missing, 3 without Gappa."""
    if shutil.which("gappa") is None:
        print("gappa is not installed; on Debian: apt-get install gappa", file=sys.stderr)
        return 3
    scripts = sorted(Path(__file__).parent.glob("*.g"))
    failed = False
    for dtype in FORMATS:
        proved = {script.stem: holds(script, dtype, roundings) for script in scripts}
        for side, is_proved in proved.items():
            said = "proved" if is_proved else "NOT PROVED"
            print(f"{dtype}, {side} the knee: {roundings} roundings {said}", flush=True)
        tight = not all(holds(script, dtype, roundings - 0.5) for script in scripts)
        if not tight:
            print(f"{dtype}: {roundings - 0.5} roundings would do: THE BOUND IS TOO WIDE")
        failed |= not (tight and all(proved.values()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
