"""The script of a reproduction bundle: numpy, torch and what ran the artefact, nothing of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from .. import __version__
from ..artefact import Signature
from ..spec import LossSpec
from .cases import Case

__all__ = ["repro_script"]

_ORT = """\
options = ort.SessionOptions()
options.intra_op_num_threads = 1  # as the case was run
session = ort.InferenceSession(here / "artefact.onnx", options, ["CPUExecutionProvider"])
"""
_REFERENCE = 'session = ReferenceEvaluator(str(here / "artefact.onnx"))  # as it is published\n'
_CALL = "got = session.run([{output}], {{{feeds}}})[0]\n"

#: Backend -> package, import, and the lines that make `got`, a numpy array.
_RUN: Mapping[str, tuple[str, str, str]] = {
    "ort-cpu": ("onnxruntime", "import onnxruntime as ort\n", _ORT + _CALL),
    "onnx-reference": (
        "onnx", "from onnx.reference import ReferenceEvaluator\n", _REFERENCE + _CALL
    ),
}  # fmt: skip
#: The same for bfloat16, which numpy doesn't have: ONNX Runtime takes bits, onnx takes ml_dtypes.
_RUN_BITS: Mapping[str, tuple[str, str, str]] = {
    "ort-cpu": (
        *_RUN["ort-cpu"][:2],
        _ORT
        + """\
value = lambda bits: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
number = ort.OrtValue.ortvalue_from_numpy
got = session.run_with_ort_values([{output}], {{{feeds}}})[0]
got = torch.from_dlpack(got).view(torch.int16).numpy()
""",
    ),
    "onnx-reference": (
        "onnx, ml_dtypes",
        "import ml_dtypes\n" + _RUN["onnx-reference"][1],
        _REFERENCE
        + """\
value, number = lambda bits: bits.view(ml_dtypes.bfloat16), np.asarray
got = np.asarray(session.run([{output}], {{{feeds}}})[0]).view(np.uint16)
""",
    ),
}
_RECORDED = 'got = data["got"]  # recorded: {backend} needs smoothl1-deploy to run\n'

_SCRIPT = '''\
"""{title}

Written by smoothl1-deploy {version}, and independent of it. Needs {needs}.
Exit code 1: the difference is there.
"""
import math
import warnings
from pathlib import Path
{imports}
warnings.simplefilter("ignore")  # overflow, NaN and broadcasting are meant
here = Path(__file__).parent
data = np.load(here / "inputs.npz"){bits_note}
{run}
tensor = lambda array: torch.from_numpy(np.asarray(array)){view}


def loss({names}):
{loss}


def pytorch(dtype):
    {names} = (tensor(data[name]).to(dtype) for name in {quoted})
{pytorch}


got, eager, exact = tensor(got), pytorch(torch.{dtype}), tensor(data["exact"])
if (got.dtype, got.shape) != (eager.dtype, eager.shape):
    raise SystemExit(f"got {{got.dtype}} {{got.shape}}, not {{eager.dtype}} {{eager.shape}}")
if not got.numel():
    raise SystemExit(0)  # an empty result, as it should be
g, p, w, e = (float(x[{at}]) for x in (got, eager, pytorch(torch.float64), exact))
print(f"{output} at {at}: got {{g}}, PyTorch {{p}}, PyTorch in float64 {{w}}, exact {{e}}")
info = torch.finfo(got.dtype)
ulp = max(2.0 ** (math.frexp(e)[1] - 1), info.smallest_normal) * info.eps
print(f"{{abs(g - e) / ulp:.1f}} ULP from the exact value, {allowed} allowed")
near = str(g) in (str(e), str(p)) or g != 0 != e and abs(g - e) <= {allowed} * ulp
raise SystemExit(0 if near else 1)
'''


def repro_script(
    spec: LossSpec,
    case: Case,
    ports: Signature,
    backend: str,
    *,
    output: str,
    at: tuple[int, ...],
    allowed: int,
    error: str,
) -> str:
    """The text of `repro.py`.

    Args:
        spec: what is computed, with beta as a number.
        case: named in the script's first line.
        ports: of the artefact, for the names of its inputs and outputs.
        backend: what ran it; one that needs this package is shown by its recorded answer.
        output: the result that is compared, `loss` or `grad_input`.
        at: the index in it.
        allowed: distance in ULP, beyond which the script exits with 1.
        error: that was raised instead of an answer; empty for an answer.
    """
    bits = spec.dtype == "bfloat16"
    package, imports, run = "", "", _RECORDED.format(backend=backend)
    if backend in _RUN:
        package, imports, run = (_RUN_BITS if bits else _RUN)[backend]
        port = ports.loss.name if output == "loss" else output
        run = run.format(output=repr(port), feeds=_feeds(ports, bits))
    elif error:
        run = f"raise SystemExit({f'recorded on {backend}: {error}'!r})\n"
    title = (
        f"Smooth L1, {spec.name}: family {case.family}, layout {case.layout}, seed {case.seed}, "
        f"on {backend}."
    )
    names = ["input", "target", *(["weight"] if spec.weight else [])]
    return _SCRIPT.format(
        # A layout may hold axis names of a model that anyone made: no quote, no new line.
        title=re.sub(r"[^A-Za-z0-9_ .,:=^+-]", "?", title),
        version=__version__,
        needs=", ".join(filter(None, ("numpy", "torch", package))),
        imports=imports + "import numpy as np\nimport torch\n",
        run=run.rstrip(),
        bits_note="  # bfloat16 as its uint16 bits" if bits else "",
        view=".view(torch.bfloat16)" if bits else "",
        names=", ".join(names),
        quoted=tuple(names),
        loss=_indented(_loss(spec)),
        pytorch=_indented(_answer(names, output, spec.upstream)),
        dtype=spec.dtype,
        output=output,
        at=at,
        allowed=allowed,
    )


def _feeds(ports: Signature, bits: bool) -> str:
    """`'input': data["input"], ...`, by the graph's names, converted where numpy has no dtype."""

    def value(role: str) -> str:
        stored = f'data["{role}"]'
        return f"{'number' if role == 'beta' else 'value'}({stored})" if bits else stored

    return ", ".join(f"{port.name!r}: {value(role)}" for role, port in ports.inputs.items())


def _loss(spec: LossSpec) -> list[str]:
    """The body of `loss`, in PyTorch."""
    beta = 'float("inf")' if math.isinf(spec.effective_beta) else repr(spec.effective_beta)
    lines = []
    if spec.per_sample:
        names = "input, target, weight" if spec.weight else "input, target"
        lines += [f"rows = [row_loss(*row) for row in zip(*torch.broadcast_tensors({names}))]"]
        lines += ["return torch.stack(rows) if rows else input.new_zeros(0)", "", ""]
        lines += [f"def row_loss({names}):"]
    reduction = "none" if spec.weight else spec.reduction
    call = "torch.nn.functional.smooth_l1_loss(input, target, "
    call += f'reduction="{reduction}", beta={beta})'
    if not spec.weight:
        return [*lines, f"return {call}"]
    reduced = {
        "none": "losses",
        "sum": "losses.sum()",
        "mean": "losses.sum() / losses.numel()",
    }[spec.reduction]
    if spec.weight == "weights":
        reduced = "losses.sum() / weight.expand_as(losses).sum()"
    return [*lines, f"losses = {call} * weight", f"return {reduced}"]


def _answer(names: list[str], output: str, upstream: bool) -> list[str]:
    """The body of `pytorch` after the tensors are made."""
    given = ", ".join(names)
    if output == "loss":
        return [f"return loss({given})"]
    if upstream:
        grad_output = 'tensor(data["grad_output"]).to(dtype)'
        return [
            "input.requires_grad_()",
            f"return torch.autograd.grad(loss({given}), input, {grad_output})[0]",
        ]
    return [
        "input.requires_grad_()",
        f"return torch.autograd.grad(loss({given}).sum(), input)[0]",
    ]


def _indented(lines: list[str]) -> str:
    return "\n".join("" if not x else x if x.startswith("def ") else f"    {x}" for x in lines)
