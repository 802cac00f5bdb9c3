"""The contract at its edges: what PyTorch does, and what each backend and the plain graph do.

Every answer is computed when the table is asked for: nothing here is written from memory.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx

from .._floats import NUMPY_DTYPE, Array, dtype_name
from .._records import Record
from .._shapes import Dim, Shape
from .._spec import DTYPES, LossSpec
from ..backends._base import get_backend
from ..backends._ort_cpu import SILENT
from ..errors import SmoothL1DeployError, UnsupportedError, require
from ..graph._export import export
from ..reference._oracle import oracle
from ._compare import compare

PYTORCH = "PyTorch eager"
PLAIN = "torch.onnx.export"

#: What an answer is beside PyTorch's.
KINDS: Mapping[str, str] = {
    "reference": "PyTorch's own",
    "equal": "the same: the number within the tolerance, or both refuse",
    "better": "right where PyTorch itself overflows, underflows or makes NaN",
    "refuses": "an error where PyTorch answers",
    "differs": "another number, dtype or shape, or an answer where PyTorch refuses",
}


@dataclass(frozen=True, slots=True)
class Answer(Record):
    """What one column said: a number, or the error's class and text; `kind` is one of `KINDS`."""

    column: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Edge(Record):
    """One row: a situation, and the answer of each column, PyTorch's first."""

    name: str
    question: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Contract(Record):
    """The table of contract differences."""

    columns: tuple[str, ...]
    edges: tuple[Edge, ...]
    seconds: float


@dataclass(frozen=True)
class _Probe:
    """How a row is computed: `arguments` are the module's, `axes` the artefact's."""

    name: str
    question: str
    input: Any
    target: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    target_dtype: str | None = None
    axes: tuple[Shape, Shape] = (("N",), ("N",))

    def arrays(self) -> tuple[Array, Array]:
        pairs = ((self.input, self.dtype), (self.target, self.target_dtype or self.dtype))
        input, target = (np.asarray(x, NUMPY_DTYPE.get(name, name)) for x, name in pairs)
        return input, target

    def spec(self) -> LossSpec:
        dtype = self.dtype if self.dtype in DTYPES else "float32"
        return LossSpec.from_legacy(**self.arguments, dtype=dtype)


_NONE: Mapping[str, Any] = {"reduction": "none"}
_NAN, _INF = float("nan"), float("inf")

_PROBES = (
    _Probe("mean of nothing", "The mean over an empty tensor.", [], []),
    _Probe("sum of nothing", "The sum over an empty tensor.", [], [], {"reduction": "sum"}),
    _Probe(
        "negative beta", "beta = -1: PyTorch raises when it is called.", [0.5], [0], {"beta": -1.0}
    ),
    _Probe("0-d tensors", "Rank 0 in, rank 0 out.", 3.0, 1.0, axes=((), ())),
    _Probe(
        "broadcasting, none", "(2, 1) against (2,) gives (2, 2).", [[1], [2]], [0, 3], _NONE,
        axes=(("N", 1), (2,)),
    ),
    _Probe(
        "broadcasting, mean", "The divisor is the number of elements after broadcasting, 4.",
        [[1], [2]], [0, 3], axes=(("N", 1), (2,)),
    ),
    _Probe(
        "size_average=False", "Deprecated; it overrides reduction and means sum.",
        [0.5, 3], [0, 0], {"size_average": False},
    ),
    _Probe(
        "reduce=False", "Deprecated; it overrides reduction and means none.",
        [0.5, 3], [0, 0], {"reduce": False},
    ),
    _Probe("NaN", "One NaN among the inputs; the other elements are untouched.",
           [0.5, _NAN, 3], [0, 0, 0], _NONE),
    _Probe("infinity", "One infinity among the inputs.", [0.5, _INF, -_INF], [0, 0, 0], _NONE),
    _Probe("inf − inf", "The same infinity on both sides has no difference.",
           [0.5, _INF], [0, _INF], _NONE),
    _Probe("beta = inf", "The loss of every finite difference is 0.",
           [0.5, 1e30], [0, 0], {"beta": _INF, **_NONE}),
    _Probe("float16, beta = 0", "L1 in half precision stays in half precision.",
           [0.5, 3], [0, 0], {"beta": 0.0, **_NONE}, "float16"),
    _Probe("bfloat16, beta = 0", "L1 in bfloat16, as a mean.",
           [0.5, 3], [0, 0], {"beta": 0.0}, "bfloat16"),
    _Probe("float16, beta = 1000", "d = 500: the loss is 125, d² does not fit float16.",
           [500, 1], [0, 0], {"beta": 1000.0, **_NONE}, "float16"),
    _Probe("float64, beta = 0.1", "beta must not be rounded to float32 on its way.",
           [0.05, 1], [0, 0], {"beta": 0.1, **_NONE}, "float64"),
    _Probe("beta = 1e-8", "Small, and not 0: near it the loss is not |d|.",
           [1.2e-8, 2e-8], [0, 0], {"beta": 1e-8, **_NONE}),
    _Probe("integers", "PyTorch has no Smooth L1 of two integer tensors.",
           [1, 5, 2], [0, 0, 0], dtype="int64"),
    _Probe("float32 beside float64", "PyTorch promotes to float64; an artefact has one dtype.",
           [0.5, 3], [0, 0], target_dtype="float64"),
)  # fmt: skip


def _text(got: Array | Exception) -> str:
    """`[0.5, nan]`, the dtype and shape of a large result, or an error's first line."""
    if isinstance(got, Exception):
        first = str(got).strip().partition("\n")[0]
        return f"{type(got).__name__}: {first}"
    if got.size > 6:
        return f"{dtype_name(got.dtype)}{list(got.shape)}"
    if got.ndim == 0:
        return str(got[()])
    return f"[{', '.join(_text(np.asarray(row)) for row in got)}]"


def _attempt(
    compute: Callable[[_Probe], Array], probe: _Probe, answers: type[Exception] = Exception
) -> Array | Exception:
    """The answer, which may be an error of the class `answers`."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return compute(probe)
    except answers as exc:
        return exc


def _answer(column: str, probe: _Probe, got: Array | Exception, torch: Array | Exception) -> Answer:
    """Classify an answer by PyTorch's."""
    text = _text(got)
    if isinstance(got, Exception):
        kind = "equal" if isinstance(torch, Exception) else "refuses"
    elif isinstance(torch, Exception):
        kind = "differs"
    elif got.dtype != torch.dtype or got.shape != torch.shape:
        kind, text = "differs", f"{text} as {dtype_name(got.dtype)}{list(got.shape)}"
    elif dtype_name(torch.dtype) != probe.spec().dtype:  # promoted: the oracle knows one dtype
        kind = "equal" if np.array_equal(got, torch, equal_nan=True) else "differs"
    else:
        spec, (input, target) = probe.spec(), probe.arrays()
        verdict = compare(spec, got, torch, oracle(spec, input, target), input, target)
        kind = "differs" if not verdict.ok else "better" if verdict.better else "equal"
        if not verdict.ok and not verdict.wrong_class:
            text += f" ({verdict.ulp:,} ULP off)"
    return Answer(column, kind, text)


def _torch(probe: _Probe) -> Array:
    from .._dlpack import from_torch, to_torch
    from ..reference._module import SmoothL1Loss

    # The parent class: ours refuses a bad beta when it is made, and PyTorch is asked here.
    module = SmoothL1Loss.__mro__[1](**probe.arguments)
    return from_torch(module(*map(to_torch, probe.arrays())))


def _ours(backend: str, probe: _Probe) -> Array:
    spec = probe.spec()
    chosen = get_backend(backend, threads=1)
    if reason := chosen.refuses(spec):
        raise UnsupportedError(reason)
    shape, target_shape = probe.axes
    model = export(spec, shape=shape, target_shape=target_shape)
    return chosen.load(model).run(*probe.arrays())["loss"]


def plain_export(
    arguments: dict[str, Any], dtype: str, shape: Shape, target_shape: Shape | None = None
) -> onnx.ModelProto:
    """The exporter's own model of `torch.nn.SmoothL1Loss(**arguments)`, its defaults untouched.

    Args:
        arguments: of the module, the deprecated ones included.
        dtype: the name of a torch dtype, of both inputs.
        shape: integers, and names for dynamic axes.
        target_shape: of the target, where it differs.

    Raises:
        MissingDependencyError: without torch.
    """
    torch = require("torch", "torch", "the plain exporter's graph")
    from ..graph._torch_route import quiet

    shapes = (shape, shape if target_shape is None else target_shape)
    names = sorted({dim for axes in shapes for dim in axes if isinstance(dim, str)})
    # It specialises on 0, 1 and equals.
    sizes: dict[Dim, int] = {name: 3 + 2 * i for i, name in enumerate(names)}
    dims = {name: torch.export.Dim(name) for name in names}
    zeros = partial(torch.zeros, dtype=getattr(torch, dtype))
    examples = tuple(zeros([sizes.get(dim, dim) for dim in axes]) for axes in shapes)
    dynamic = tuple(
        {i: dims[d] for i, d in enumerate(axes) if isinstance(d, str)} for axes in shapes
    )
    module = torch.nn.SmoothL1Loss(**arguments).eval()
    with quiet():
        program = torch.onnx.export(
            module, examples, dynamic_shapes=dynamic, dynamo=True, verbose=False
        )
    model: onnx.ModelProto = program.model_proto
    return model


def as_anyone(
    model: onnx.ModelProto,
    threads: int,
    purpose: str,
    prepare: Callable[[Any], None] = lambda options: None,
) -> Callable[[Array, Array], Array]:
    """ONNX Runtime's CPU provider on a model of two inputs, as anyone opens it and calls it.

    Args:
        model: what it runs; what is fed is not checked.
        threads: for one call.
        purpose: what needs ONNX Runtime, in words.
        prepare: what is done to the session's options before it is opened.

    Raises:
        MissingDependencyError: without ONNX Runtime.
    """
    ort = require("onnxruntime", "cpu", purpose)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = SILENT
    # Its threads may spin within a call, and not into the next one's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    prepare(options)
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    first, second = (port.name for port in session.get_inputs())
    outputs = [session.get_outputs()[0].name]
    return lambda input, target: session.run(outputs, {first: input, second: target})[0]


def _plain(sessions: dict[str, Any], probe: _Probe) -> Array:
    """The plain graph as anyone would open it."""
    key = repr((probe.arguments, probe.dtype, probe.axes))
    if key not in sessions:
        model = plain_export(dict(probe.arguments), probe.dtype, *probe.axes)
        sessions[key] = as_anyone(model, 1, "the plain exporter's graph")
    return np.asarray(sessions[key](*probe.arrays()))


def probe_contract(
    backends: Sequence[str] = ("ort-cpu",),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Contract:
    """Compute the table: PyTorch, this tool's artefacts on each backend, the plain graph.

    Args:
        backends: names of `BACKENDS` that can be used here.
        progress: called with the rows done and their number, at the start and after each.

    Raises:
        MissingDependencyError: without torch, or what a backend lives on.
        SpecError: for an unknown backend.
    """
    started = time.perf_counter()
    for backend in backends:
        get_backend(backend)
    columns = {name: partial(_ours, name) for name in backends} | {PLAIN: partial(_plain, {})}
    edges = []
    progress(0, len(_PROBES))
    for done, probe in enumerate(_PROBES, 1):
        torch = _attempt(_torch, probe)
        answers = [Answer(PYTORCH, "reference", _text(torch))]
        for column, compute in columns.items():
            # A crash of our own is no answer.
            errors = Exception if column == PLAIN else SmoothL1DeployError
            answers.append(_answer(column, probe, _attempt(compute, probe, errors), torch))
        edges.append(Edge(probe.name, probe.question, tuple(answers)))
        progress(done, len(_PROBES))
    return Contract((PYTORCH, *columns), tuple(edges), time.perf_counter() - started)
