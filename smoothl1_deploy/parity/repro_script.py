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
session = ort.InferenceSession(here / "artefact.onnx", providers=["CPUExecutionProvider"])
"""
_REFERENCE = 'session = ReferenceEvaluator(str(here / "artefact.onnx"))  # as it is published\n'
_CALL = "got = session.run([{output}], {{{feeds}}})[0]\n"

#: Backend -> package, import, and the lines that make `got`, a numpy array.
_RUN: Mapping[str, tuple[str, str, str]] = {
    "ort-cpu-bare": ("onnxruntime", "import onnxruntime as ort\n", _ORT + _CALL),
    "onnx-reference": (
        "onnx", "from onnx.reference import ReferenceEvaluator\n", _REFERENCE + _CALL
    ),
}  # fmt: skip
#: The same for bfloat16, which numpy doesn't have: ONNX Runtime takes bits, onnx takes ml_dtypes.
_RUN_BITS: Mapping[str, tuple[str, str, str]] = {
    "ort-cpu-bare": (
        *_RUN["ort-cpu-bare"][:2],
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

_SCRIPT = """\
\"\"\"{title}

By smoothl1-deploy {version}; needs {needs}. Exit code 1: the difference is there.
\"\"\"
import math
from pathlib import Path
{imports}
here = Path(__file__).parent
data = np.load(here / "inputs.npz"){bits_note}
{run}
{names} = (torch.from_numpy(data[name]){view} for name in {quoted})
{pytorch}
got, exact = (torch.from_numpy(np.asarray(x)){view} for x in (got, data["exact"]))
if (got.dtype, got.shape) != (eager.dtype, eager.shape):
    raise SystemExit(f"got {{got.dtype}} {{got.shape}}, not {{eager.dtype}} {{eager.shape}}")
{compare}"""
_NO_BETA = ["eager = torch.full_like(eager, float('nan'))  # PyTorch raises on this beta"]
_COMPARE = """\
g, p, e = (float(x[{at}]) for x in (got, eager, exact))
info = torch.finfo(got.dtype)
ulp = max(2.0 ** (math.frexp(e)[1] - 1), info.smallest_normal) * info.eps
print(f"{output} at {at}: got {{g}}, PyTorch {{p}}, exact {{e}}")
print(f"{{abs(g - e) / ulp:.1f}} ULP from the exact value, {allowed} allowed")
raise SystemExit(not (str(g) in (str(e), str(p)) or g != 0 != e and abs(g - e) <= {allowed} * ulp))
"""


def repro_script(
    spec: LossSpec,
    beta: float,
    case: Case,
    ports: Signature,
    backend: str,
    *,
    output: str,
    at: tuple[int, ...] | None,
    allowed: int,
    error: str,
) -> str:
    """The text of `repro.py`.

    Args:
        spec: what is computed, with beta as a number.
        beta: what is fed; one that is negative or NaN has NaN for an answer.
        case: named in the script's first line.
        ports: of the artefact, for the names of its inputs and outputs.
        backend: what ran it; one that needs this package is shown by its recorded answer.
        output: the result that is compared, `loss` or `grad_input`.
        at: the index in it; None for an empty result, whose dtype and shape are all there is.
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
    names = [name for name in spec.inputs if name != "beta"]
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
        pytorch="\n".join(_pytorch(spec, output) + ([] if beta >= 0 else _NO_BETA)),
        compare="" if at is None else _COMPARE.format(output=output, at=at, allowed=allowed),
    )


def _feeds(ports: Signature, bits: bool) -> str:
    """`'input': data["input"], ...`, by the graph's names, converted where numpy has no dtype."""

    def value(role: str) -> str:
        stored = f'data["{role}"]'
        return f"{'number' if role == 'beta' else 'value'}({stored})" if bits else stored

    return ", ".join(f"{port.name!r}: {value(role)}" for role, port in ports.inputs.items())


def _pytorch(spec: LossSpec, output: str) -> list[str]:
    """The lines that make `eager` of the tensors `input` and `target`."""
    beta = 'float("inf")' if math.isinf(spec.effective_beta) else repr(spec.effective_beta)
    reduction = "none" if spec.weight or spec.per_sample else spec.reduction
    lines = ["input.requires_grad_()"] if output == "grad_input" else []
    call = f'smooth_l1_loss(input, target, reduction="{reduction}", beta={beta})'
    lines += [f"eager = torch.nn.functional.{call}"]
    if spec.weight:
        lines += ["eager = eager * weight"]
    if spec.weight or spec.per_sample:
        lines += _reduced(spec)
    if output == "grad_input":
        if spec.upstream:
            return [*lines, "eager = torch.autograd.grad(eager, input, grad_output)[0]"]
        return [*lines, "eager = torch.autograd.grad(eager.sum(), input)[0]"]
    return lines


def _reduced(spec: LossSpec) -> list[str]:
    """The lines that reduce the element losses as the spec says, beyond what the module can."""
    if spec.reduction == "none":
        return []
    rows = "eager[:, None].flatten(1), 1" if spec.per_sample else "eager"
    if spec.weight != "weights" or spec.reduction == "sum":
        return [f"eager = torch.{spec.reduction}({rows})"]
    weights = rows.replace("eager", "weight.expand_as(eager)")
    return [f"eager = torch.sum({rows}) / torch.sum({weights})"]
