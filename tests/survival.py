"""What is left of the number when other tools have had the file: scripts/survival.

Each of our files goes through each tool, by its own documented entry and with its defaults, and
what comes out is run by ONNX Runtime on every input family. A loss is the same where the rule of
parity holds against PyTorch and the oracle; the loss of an attached model is held against the
prediction that the same run gives.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from handmade import model_of, opened, run_session

from smoothl1_deploy import LossSpec, attach, export
from smoothl1_deploy._floats import NUMPY_DTYPE, Array, dtype_name
from smoothl1_deploy._model import DTYPE_OF_ELEMENT, ELEMENT_TYPE
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy.parity._cases import Case
from smoothl1_deploy.parity._compare import compare
from smoothl1_deploy.parity._families import FAMILIES
from smoothl1_deploy.reference._module import eager_outputs
from smoothl1_deploy.reference._oracle import oracle, oracle_gradient

ROUTES = ("function", "inlined", "torch", "attach function", "attach inlined")

#: What is asked of a spec, besides its dtype.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"reduction": "none"},
    "mean": {},
    "sum": {"reduction": "sum"},
    "per sample": {"per_sample": True},
    "gradient": {"gradient": True},
    "gradient per sample": {"gradient": True, "per_sample": True},
    "weight": {"weight": "count"},
    "unreduced weight": {"weight": "count", "reduction": "none"},
    "weighted mean": {"weight": "weights"},
    "run-time beta": {"runtime_beta": True},
}
_OF_TORCH = ("none", "mean", "sum")  # what the torch route can export

_BETA = 0.5
_COLUMNS = 16
_ROWS = 64
_MANY = 1 << 16  # rows of the large case, where a sum in float32 shows


@dataclass(frozen=True)
class Row:
    """One of our files."""

    route: str
    variant: str
    dtype: str

    @property
    def attached(self) -> bool:
        return self.route.startswith("attach")

    @property
    def spec(self) -> LossSpec:
        given = VARIANTS[self.variant]
        beta = {} if given.get("runtime_beta") else {"beta": _BETA}
        return LossSpec(dtype=self.dtype, **beta, **given)

    def model(self) -> onnx.ModelProto:
        spec, weight = self.spec, "weight" if self.spec.weight else None
        if not self.attached:
            return export(spec, self.route, ("N", _COLUMNS))
        route = self.route.removeprefix("attach ")
        return attach(host(self.dtype), "y", "target", spec, weight=weight, route=route)


_HOST = ("linear", "narrow")  # the nodes of the model that a loss is attached to


def host(dtype: str) -> onnx.ModelProto:
    """A linear layer in float32, its output in `dtype`; its weights leave every number as it is."""
    kind = "float" if dtype == "float32" else dtype.replace("float64", "double")
    nodes = '["linear"] h = MatMul(x, w) ["narrow"] y = Cast<to = TYPE>(h)'
    if dtype == "float32":
        nodes = '["linear"] y = MatMul(x, w)'
    nodes = nodes.replace("TYPE", str(ELEMENT_TYPE[dtype]))
    text = f"host (float[N, {_COLUMNS}] x) => ({kind}[N, {_COLUMNS}] y) {{ {nodes} }}"
    return model_of(text, ir=10, w=np.eye(_COLUMNS, dtype=np.float32))


def rows() -> Iterator[Row]:
    """Every file that can be made."""
    for route, variant, dtype in itertools.product(ROUTES, VARIANTS, DTYPES):
        if route != "torch" or variant in _OF_TORCH:
            yield Row(route, variant, dtype)


# --- tools -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _files(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        before, after = (os.path.join(folder, name) for name in ("before.onnx", "after.onnx"))
        onnx.save(model, before)
        yield before, after


def _untouched(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def _called(path: str, model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)(model, **options)
    return found[0] if isinstance(found, tuple) else found


def _by(path: str, **options: Any) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """What the function at `path` gives for a model; it goes to another process."""
    return partial(_called, path, **options)


def _onnx_ir(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx_ir
    from onnx_ir.passes import common

    # Every pass but the one that drops the model's metadata, each on what the last one left.
    names = [name for name in common.__all__ if name != "ClearMetadataAndDocStringPass"]
    ir = onnx_ir.serde.deserialize_model(model)
    for name in names:
        ir = getattr(common, name)()(ir).model
    return onnx_ir.serde.serialize_model(ir)


def _ort_saved(model: onnx.ModelProto, level: str) -> onnx.ModelProto:
    import onnxruntime as ort

    with _files(model) as (before, after):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = getattr(levels, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = after
        ort.InferenceSession(before, options, providers=["CPUExecutionProvider"])
        return onnx.load(after)


def _merged(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model behind another one, whose output becomes its first input."""
    import onnx.compose

    first = model.graph.input[0]
    ports = "(float[N] front_x) => (float[N] front_y)"
    front = model_of(f'front {ports} {{ ["front"] front_y = Identity(front_x) }}')
    for value in (front.graph.input[0], front.graph.output[0]):
        value.type.CopyFrom(first.type)
    front.ir_version = model.ir_version
    front.opset_import[0].version = next(e.version for e in model.opset_import if not e.domain)
    return onnx.compose.merge_models(front, model, io_map=[("front_y", first.name)])


def _quantize_dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.quantization import quantize_dynamic

    with _files(model) as (before, after):
        quantize_dynamic(before, after)
        return onnx.load(after)


def _quantize_static(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            self.batches = [_some_feeds(model, rng) for _ in range(4)]

        def get_next(self) -> dict[str, Array] | None:
            return self.batches.pop() if self.batches else None

    # It takes plain operators of a loss for a part of the network, as it must: whoever attached
    # them by `inlined` excludes them. Nodes of local functions it leaves alone by itself.
    own = () if model.functions else [n.name for n in model.graph.node if n.name not in _HOST]
    with _files(model) as (before, after):
        quantize_static(before, after, Reader(), nodes_to_exclude=own)
        return onnx.load(after)


def _some_feeds(model: onnx.ModelProto, rng: np.random.Generator) -> dict[str, Array]:
    feeds = {}
    for value in model.graph.input:
        shape = [dim.dim_value or _ROWS for dim in value.type.tensor_type.shape.dim]
        feeds[value.name] = np.asarray(rng.normal(size=shape)).astype(_dtype(value))
    return feeds


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    return NUMPY_DTYPE[DTYPE_OF_ELEMENT[value.type.tensor_type.elem_type]]


def _polygraphy(model: onnx.ModelProto) -> onnx.ModelProto:
    from polygraphy.tools import main

    with _files(model) as (before, after):
        words = ["polygraphy", "surgeon", "sanitize", "--fold-constants", before, "-o", after]
        given, sys.argv = sys.argv, words
        try:
            main()
        except SystemExit as exc:
            if exc.code:
                raise RuntimeError(f"it ends with {exc.code}") from exc
        finally:
            sys.argv = given
        return onnx.load(after)


@dataclass(frozen=True)
class Tool:
    """What people run on a file.

    Attributes:
        name: as docs/compat.md shows it.
        package: the package that has it and that must be there; its version is shown.
        run: a model to the changed one.
        only: a word that the routes it is tried on begin with; empty for every route.
        narrows: whether it makes float16 of float32: its number is held against the loss in
            float16, on inputs within that range.
    """

    name: str
    package: str
    run: Callable[[onnx.ModelProto], onnx.ModelProto]
    only: str = ""
    narrows: bool = False


_NEWEST = 26  # what the ONNX Runtime of constraints.txt reads; it calls later ones unfinished

_ORT, _COMMON, _HALVE = "onnxruntime", "onnxconverter_common", "float16.convert_float_to_float16"
_CONVERT = partial(_by, "onnx.version_converter.convert_version")
TOOLS = (
    Tool("untouched", _ORT, _untouched),
    Tool("onnxscript.optimizer", "onnxscript", _by("onnxscript.optimizer.optimize")),
    Tool("onnx_ir, every common pass", "onnx-ir", _onnx_ir),
    Tool("onnxsim", "onnxsim", _by("onnxsim.simplify")),
    Tool("onnxslim", "onnxslim", _by("onnxslim.slim")),
    Tool("onnxoptimizer", "onnxoptimizer", _by("onnxoptimizer.optimize")),
    Tool("ONNX Runtime's saved model, basic", _ORT, partial(_ort_saved, level="BASIC")),
    Tool("ONNX Runtime's saved model, extended", _ORT, partial(_ort_saved, level="EXTENDED")),
    Tool("ONNX Runtime's saved model, all", _ORT, partial(_ort_saved, level="ALL")),
    Tool(f"{_ORT}.transformers.float16", _ORT, _by(f"{_ORT}.transformers.{_HALVE}"), narrows=True),
    Tool(f"{_COMMON}.float16", "onnxconverter-common", _by(f"{_COMMON}.{_HALVE}"), narrows=True),
    Tool("onnx.version_converter to 17", "onnx", _CONVERT(target_version=17)),
    Tool(f"onnx.version_converter to {_NEWEST}", "onnx", _CONVERT(target_version=_NEWEST)),
    Tool("onnx.inliner", "onnx", _by("onnx.inliner.inline_local_functions")),
    Tool("onnx.compose.merge_models", "onnx", _merged),
    Tool("quantize_dynamic", _ORT, _quantize_dynamic, "attach"),
    Tool("quantize_static", _ORT, _quantize_static, "attach"),
    Tool("polygraphy surgeon sanitize", "polygraphy", _polygraphy),
)


# --- the judge -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Attributes:
        status: `same`, `refuses` (the tool by itself), `unloadable` or `wrong`.
        detail: what was said, or what is wrong.
        fault: of the tool, where the file can't be loaded for that.
    """

    status: str
    detail: str = ""
    fault: str = ""

    @property
    def ok(self) -> bool:
        """Nothing here is ours to mend."""
        return self.status in ("same", "refuses") or bool(self.fault)

    def __str__(self) -> str:
        """The outcome as the table tells it, without what differs from file to file."""
        if self.fault:
            return f"unloadable, the tool's own fault: {self.fault}"
        return self.status + (f": {self.detail}" if self.detail else "")


FAULTS = (
    ("version_converter", "is not a registered function/op",
     "it drops every local function of a model"),
    ("float16", r"Op \((\w*SmoothL1Loss\w*|BetaDivisor)\) .*ShapeInferenceError",
     "it does not look into local functions, whose constants stay float32"),
    ("onnxconverter_common", r"Type \(tensor\(float16\)\) of output arg .* does not match expected "
     "type", "it declares the result of a Cast to float32 to be float16, and leaves the Cast"),
)  # fmt: skip


#: Families whose numbers, and all that is computed on the way, are within the range of float16.
_OF_FLOAT16 = ("normal", "quadratic", "linear", "boundary", "zeros")


def _cases(row: Row, narrows: bool) -> Iterator[Case]:
    if narrows:
        yield from (Case.of(family, "matrix") for family in _OF_FLOAT16)
        return
    yield from (Case.of(family, "matrix") for family in FAMILIES)
    if row.spec.reduction != "none" and not row.spec.per_sample:
        shape = (_MANY, _COLUMNS)
        yield Case("constant", "large", shape, shape)


@lru_cache(maxsize=256)
def _references(
    spec: LossSpec, shape: tuple[int, ...], *data: bytes | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """PyTorch's and the exact answer to input, target and weight."""
    dtype = NUMPY_DTYPE[spec.dtype]
    arrays = [None if d is None else np.frombuffer(d, dtype).reshape(shape) for d in data]
    input, target, weight = arrays
    exact = {"loss": oracle(spec, input, target, weight)}
    if spec.gradient:
        exact["grad_input"] = oracle_gradient(spec, input, target, weight)
    return eager_outputs(spec, input, target, weight), exact


def judge(row: Row, model: onnx.ModelProto, narrows: bool = False) -> Outcome:
    """Load and run a changed file, and hold every output against PyTorch and the oracle."""
    try:
        session = opened(model, threads=1)
    except Exception as exc:  # pybind raises a class of its own for each status code
        return Outcome("unloadable", _first(exc))
    for case in _cases(row, narrows):
        try:
            detail = _check(row, model, session, case, narrows)
        except Exception as exc:
            return Outcome("unloadable", f"when it runs: {_first(exc)}")
        if detail:
            return Outcome("wrong", f"{case.family} {case.input_shape}: {detail}")
    return Outcome("same")


def _check(row: Row, model: onnx.ModelProto, session: Any, case: Case, narrows: bool) -> str:
    """What is wrong with one case; empty where nothing is."""
    spec = row.spec
    number = LossSpec(_BETA, spec.reduction, spec.dtype) if spec.runtime_beta else spec
    input, target = case.arrays(number)
    shape = input.shape
    given = {"input": input, "x": input, "front_x": input, "target": target}
    if spec.weight:
        given["weight"] = case.more(spec)["weight"]
    if spec.runtime_beta:
        given["beta"] = np.asarray(_BETA, np.float32)
    with np.errstate(over="ignore"):
        feeds = {value.name: given[value.name].astype(_dtype(value)) for value in model.graph.input}
    outputs = run_session(session, feeds)
    compared = outputs["y"] if row.attached else feeds.get("input", feeds.get("front_x"))
    dtype = dtype_name(outputs["loss"].dtype)
    if narrows:
        number = replace(number, dtype=dtype)
    if dtype != number.dtype:
        return f"the loss is {dtype}"
    data = [compared, feeds["target"], feeds.get("weight")]
    torch, exact = _references(
        number, shape, *(None if array is None else array.tobytes() for array in data)
    )
    for name in exact:
        verdict = compare(
            number, outputs[name], torch[name], exact[name], compared, feeds["target"], name
        )
        if not verdict.ok:
            return f"{name}: {verdict.detail}"
    return ""


def _first(exc: Exception) -> str:
    said = " ".join(str(exc).split()) or type(exc).__name__
    return said[:400]


def survive(tool: Tool, row: Row, data: bytes | None = None) -> Outcome:
    """One cell of the table; `data` is the row's file, where it is made already."""
    copy = onnx.load_model_from_string(data or row.model().SerializeToString())
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        try:
            changed = tool.run(copy)
        except Exception as exc:  # a tool raises what it likes
            return Outcome("refuses", f"{type(exc).__name__}: {_first(exc)}")
    found = judge(row, changed, tool.narrows)
    if found.status == "unloadable":
        for word, pattern, fault in FAULTS:
            if word in tool.name and re.search(pattern, found.detail):
                return replace(found, fault=fault)
    return found


# --- the table -------------------------------------------------------------------------------

_ROOT = Path(__file__).resolve().parent.parent
_PAGE = _ROOT / "docs" / "compat.md"
_BEGIN, _END = (f"<!-- {what} scripts/survival -->\n" for what in ("written by", "end of"))

Found = Mapping[Row, Outcome]


def _quiet() -> None:
    """Keep what libraries print from C++ out of the table."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _every_cell(tool: Tool, files: Mapping[Row, bytes]) -> Found:
    """What becomes of every file, in a process of its own, which the tool may end."""
    found: dict[Row, Outcome] = {}
    pending = [row for row in files if row.route.startswith(tool.only)]
    while pending:
        with ProcessPoolExecutor(1, get_context("spawn"), _quiet) as pool:
            jobs = [pool.submit(survive, tool, row, files[row]) for row in pending]
            for row, job in zip(pending, jobs, strict=True):
                try:
                    found[row] = job.result()
                except BrokenProcessPool:
                    found[row] = Outcome("wrong", "it ends the interpreter")
                    break
        pending = [row for row in pending if row not in found]
    return found


def _which(cells: Sequence[Row]) -> str:
    """Rows of one route in few words: `mean, sum of float32`; empty for all there are."""
    route = cells[0].route
    variants = _OF_TORCH if route == "torch" else tuple(VARIANTS)
    by_dtypes: dict[tuple[str, ...], list[str]] = {}
    for variant in variants:
        dtypes = tuple(d for d in DTYPES if Row(route, variant, d) in cells)
        if dtypes:
            by_dtypes.setdefault(dtypes, []).append(variant)
    parts = []
    for dtypes, some in by_dtypes.items():
        what = "" if len(some) == len(variants) else ", ".join(some)
        of = "" if len(dtypes) == len(DTYPES) else ", ".join(dtypes)
        parts.append(" of ".join(part for part in (what, of) if part))
    return "; ".join(parts)


def table(results: Mapping[str, Found]) -> str:
    """A Markdown table of tools and routes, equal cells told together in its notes.

    Args:
        results: name of a tool, as it is to be shown, -> what became of each file.
    """
    notes: list[str] = []
    lines = ["| tool | " + " | ".join(ROUTES) + " |", "| --- |" + " --- |" * len(ROUTES)]
    for name, found in results.items():
        shown = []
        for route in ROUTES:
            by_text: dict[str, list[Row]] = {}
            for row, outcome in found.items():
                if row.route == route:
                    by_text.setdefault(str(outcome), []).append(row)
            marks = []
            for text, some in by_text.items():
                if text == "same":
                    continue
                note = ": ".join(part for part in (_which(some), text) if part)
                if note not in notes:
                    notes.append(note)
                marks.append(f"[{notes.index(note) + 1}]")
            words = ["same"] * ("same" in by_text) + marks
            shown.append(", ".join(words) if by_text else "")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    listed = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *listed]).rstrip() + "\n"


def missing(tool: Tool) -> bool:
    """Whether what it lives on is not installed."""
    return importlib.util.find_spec(tool.package.replace("-", "_")) is None


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the table; write it where every tool was there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tools", nargs="*", metavar="TOOL", help="words of the tools' names")
    words = parser.parse_args(arguments).tools
    chosen = [tool for tool in TOOLS if not words or any(word in tool.name for word in words)]
    here = [tool for tool in chosen if not missing(tool)]
    for tool in chosen:
        if tool not in here:
            print(f"{tool.name} is missing: pip install -c constraints.txt {tool.package}")
    files = {row: row.model().SerializeToString() for row in rows()}
    results: dict[str, Found] = {}
    for tool in here:
        version = importlib.metadata.version(tool.package)
        found = results[f"{tool.name} ({version})"] = _every_cell(tool, files)
        same = sum(outcome.status == "same" for outcome in found.values())
        print(f"{tool.name}: {same} of {len(found)} the same", flush=True)
    text = table(results)
    if not words and here == chosen:
        head, _, rest = _PAGE.read_text().partition(_BEGIN)
        tail = rest.partition(_END)[2]
        _PAGE.write_text(f"{head}{_BEGIN}\n{text}\n{_END}{tail}")
        print(f"wrote {_PAGE.relative_to(_ROOT)}")
    else:
        print(text)
    bad = [
        f"{name}: {row}: {outcome}"
        for name, found in results.items()
        for row, outcome in found.items()
        if not outcome.ok
    ]
    print("\n".join(bad) or "nothing is wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
