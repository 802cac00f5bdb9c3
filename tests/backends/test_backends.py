"""The backends behind one protocol: the same arrays in, the same loss out, the same refusals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from agreement import assert_right, pair
from onnx import helper

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends import base
from smoothl1_deploy.backends.base import BACKENDS, get_backend, load
from smoothl1_deploy.errors import (
    ArtefactError,
    InvalidInputError,
    MissingDependencyError,
    ModelWarning,
    SpecError,
    UnsupportedError,
)
from smoothl1_deploy.floats import NUMPY_DTYPE
from smoothl1_deploy.reference.module import eager
from smoothl1_deploy.reference.oracle import oracle
from smoothl1_deploy.spec import DTYPES, REDUCTIONS

ON_THE_CPU = ("torch", "onnx-reference", "ort-cpu")
every_backend = pytest.mark.parametrize("backend", ON_THE_CPU)


def foreign(op_type: str = "Sub", domain: str = "") -> onnx.ModelProto:
    """A model that this package didn't make."""
    graph = helper.make_graph(
        [helper.make_node(op_type, ["a", "b"], ["c"], domain=domain)],
        "foreign",
        [helper.make_tensor_value_info(name, 1, ["N", 4]) for name in ("a", "b")],
        [helper.make_tensor_value_info("c", 1, None)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain or "other", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


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
    assert str(caught.value) == f"unknown backend 'ort'; choose one of {', '.join(BACKENDS)}"


def test_a_backend_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

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


@every_backend
def test_load_refuses_a_damaged_file(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "loss.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ArtefactError, match="it is damaged, or of another format"):
        load(path, backend)


@pytest.mark.parametrize("backend", ["ort-cpu", "onnx-reference"])
def test_of_a_changed_model_its_own_graph_runs_at_every_size(backend: str) -> None:
    """And not a graph made from the spec in its metadata, which it may no longer compute."""
    spec = LossSpec(0.5, "sum")
    model = export(spec)
    model.graph.node[0].attribute[0].f = 2.0
    for size in (3, 1 << 18):
        with pytest.warns(ModelWarning, match="changed by something else after"):
            runner = load(model, backend)
        a, b = pair(spec, (size,))
        assert_right(LossSpec(2.0, "sum"), runner.run(a, b)["loss"], a, b)


def test_torch_refuses_a_changed_model_whose_graph_it_would_not_run() -> None:
    model = export(LossSpec(0.5))
    model.graph.node[0].attribute[0].f = 2.0
    with (
        pytest.warns(ModelWarning),
        pytest.raises(ArtefactError, match="this model was changed since it was exported: its "),
    ):
        load(model, "torch")


def test_a_changed_model_that_answers_in_another_shape_than_its_spec_s_is_no_crash() -> None:
    """bfloat16 results are written to memory of the shape that the spec promises."""
    model = export(LossSpec(0.5, "none", "bfloat16"), "inlined", shape=("N",))
    onnx.helper.set_model_props(
        model,
        {
            **{entry.key: entry.value for entry in model.metadata_props},
            "smoothl1_deploy.spec": '{"dtype": "bfloat16", "reduction": "sum"}',
        },
    )
    with pytest.warns(ModelWarning):
        runner = load(model)
    a, b = pair(LossSpec(dtype="bfloat16"), (5,))
    with pytest.raises(InvalidInputError, match="ONNX Runtime refused"):
        runner.run(a, b)


def test_torch_refuses_a_model_without_a_spec() -> None:
    with pytest.raises(ArtefactError) as caught:
        load(foreign(), "torch")
    assert str(caught.value) == (
        "the torch backend computes what an artefact's spec says, and this model carries none; "
        "use a backend that runs the graph, such as ort-cpu"
    )


@pytest.mark.parametrize("backend", ["ort-cpu", "onnx-reference"])
def test_a_model_of_other_origin_runs(backend: str) -> None:
    runner = load(foreign(), backend)
    assert runner.spec is None
    a, b = pair(LossSpec(), (3, 4))
    assert (runner.run(a, b)["c"] == a - b).all()


def test_onnx_runtime_refuses_an_operator_it_does_not_know() -> None:
    with pytest.raises(UnsupportedError, match="^ONNX Runtime can't load the model: .*NoSuchOp"):
        load(foreign("NoSuchOp", "nobody"))


# Running


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_backend_gives_the_loss(backend: str, dtype: str, reduction: str) -> None:
    for beta in (0.0, 0.5):
        spec = LossSpec(beta, reduction, dtype)
        runner = load(export(spec), backend)
        for a_shape, b_shape in (((6, 5), (6, 5)), ((6, 5), (5,)), ((), ()), ((2, 0), (2, 1))):
            a, b = pair(spec, a_shape)[0], pair(spec, b_shape)[1]
            result = runner.run(a, b)
            assert list(result) == ["loss"]
            loss = result["loss"]
            assert type(loss) is np.ndarray
            assert loss.dtype == NUMPY_DTYPE[dtype]
            expected = np.broadcast_shapes(a_shape, b_shape) if reduction == "none" else ()
            assert loss.shape == expected
            assert_right(spec, loss, a, b, backend)


def test_the_torch_backend_is_pytorch() -> None:
    spec = LossSpec(1000.0, "none", "float16")
    a = np.array([500.0], np.float16)
    got = load(export(spec), "torch").run(a, 0 * a)["loss"]
    assert got.tobytes() == eager(spec, a, 0 * a).tobytes() != oracle(spec, a, 0 * a).tobytes()


def _kinds(a: np.ndarray) -> dict[str, object]:
    """One matrix of shape (4, 4), handed over in many ways."""
    read_only = a.copy()
    read_only.flags.writeable = False
    kinds: dict[str, object] = {
        "plain": a,
        "transposed": np.ascontiguousarray(a.T).T,
        "reversed": a[::-1].copy()[::-1],
        "strided": np.repeat(a, 2, axis=1)[:, ::2],
        "read-only": read_only,
    }
    if a.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(a.copy().view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(a.copy())
        kinds["big-endian"] = a.astype(a.dtype.newbyteorder(">"))
    kinds["tensor"] = tensor
    kinds["requires grad"] = tensor.clone().requires_grad_()
    kinds["tensor, transposed"] = tensor.T.contiguous().T
    kinds["tensor, flipped"] = tensor.flip(0).flip(0)
    return kinds


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_kind(backend: str, dtype: str) -> None:
    spec = LossSpec(0.5, "none", dtype)
    a, b = pair(spec, (4, 4))
    runner = load(export(spec, shape=("N", 4)), backend)
    expected = runner.run(a, b)["loss"]
    for kind, value in _kinds(a).items():
        assert runner.run(value, b)["loss"].tobytes() == expected.tobytes(), kind
    for kind, value in _kinds(b).items():
        assert runner.run(a, value)["loss"].tobytes() == expected.tobytes(), kind


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_of_numpy_and_torch(backend: str, dtype: str) -> None:
    runner = load(export(LossSpec(1.0, "none", dtype), shape=()), backend)
    two = np.array(2, NUMPY_DTYPE[dtype])[()]
    assert isinstance(two, np.generic)
    loss = runner.run(two, torch.tensor(0.0, dtype=getattr(torch, dtype)))["loss"]
    assert (loss.shape, float(loss)) == ((), 1.5)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integer", ["int64", "uint8", "bool"])
def test_an_integral_target_is_promoted(backend: str, dtype: str, integer: str) -> None:
    runner = load(export(LossSpec(1.0, "sum", dtype)), backend)
    a = np.array([3.0, 1.0, 0.0], NUMPY_DTYPE[dtype])
    b = np.array([1, 1, 0], integer)
    assert float(runner.run(a, b)["loss"]) == 1.5
    assert float(runner.run(b, a)["loss"]) == 1.5
    assert float(runner.run(torch.from_numpy(b), a)["loss"]) == 1.5


@every_backend
def test_a_narrower_float_is_promoted(backend: str) -> None:
    runner = load(export(LossSpec(1.0, "none")), backend)
    a = np.array([0.1], np.float16)
    b = np.array([0.1], np.float32)
    d = np.float32(a[0]) - b[0]
    assert runner.run(a, b)["loss"][0] == np.float32(0.5) * d * d


@every_backend
def test_the_refusals(backend: str) -> None:
    runner = load(export(LossSpec(), shape=("N", 4)), backend)
    good = np.zeros((3, 4), np.float32)
    cases: list[tuple[object, object, str]] = [
        ([[0.0] * 4], good, "input is a list; give a numpy array or a tensor with __dlpack__"),
        (good, None, "target is missing; the artefact takes input, target"),
        (good, good.astype(object), "target has the dtype object, which is not a number format"),
        (good.astype(complex), good, "input has the dtype complex128, which is not a number"),
        (good.astype(str), good, "input has the dtype <U32, which is not a number format"),
        (good.astype(int), good.astype(int), "input and target are both integral (int64, int64)"),
        (good, good.astype(float), "input float32 and target float64 promote to float64, but the "
         "artefact is float32; convert them, or export with dtype='float64'"),
        (good.astype(np.float16), good.astype(ml_dtypes.bfloat16)[:, :3], "target has the shape "
         "(3, 3), but the artefact takes (N, 4) with N=3"),
        (good[:, 0], good, "input has the shape (3,), but the artefact takes (N, 4) with N=3"),
        (good, good[:1], "target has the shape (1, 4), but the artefact takes (N, 4) with N=3"),
        (good[0, 0], good, "input has the shape (), but the artefact takes (N, 4)"),
    ]  # fmt: skip
    for a, b, text in cases:
        with pytest.raises(InvalidInputError) as caught:
            runner.run(a, b)
        assert str(caught.value).startswith(text)


@every_backend
def test_shapes_that_can_not_be_broadcast(backend: str) -> None:
    runner = load(export(LossSpec()), backend)
    with pytest.raises(InvalidInputError) as caught:
        runner.run(np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32))
    assert str(caught.value) == "input (2, 3) and target (4, 3) can't be broadcast to one shape"


@every_backend
def test_two_halves_of_different_formats_run_in_float32(backend: str) -> None:
    runner = load(export(LossSpec(1.0, "sum")), backend)
    loss = runner.run(np.array([3.0], np.float16), np.array([1.0], ml_dtypes.bfloat16))["loss"]
    assert (loss.dtype, float(loss)) == (np.float32, 1.5)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_outputs_are_fresh_and_inputs_untouched(backend: str, dtype: str, beta: float) -> None:
    """With a target of 0 the loss of beta 0 is the input itself: a runtime could hand it back."""
    for reduction in REDUCTIONS:
        spec = LossSpec(beta, reduction, dtype)
        runner = load(export(spec), backend)
        a = np.array([1.0, 2.0, 3.0], NUMPY_DTYPE[dtype])
        b = np.zeros(3, NUMPY_DTYPE[dtype])
        kept = a.tobytes(), b.tobytes()
        first = runner.run(a, b)["loss"]
        value = first.tobytes()
        second = runner.run(a, b)["loss"]
        assert not np.shares_memory(first, a)
        assert not np.shares_memory(first, b)
        assert not np.shares_memory(first, second)
        second[...] = 7
        a[...] = 9
        runner.run(a, b)
        assert first.tobytes() == value
        a[...] = [1.0, 2.0, 3.0]
        assert (a.tobytes(), b.tobytes()) == kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_sixteen_threads_share_one_runner(dtype: str, reduction: str) -> None:
    spec = LossSpec(0.5, reduction, dtype)
    runner = load(export(spec))
    barrier = threading.Barrier(16)
    cases = []
    for i in range(16):
        a, b = pair(spec, (50 + i, 33))
        a = (a.astype(np.float32) * (1 + i)).astype(a.dtype)
        cases.append((a, b, runner.run(a, b)["loss"].tobytes()))
        assert_right(spec, runner.run(a, b)["loss"], a, b)

    def work(case: tuple[np.ndarray, np.ndarray, bytes]) -> int:
        a, b, expected = case
        barrier.wait(timeout=300)
        return sum(runner.run(a, b)["loss"].tobytes() != expected for _ in range(40))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, cases)) == [0] * 16


def test_the_number_of_threads_changes_no_result_of_none() -> None:
    spec = LossSpec(0.5, "none")
    a, b = pair(spec, (300, 70))
    model = export(spec)
    backends = (get_backend("ort-cpu", threads=threads) for threads in (1, 2))
    results = {backend.load(model).run(a, b)["loss"].tobytes() for backend in backends}
    assert len(results) == 1


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
    done = subprocess.run([sys.executable, "-c", _AT_EXIT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "1.5\nUnsupportedError the interpreter has shut down and imports nothing any more; run the "
        "artefact before, in a function given to atexit.register for instance\n"
    )


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_runner_says_why_it_is_not_sent_to_another_process(send: Callable[..., object]) -> None:
    with pytest.raises(UnsupportedError, match=r"can't be pickled or copied; send the model"):
        send(load(export(LossSpec())))
