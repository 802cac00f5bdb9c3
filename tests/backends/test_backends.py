"""The backends behind one protocol: the same arrays in, the same loss out, the same refusals."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from pathlib import Path

import child
import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from agreement import assert_right, pair
from handmade import model_of

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy._dlpack import to_torch
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._spec import DTYPES, REDUCTIONS
from smoothl1_deploy.backends import _base as base
from smoothl1_deploy.backends._base import BACKENDS, get_backend, load
from smoothl1_deploy.errors import (
    ArtefactError,
    InvalidInputError,
    MissingDependencyError,
    ModelWarning,
    SpecError,
    UnsupportedError,
)

ON_THE_CPU = ("torch", "onnx-reference", "ort-cpu")
every_backend = pytest.mark.parametrize("backend", ON_THE_CPU)


def foreign(operator: str = "Sub") -> onnx.ModelProto:
    """A model that this package didn't make."""
    text = f"g (float[N, 4] a, float[N, 4] b) => (float[N, 4] c) {{ c = {operator}(a, b) }}"
    return model_of(text, imports=', "nobody" : 1')


# Loading


def test_the_backends_of_the_table_load_by_name() -> None:
    assert set(ON_THE_CPU) <= set(BACKENDS)
    for name in ON_THE_CPU:
        backend = get_backend(name)
        assert backend.name == name
        assert backend.refuses(LossSpec()) is None
        assert base.missing(name) is None


def test_an_unknown_backend() -> None:
    with pytest.raises(SpecError) as caught:
        load(export(LossSpec()), "ort")
    known = f"unknown backend 'ort'; choose one of {', '.join(BACKENDS)}, or give"
    assert str(caught.value).startswith(known)


OWN = """
from smoothl1_deploy.backends import Backend, get_backend

class Own(Backend):
    def load(self, model):
        return get_backend("onnx-reference").load(model)

class Other:
    pass
"""


def test_anyone_s_backend_is_called_module_and_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoothl1_deploy.parity._matrix import Matrix, run_matrix

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_runtime.py").write_text(OWN)
    one = np.ones(3, np.float32)
    assert load(export(LossSpec()), "own_runtime:Own").run(one, 0 * one)["loss"] == 0.5
    for name, problem in (
        ("own_runtime:Missing", "has no attribute 'Missing'"),
        ("no_such_module:Own", "No module named 'no_such_module'"),
        ("own_runtime:Other", "is no backend; subclass"),
        (":Own", "Empty module name"),
    ):
        with pytest.raises(SpecError, match=problem):
            get_backend(name)
    part = Matrix(("own_runtime:Own",), betas=(1.0,), dtypes=("float32",), reductions=("sum",),
                  routes=("function",), extensions=False, quick=True)  # fmt: skip
    (cell,) = run_matrix(part).cells
    assert cell.ok and cell.backend == "own_runtime:Own"


def test_a_backend_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    text = "the ort-cpu backend needs the package 'onnxruntime', which can't be imported"
    with pytest.raises(MissingDependencyError, match=text) as caught:
        load(export(LossSpec()), "ort-cpu")
    assert str(caught.value).endswith("Install it with: pip install 'smoothl1-deploy[cpu]'")
    assert base.missing("ort-cpu") == str(caught.value)


@every_backend
def test_load_takes_a_model_bytes_and_a_path(backend: str, tmp_path: Path) -> None:
    spec = LossSpec(0.5)
    model = export(spec)
    path = tmp_path / "loss.onnx"
    path.write_bytes(model.SerializeToString())
    a, b = pair(spec, (3, 4))
    for source in (model, model.SerializeToString(), path, str(path)):
        runner = load(source, backend)
        assert runner.spec == spec
        assert_right(spec, runner.run(a, b)["loss"], a, b)
    path.write_bytes(b"not a model")
    with pytest.raises(ArtefactError, match="it is damaged, or of another format"):
        load(path, backend)
    if backend != "torch":
        runner = load(foreign(), backend)
        assert runner.spec is None
        assert (runner.run(a, b)["c"] == a - b).all()


def test_of_a_changed_model_its_own_graph_runs_at_every_size() -> None:
    """And not a graph made from the spec in its metadata, which it may no longer compute."""
    spec = LossSpec(0.5, "sum")
    model = export(spec)
    model.graph.node[0].attribute[0].f = 2.0
    for backend in ("ort-cpu", "onnx-reference"):
        for size in (3, 1 << 18):
            with pytest.warns(ModelWarning, match="changed by something else after"):
                runner = load(model, backend)
            a, b = pair(spec, (size,))
            assert_right(LossSpec(2.0, "sum"), runner.run(a, b)["loss"], a, b)
    refusal = pytest.raises(ArtefactError, match="this model was changed since it was exported: ")
    with pytest.warns(ModelWarning), refusal:  # torch would not run its graph
        load(model, "torch")


def test_a_changed_model_that_answers_in_another_shape_than_its_spec_s_is_no_crash() -> None:
    """bfloat16 results are written to memory of the shape that the spec promises."""
    model = export(LossSpec(0.5, "none", "bfloat16"), "inlined", shape=("N",))
    entry = next(e for e in model.metadata_props if e.key == "smoothl1_deploy.spec")
    entry.value = '{"dtype": "bfloat16", "reduction": "sum"}'
    with pytest.warns(ModelWarning):
        runner = load(model)
    with pytest.raises(InvalidInputError, match="ONNX Runtime refused"):
        runner.run(*pair(LossSpec(dtype="bfloat16"), (5,)))


def test_onnx_runtime_refuses_an_operator_it_does_not_know_and_an_engine(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="^ONNX Runtime can't load the model: .*NoSuchOp"):
        load(foreign("nobody.NoSuchOp"))
    engine = tmp_path / "loss.engine"
    with pytest.raises(UnsupportedError) as caught:
        load(engine)
    assert str(caught.value) == (
        f"{engine} is a TensorRT engine, and the backend ort-cpu runs ONNX models; use "
        "the backend trt, or give the model it was built from"
    )


# Running


@every_backend
def test_every_backend_gives_the_loss(backend: str) -> None:
    shapes = (((6, 5), (6, 5)), ((6, 5), (5,)), ((), ()), ((2, 0), (2, 1)))
    for beta, reduction, dtype in itertools.product((0.0, 0.5), REDUCTIONS, DTYPES):
        spec = LossSpec(beta, reduction, dtype)
        runner = load(export(spec), backend)
        for a_shape, b_shape in shapes:
            a, b = pair(spec, a_shape)[0], pair(spec, b_shape)[1]
            result = runner.run(a, b)
            assert list(result) == ["loss"]
            assert_right(spec, result["loss"], a, b, backend)


@every_backend
def test_arrays_of_every_layout_and_scalars(backend: str) -> None:
    for dtype in DTYPES:
        spec = LossSpec(0.5, "none", dtype)
        a, b = pair(spec, (4, 4))
        runner = load(export(spec, shape=("N", 4)), backend)
        expected = runner.run(a, b)["loss"].tobytes()
        tensor = to_torch(b.copy())
        turned = np.ascontiguousarray(a.T).T, tensor.T.contiguous().T
        for x, t in ((a, tensor), turned, (a[::-1].copy()[::-1], tensor.flip(0).flip(0))):
            assert runner.run(x, t)["loss"].tobytes() == expected
        runner = load(export(LossSpec(1.0, "none", dtype), shape=()), backend)
        two = np.array(2, NUMPY_DTYPE[dtype])[()]  # a scalar of numpy, and one of torch
        loss = runner.run(two, torch.tensor(0.0, dtype=getattr(torch, dtype)))["loss"]
        assert (loss.shape, float(loss)) == ((), 1.5)


@every_backend
def test_what_promotes_to_the_artefact_s_dtype_runs(backend: str) -> None:
    for dtype, integer in itertools.product(DTYPES, ("int64", "uint8", "bool")):
        runner = load(export(LossSpec(1.0, "sum", dtype)), backend)
        a, b = np.array([3.0, 1.0, 0.0], NUMPY_DTYPE[dtype]), np.array([1, 1, 0], integer)
        for given in ((a, b), (b, a), (torch.from_numpy(b), a)):
            assert float(runner.run(*given)["loss"]) == 1.5
    runner = load(export(LossSpec(1.0, "sum")), backend)
    loss = runner.run(np.array([3.0], np.float16), np.array([1.0], ml_dtypes.bfloat16))["loss"]
    assert (loss.dtype, float(loss)) == (np.float32, 1.5)


@every_backend
def test_the_refusals(backend: str) -> None:
    runner = load(export(LossSpec(), shape=("N", 4)), backend)
    good = np.zeros((3, 4), np.float32)
    for a, b, text in (
        ([[0.0] * 4], good, "input is a list; give a numpy array or a tensor with __dlpack__"),
        (good, None, "target is missing; the artefact takes input, target"),
        (good, good.astype(object), "target has the dtype object, which is not a number format"),
        (good.astype(int), good.astype(int), "input and target are both integral (int64, int64)"),
        (good, good.astype(float), "input float32 and target float64 promote to float64, but the"),
        (good, good[:1], "target has the shape (1, 4), but the artefact takes (N, 4) where N is 3"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            runner.run(a, b)
        assert str(caught.value).startswith(text)


@every_backend
def test_outputs_are_fresh_and_inputs_untouched(backend: str) -> None:
    """With a target of 0 the loss of beta 0 is the input itself: a runtime could hand it back."""
    for reduction, dtype, beta in itertools.product(REDUCTIONS, DTYPES, (0.0, 1.0)):
        spec = LossSpec(beta, reduction, dtype, gradient=beta > 0)
        runner = load(export(spec), backend)
        a, b = np.array([1.0, 2.0, 3.0], NUMPY_DTYPE[dtype]), np.zeros(3, NUMPY_DTYPE[dtype])
        kept = a.tobytes(), b.tobytes()
        first, second = runner.run(a, b), runner.run(a, b)
        values = {name: array.tobytes() for name, array in first.items()}
        for name, array in first.items():
            assert not any(np.shares_memory(array, each) for each in (a, b, second[name]))
            second[name][...] = 7
        assert (a.tobytes(), b.tobytes()) == kept
        a[...] = 9
        runner.run(a, b)
        assert {name: array.tobytes() for name, array in first.items()} == values


@every_backend
def test_running_is_silent_about_what_ieee_754_defines(backend: str) -> None:
    runner = load(export(LossSpec(0.0, "none")), backend)
    a = np.array([np.inf, np.nan, 3e38, np.inf], np.float32)
    with np.errstate(all="raise"):
        loss = runner.run(a, -a)["loss"]
    assert np.isinf(loss[[0, 2, 3]]).all()
    assert np.isnan(loss[1])


_AT_EXIT = """
import atexit
import numpy as np
from smoothl1_deploy import LossSpec, export, load

runner = load(export(LossSpec()), threads=4)
pair = np.full((2, 1 << 21), [[2.0], [0.0]], np.float32)  # of many tasks, for many threads

class Late:
    def __del__(self, runner=runner, pair=pair, print=print):
        try:
            print(runner.run(*pair)["loss"])
        except Exception as error:
            print(type(error).__name__, error)

late = Late()  # goes when the modules have gone
atexit.register(lambda: print(runner.run(*pair)["loss"]))
"""


def test_at_the_exit_of_the_interpreter_it_runs_or_says_that_it_is_too_late() -> None:
    done = child.run("-c", _AT_EXIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "1.5\nUnsupportedError the interpreter has shut down and imports nothing any more; run the "
        "artefact before, in a function given to atexit.register for instance\n"
    )


def test_a_runner_says_why_it_is_not_sent_to_another_process() -> None:
    for send in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UnsupportedError, match=r"can't be pickled or copied; send the model"):
            send(load(export(LossSpec())))
