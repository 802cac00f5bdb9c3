"""`scripts/prove_bounds`: the constants of parity/_bounds.py, proved by Gappa or by hand.

Gappa (https://gappa.gitlabpages.inria.fr, Debian's package gappa) proves bounds of rounded
arithmetic, and its proofs can be checked by Coq. Each script here is proved for the constants as
they stand, and for each constant there is a nearby number for which a script isn't: a bound that
anything satisfies would say nothing.
"""

from __future__ import annotations

import ast
import inspect
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy.parity import _bounds


def _smaller(dtype: str) -> Callable[[Mapping[str, float]], Mapping[str, float]]:
    return lambda units: {**units, dtype: 0.99 * units[dtype]}


#: A constant, and a number near it that it can't be: of which what is said isn't proved.
NEARBY: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("UNIT_ROUNDOFF", _smaller("float32")),
    ("UNIT_ROUNDOFF", _smaller("float16")),
    ("UNIT_ROUNDOFF", _smaller("bfloat16")),
    ("_WIDE", lambda it: 0.99 * it),
    ("_LONG_DOUBLE", lambda it: 0.99 * it),
    ("_ELEMENT", lambda it: it - 0.5),
    ("_SPLIT_LIMIT", lambda it: 2 * it),
    ("_SIGMA", lambda it: it - 1),
    ("_SUMS", lambda it: it - 1),
    ("_LARGEST", lambda it: it + 0.1),
    ("_NEAREST", lambda it: it - 0.1),
    ("_BACK", lambda it: it - 1),
    ("_ROOM", lambda it: it - 0.001),
    ("_CANCELS", lambda it: it - 2),
    ("_UNDERFLOWS", lambda it: it - 1),
    ("_MARGIN", lambda it: it / 2),
)
#: What Gappa has no words for, and where it is shown.
BY_HAND = {
    "_ORACLE_DEPTH": "tests/parity/test_proofs.py adds up as numpy does, 152 deep",
    "_ORACLE_KEEPS": "the criterion of reference/_oracle.py, _cancels",
    "gamma": "Higham 2002, Lemma 3.1",
    "sums of elements >= 0, and of the rests of a split": "Higham 2002, section 4.2",
    "the sum of a split": "by induction of split.g, none.g, partial.g, sigma.g and limit.g; after "
    "Rump, Ogita, Oishi 2008, section 3 (ExtractVector, NextPowerTwo)",
    "u + (1 + u) e of a sum and its last rounding": "the product (1 + u) (1 + e)",
    "beta == 0 and beta = inf": "one rounding, and none",
}


@dataclass(frozen=True)
class Claim:
    """A script, with numbers for its marks, and the constants it speaks of."""

    script: str
    constants: tuple[str, ...]
    marks: dict[str, float | str]

    def is_proved(self) -> bool:
        """Whether Gappa proves it."""
        values = {n: v if isinstance(v, str) else float(v).hex() for n, v in self.marks.items()}
        text = Template((Path(__file__).parent / self.script).read_text()).substitute(values)
        # More than 60 bits, for what is near 1. It looks for long for a proof that there isn't: 20
        # seconds of its own, and not of a machine that has other work.
        command = ["sh", "-c", "ulimit -t 20; exec gappa -Eprecision=200"]
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
        if "syntax error" in done.stderr or "not trivially equal" in done.stderr:
            raise ValueError(f"{self.script}: {done.stderr.strip()}")
        return done.returncode == 0


def claims() -> Iterator[Claim]:
    """All that Gappa is asked, with the constants as they are now."""
    wide = _bounds._WIDE
    units = {**_bounds.UNIT_ROUNDOFF, "float64": wide, "long double": _bounds._LONG_DOUBLE}
    dtypes = {**NUMPY_DTYPE, "long double": np.dtype(np.longdouble)}
    names = {"long double": ("_LONG_DOUBLE",), "float64": ("UNIT_ROUNDOFF", "_WIDE")}
    for dtype, unit in units.items():
        marks = _format(dtypes[dtype]) | {"UNIT": unit}
        known = names.get(dtype, ("UNIT_ROUNDOFF",))
        yield Claim("rounding.g", known, marks)
        yield Claim("nearest.g", ("_NEAREST",), marks | {"NEAREST": _bounds._NEAREST})
        if "float16" not in dtype:  # which are computed in float32
            bound = {"BOUND": math.nextafter(_bounds.gamma(_bounds._ELEMENT, unit), 1)}
            least, most = marks["SMALL"], marks["LARGE"]
            yield Claim("below.g", ("_ELEMENT", "_MARGIN"), marks | bound)
            for start, end, ratio in (("0", least, 1), (least, most, 2)):
                betas = bound | {"FROM": start, "TO": end, "RATIO": ratio}
                for script in ("above.g", "at_once.g"):
                    yield Claim(script, ("_ELEMENT", "_MARGIN"), marks | betas)
    marks = {"LARGEST": _bounds._LARGEST, "SUMS": _bounds._SUMS}
    yield Claim("divisor.g", ("_SUMS", "_LARGEST"), marks)
    yield Claim("factor.g", ("_LARGEST",), marks)
    yield Claim("steps.g", ("_LARGEST",), marks)
    yield Claim("sigma.g", ("_SIGMA",), {"SIGMA": _bounds._SIGMA})
    for start, end in (("1b-54", "0.26"), ("-0.26", "-1b-54")):
        yield Claim("split.g", ("_WIDE",), {"FROM": start, "TO": end, "UNIT": wide})
    yield Claim("none.g", (), {})
    yield Claim("partial.g", (), {})
    limit, lost = _bounds._SPLIT_LIMIT * wide, _bounds._ELEMENT * wide
    marks = {"LIMIT": limit, "SIGMA": _bounds._SIGMA, "LOST": lost}
    yield Claim("limit.g", ("_SPLIT_LIMIT", "_SIGMA"), marks)
    yield Claim("subnormal.g", ("_UNDERFLOWS",), {"UNDERFLOWS": _bounds._UNDERFLOWS})
    marks = {"UNIT": wide, "ROOM": _bounds._ROOM, "BACK": _bounds._BACK * wide}
    # Its sum, the two factors of 2. that are beyond n u, and three roundings of each term.
    marks |= {"FEWEST": _bounds._CANCELS * wide, "SHORT": 4 * limit}
    yield Claim("gradient.g", ("_BACK", "_ROOM", "_CANCELS", "_SPLIT_LIMIT"), marks)


def _format(dtype: np.dtype[Any]) -> dict[str, str | float]:
    """Gappa's name of it; from where on `in_range` lets a bound count, and up to where.

    Half of the room that in_range asks for in what it computes itself, whose roundings are fewer.
    Of long double the oracle needs no more than the range of float64.
    """
    limits = ml_dtypes.finfo(dtype) if dtype.name == "bfloat16" else np.finfo(dtype)
    least, most = max(int(limits.minexp), -1030), min(int(limits.maxexp), 1030)
    margin = math.log2(_bounds._MARGIN / 2)
    precision = limits.nmant + 1
    return {
        "FORMAT": f"{precision}, {limits.minexp - limits.nmant}",
        "SMALL": f"1b{least + int(margin)}",
        "LARGE": f"1b{most - int(margin)}",
    }


def unlisted() -> list[str]:
    """Numbers of parity/_bounds.py that nobody answers for; functions may say 0 and 1."""
    found = []
    for node in ast.parse(inspect.getsource(_bounds)).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [ast.unparse(target) for target in targets]
        else:
            numbers = (x.value for x in ast.walk(node) if isinstance(x, ast.Constant))
            name = getattr(node, "name", "")
            found += [
                f"{x} in {name}" for x in numbers if type(x) in (int, float) and x not in (0, 1)
            ]
    return [name for name in found if name not in {**dict(NEARBY), **BY_HAND}]


def would_do(name: str, number: Any) -> bool:
    """Whether all is proved with another number for a constant."""
    with patch.object(_bounds, name, number):
        return all(claim.is_proved() for claim in claims() if name in claim.constants)


def main() -> int:
    """Print a line for each constant and step; 1 where a proof is missing, 3 without Gappa."""
    if shutil.which("gappa") is None:
        print("gappa is not installed; on Debian: apt-get install gappa", file=sys.stderr)
        return 3
    made = list(claims())
    red = [f"{c.script}: NOT PROVED of {c.marks}" for c in made if not c.is_proved()]
    red += [f"{name}: NEITHER PROVED NOR BY HAND" for name in unlisted()]
    for name, change in NEARBY:
        number = change(getattr(_bounds, name))
        if would_do(name, number):
            red.append(f"{name}: {number} WOULD DO")
    for name in dict(NEARBY):
        scripts = sorted({claim.script for claim in made if name in claim.constants})
        is_proved = not any(said.startswith((name, *scripts)) for said in red)
        print(f"{name}: {'proved' if is_proved else 'NOT PROVED'}, {', '.join(scripts)}")
    for name, source in BY_HAND.items():
        print(f"{name}: by hand, {source}")
    print(*red, sep="\n", end="\n" * bool(red))
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
