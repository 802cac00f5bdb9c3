"""The script of a reproduction bundle: numpy, torch and what ran the artefact, nothing of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from .. import __version__
from ..artefact import Signature
from ..floats import NUMPY_DTYPE
from ..spec import LossSpec
from .cases import Case

__all__ = ["repro_script"]

_ORT = """\
options = ort.SessionOptions()
options.intra_op_num_threads = 1  # as the case was run
session = ort.InferenceSession(here / "artefact.onnx", options, ["CPUExecutionProvider"])
"""
_REFERENCE = 'session = ReferenceEvaluator(str(here / "artefact.onnx"))\n'
_CALL = "got = session.run(None, {feeds})[0]\n"

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
got = torch.from_dlpack(session.run_with_ort_values(None, {feeds})[0]).view(torch.int16).numpy()
""",
    ),
    "onnx-reference": (
        "onnx, ml_dtypes",
        "import ml_dtypes\n" + _RUN["onnx-reference"][1],
        _REFERENCE
        + """\
value = lambda bits: bits.view(ml_dtypes.bfloat16)
got = np.asarray(session.run(None, {feeds})[0]).view(np.int16)
""",
    ),
}
_RECORDED = 'got = data["got"]  # recorded: {backend} needs smoothl1-deploy to run\n'

_SCRIPT = '''\
"""{title}

Written by smoothl1-deploy {version}, and independent of it. Needs {needs}.
Exit code 1: the difference is there.
"""
import warnings
from pathlib import Path
{imports}
warnings.simplefilter("ignore")  # overflow, NaN and broadcasting are meant
here = Path(__file__).parent
data = np.load(here / "inputs.npz"){bits_note}
{run}
arrays = (torch.from_numpy(np.asarray(x)) for x in (data["input"], data["target"], got))
input, target, got = {tensors}
eager = torch.nn.functional.smooth_l1_loss(input, target, reduction="{reduction}", beta={beta})
if (got.dtype, got.shape) != (eager.dtype, eager.shape):
    raise SystemExit(f"got {{got.dtype}} {{got.shape}}, not {{eager.dtype}} {{eager.shape}}")
beta, wide = np.longdouble({effective}), lambda x: x.double().numpy().astype(np.longdouble)
d = abs(wide(input) - wide(target))
exact = np.where(d < beta, 0.5 * d * (d / beta), d - 0.5 * beta){reduce}
exact = torch.from_numpy(np.asarray(exact, np.float64)).to(got.dtype)
bits = lambda x: torch.where(x.isnan(), torch.nan, x).view(torch.int{width}).long().flatten()
ulp = torch.where(bits(got) == bits(eager), 0, (bits(got) - bits(exact)).abs())  # losses are >= 0
at = int(ulp.argmax()) if len(ulp) else exit("the result is empty, as it should be")
for name, values in (("got", got), ("PyTorch", eager), ("exact", exact)):
    print(f"{{name:8}}", values.flatten()[at].item())
print(f"element {{at}} of {{len(ulp)}}: {{ulp[at]}} ULP from the exact value, {allowed} allowed")
raise SystemExit(int(ulp[at] > {allowed}))
'''


def repro_script(
    spec: LossSpec, case: Case, ports: Signature, backend: str, allowed: int, error: str
) -> str:
    """The text of `repro.py`.

    Args:
        spec: what is computed.
        case: named in the script's first line.
        ports: of the artefact, for the names of its inputs.
        backend: what ran it; one that needs this package is shown by its recorded answer.
        allowed: distance in ULP, beyond which the script exits with 1.
        error: that was raised instead of an answer; empty for an answer.
    """
    bits = spec.dtype == "bfloat16"
    pair = ((ports.input.name, 'data["input"]'), (ports.target.name, 'data["target"]'))
    feeds = ", ".join(f"{name!r}: {f'value({x})' if bits else x}" for name, x in pair)
    package, imports, run = "", "", _RECORDED.format(backend=backend)
    if backend in _RUN:
        package, imports, run = (_RUN_BITS if bits else _RUN)[backend]
        run = run.format(feeds=f"{{{feeds}}}")
    elif error:
        run = f"raise SystemExit({f'recorded on {backend}: {error}'!r})\n"
    title = (
        f"Smooth L1, beta={spec.beta!r}, {spec.reduction}, {spec.dtype}: "
        f"family {case.family}, layout {case.layout}, seed {case.seed}, on {backend}."
    )
    return _SCRIPT.format(
        # A layout may hold axis names of a model that anyone made: no quote, no new line.
        title=re.sub(r"[^A-Za-z0-9_ .,:=^+-]", "?", title),
        version=__version__,
        needs=", ".join(filter(None, ("numpy", "torch", package))),
        imports=imports + "import numpy as np\nimport torch\n",
        run=run.rstrip(),
        bits_note="  # bfloat16 as its uint16 bits" if bits else "",
        tensors="(x.view(torch.bfloat16) for x in arrays)" if bits else "arrays",
        reduction=spec.reduction,
        beta=_number(spec.beta),
        effective=_number(spec.effective_beta),
        reduce="" if spec.reduction == "none" else f".{spec.reduction}(dtype=np.longdouble)",
        width=8 * NUMPY_DTYPE[spec.dtype].itemsize,
        allowed=allowed,
    )


def _number(beta: float) -> str:
    return 'float("inf")' if math.isinf(beta) else repr(beta)
