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
from smoothl1_deploy.backends import fused

capability, dtype, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
assert not fused.INTERPRETED
element = {"float16": "*fp16", "bfloat16": "*i16", "float32": "*fp32", "float64": "*fp64"}[dtype]
exact = dtype == "float64"
types = {"input": element, "target": element, "loss": element, "partial": "*fp64",
         "beta": "*fp64" if exact else "fp32", "inverse": "fp32", "output": element}
form = {"BETA": 0 if exact else 2 if sys.argv[4:] else 1, "EVEN": bool(sys.argv[4:])}
known = {"MEAN": True, "RUN": 1 if exact else 4, "SCALE": 4 if dtype == "bfloat16" else 1,
         "EXACT": exact, "UNROLLED": False}
size, warps = fused._TILE
if name == "none":
    block, warps = fused._BLOCK
    kernel, known = fused._write_losses, {**form, "BLOCK": block}
elif name == "rows":
    kernel, known = fused._sum_rows, {
        **form, **known, "FINAL": True, "ROWS": size // 16, "COLUMNS": 16, "tiles": 1, "parts": 1}
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
built = compile(source, target=GPUTarget("cuda", capability, 32),
                options={"num_warps": warps, **fused._AS_WRITTEN})
print(json.dumps({"ptx": built.asm["ptx"], "cubin": len(built.asm["cubin"])}))
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
from smoothl1_deploy.backends import fused

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


def _environment(tmp_path: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**environment, "TRITON_CACHE_DIR": str(tmp_path)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_call_of_the_backend_compiles(tmp_path: Path, dtype: str) -> None:
    """With the arguments it gives: of a 1 Triton makes a constant, of 2^33 an int64."""
    done = subprocess.run(
        [sys.executable, "-c", _CALLS, dtype],
        env=_environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def compiled(
    tmp_path: Path, capability: int, dtype: str, kernel: str, *options: str
) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(capability), dtype, kernel, *options],
        env=_environment(tmp_path),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kernel", ["none", "small", "parts", "combine", "rows"])
def test_it_computes_as_the_interpreter_does(tmp_path: Path, kernel: str) -> None:
    found = compiled(tmp_path, 90, "float32", kernel)
    ptx = found["ptx"]
    assert found["cubin"] > 1000
    for approximate in (
        "div.full",
        "div.approx",
        "rcp.approx",
        ".ftz",
        "fma.",
        "atom.global",
        "red.global",
    ):
        assert approximate not in ptx, approximate
    if kernel != "combine":
        assert "div.rn.f32" in ptx
        assert "ld.global.v4.b32" in ptx  # 16 bytes at a time


@pytest.mark.parametrize("kernel", ["none", "parts"])
def test_a_power_of_two_divides_nothing(tmp_path: Path, kernel: str) -> None:
    """And where all tiles are whole, no load or store asks whether it is needed."""
    ptx = compiled(tmp_path, 90, "float16", kernel, "a power of two, and even")["ptx"]
    assert "div." not in ptx and ".ftz" not in ptx and "fma." not in ptx
    loads = [line for line in ptx.splitlines() if "ld.global" in line or "st.global.v" in line]
    assert loads and not [line for line in loads if "@" in line], loads
    assert "div.rn.f32" in compiled(tmp_path, 90, "float16", kernel)["ptx"]


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [(80, "float16", "parts"), (120, "bfloat16", "none"), (75, "bfloat16", "small"),
     (90, "float64", "parts")],
)  # fmt: skip
def test_other_cards_and_formats(tmp_path: Path, capability: int, dtype: str, kernel: str) -> None:
    found = compiled(tmp_path, capability, dtype, kernel)
    assert found["cubin"] > 1000 and "fma." not in found["ptx"]
    if dtype == "float64":  # two numbers a sum: TwoSum's six additions, and one more
        assert found["ptx"].count("div.rn.f64") > 0
        assert found["ptx"].count("sub.f64") + found["ptx"].count("sub.rn.f64") > 0
