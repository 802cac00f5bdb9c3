"""The fused kernels as a GPU's instructions: Triton compiles them where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# What is asked of the compiler is what a call on a card would ask: integers that are 1 are
# constants, pointers and round sizes are multiples of 16.
_COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from smoothl1_deploy.backends import _fused as fused

assert not fused.INTERPRETED

def ptx(capability, dtype, name, even):
    element = {"float16": "*fp16", "bfloat16": "*i16"}.get(dtype, "*fp" + dtype[-2:])
    exact = dtype == "float64"
    types = {"input": element, "target": element, "loss": element, "partial": "*fp64",
             "beta": "*fp64" if exact else "fp32", "inverse": "fp32", "output": element}
    form = {"BETA": 0 if exact else 2 if even else 1, "EVEN": even}
    known = {"MEAN": True, "RUN": 1 if exact else 4, "SCALE": 4 if dtype == "bfloat16" else 1,
             "EXACT": exact, "UNROLLED": False}
    size, warps = fused._TILE
    if name == "none":
        block, warps = fused._BLOCK
        kernel, known = fused._write_losses, {**form, "BLOCK": block}
    elif name == "rows":
        kernel, known = fused._sum_rows, {
            **form, **known, "FINAL": True, "ROWS": size // 16, "COLUMNS": 16, "tiles": 1,
            "parts": 1}
    elif name == "small":
        kernel, known = fused._sum_rows, {
            **form, **known, "FINAL": True, "ROWS": 1, "COLUMNS": 1024, "rows": 1, "tiles": 1,
            "parts": 1}
    elif name == "parts":
        types["output"] = "*fp64"
        kernel, known = fused._sum_rows, {
            **form, **known, "FINAL": False, "ROWS": 1, "COLUMNS": size, "rows": 1}
    else:
        del known["RUN"]
        kernel, warps, known = fused._combine, 8, {**known, "SIZE": fused._PROGRAMS, "rows": 1}
    signature = {n: "constexpr" if n in known else types.get(n, "i64") for n in kernel.arg_names}
    round = {n: i for i, n in enumerate(kernel.arg_names)
             if n not in known and types.get(n, "")[:1] == "*" or n in ("count", "columns")}
    attributes = {(i,): [["tt.divisibility", 16]] for i in round.values()}
    source = ASTSource(kernel, signature, known, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": warps, **fused._AS_WRITTEN}).asm

found = [ptx(*each) for each in json.loads(sys.argv[1])]
assert all(len(asm["cubin"]) > 1000 for asm in found)
print(json.dumps([asm["ptx"] for asm in found]))
"""

# Every call that the backend makes, compiled for a card that is not there, and not launched.
_CALLS = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Card:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0

driver.set_active(Card())
real, built = JITFunction.run, []

def run(self, *arguments, grid, warmup, **options):
    kernel = real(self, *arguments, grid=grid, warmup=True, **options)
    built.append((self.fn.__name__, "cubin" in kernel.asm))
    # A compiled kernel takes all of them by position: `Launch` has to keep their order.
    assert [n for n in options if n in self.arg_names] == self.arg_names[len(arguments):]

JITFunction.run = run
from smoothl1_deploy.backends import _fused as fused

assert not fused.INTERPRETED
dtype = getattr(torch, sys.argv[1])
beta = torch.tensor(1.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
data = torch.zeros(1 << 10, dtype=dtype)
for rows, columns in ((1, 0), (1, 1), (1, 1024), (1, 1 << 20), (1, 1 << 33), (64, 16), (7, 1),
                      (3, (1 << 17) + 3)):
    how = fused.plan(rows, columns)
    partial = torch.zeros(how.scratch, dtype=torch.float64)
    for number in (None, 1.0, 0.1):
        rowwise = fused.Rows(how, sys.argv[1], number, mean=True)
        rowwise(data, data, beta, data[:rows], partial)
for count in (0, 1, 1000, 8192):
    for number in (None, 1.0, 0.1):
        losses = fused.Losses(count, sys.argv[1], number)
        losses(data[:count], data[:count], beta, data[:count], None)
assert [name for name, _ in built].count("_combine") == 3 * 3, built
assert len(built) == 3 * (8 + 3 + 3) and all(whole for _, whole in built), built
"""


def ran(folder: Path, code: str, *arguments: str) -> str:
    """What `code` prints, in a process where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment, "TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_every_call_of_the_backend_compiles(tmp_path: Path, dtype: str) -> None:
    """With the arguments it gives: of a 1 Triton makes a constant, of 2^33 an int64."""
    ran(tmp_path, _CALLS, dtype)


#: Card, format, kernel, and whether beta is a power of two and all tiles are whole.
KERNELS = [
    *((90, "float32", kernel, False) for kernel in ("none", "small", "parts", "combine", "rows")),
    *((90, "float16", kernel, even) for kernel in ("none", "parts") for even in (True, False)),
    (80, "float16", "parts", False),
    (120, "bfloat16", "none", False),
    (75, "bfloat16", "small", False),
    (90, "float64", "parts", False),
]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, str]:
    """The instructions of each of `KERNELS`, for cards that are not there."""
    found = ran(tmp_path_factory.mktemp("triton"), _COMPILE, json.dumps(KERNELS))
    return dict(zip(KERNELS, json.loads(found), strict=True))


def test_it_computes_as_the_interpreter_does(ptx: dict[Any, str]) -> None:
    approximate = ("div.full", "div.approx", "rcp.approx", ".ftz", "fma.")
    for kernel, text in ptx.items():
        assert not [each for each in (*approximate, "atom.global", "red.global") if each in text]
        if kernel[1] == "float32" and kernel[2] != "combine":
            assert "div.rn.f32" in text
            assert "ld.global.v4.b32" in text  # 16 bytes at a time
    double = ptx[90, "float64", "parts", False]
    assert "div.rn.f64" in double
    # Two numbers a sum: TwoSum's six additions, and one more.
    assert "sub.f64" in double or "sub.rn.f64" in double


@pytest.mark.parametrize("kernel", ["none", "parts"])
def test_a_power_of_two_divides_nothing(ptx: dict[Any, str], kernel: str) -> None:
    """And where all tiles are whole, no load or store asks whether it is needed."""
    text = ptx[90, "float16", kernel, True]
    assert "div." not in text
    loads = [line for line in text.splitlines() if "ld.global" in line or "st.global.v" in line]
    assert loads and not [line for line in loads if "@" in line], loads
    assert "div.rn.f32" in ptx[90, "float16", kernel, False]
