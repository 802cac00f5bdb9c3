"""The operators of `ops`: ONNX Runtime runs them for the files, and their bits are everyone's."""

from __future__ import annotations

import ctypes
import doctest
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest
from handmade import assert_near, model_of, run_session
from onnx import helper

from smoothl1_deploy import LossSpec, attach, export, load, ops
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._model import ELEMENT_TYPE
from smoothl1_deploy._spec import DTYPES, NORMALIZERS, REDUCTIONS
from smoothl1_deploy.errors import BackendUnavailableError, SpecError, UnsupportedError
from smoothl1_deploy.ops import library, operators, register
from smoothl1_deploy.parity._pairs import Exact

FOLDER = Path(__file__).parents[2] / "smoothl1_deploy" / "ops" / "c"

try:
    library()
except BackendUnavailableError as exc:
    if shutil.which("cc"):
        raise
    pytest.skip(str(exc), allow_module_level=True)


def losses(dtype: str, **gradient: bool) -> Iterator[LossSpec]:
    """Every loss that is one node, of a beta that is known, one that isn't, and 0."""
    weights = None, *NORMALIZERS
    for reduction, by_row, weight in itertools.product(REDUCTIONS, (False, True), weights):
        with suppress(SpecError):
            spec = LossSpec(0.5, reduction, dtype, per_sample=by_row, weight=weight, **gradient)
            yield from (spec, replace(spec, beta=1.0, runtime_beta=True), replace(spec, beta=0.0))


def gradients(dtype: str) -> Iterator[LossSpec]:
    """The same with a gradient."""
    yield from losses(dtype, gradient=True)
    yield from losses(dtype, gradient=True, upstream=True)


def arrays(spec: LossSpec, *shape: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    shapes = dict.fromkeys(spec.inputs, shape)
    shapes |= {"grad_output": spec.loss_shape(shape), "divisor": ()}
    drawn = {
        name: np.asarray(random.uniform(0, 2, shapes[name]), NUMPY_DTYPE.get(spec.dtype_of(name)))
        for name in spec.inputs
        if name != "beta"
    }
    if spec.mask:
        drawn["mask"] = drawn["mask"] > 0.5
    return drawn | ({"beta": 0.5} if spec.runtime_beta else {})


def bits(array: np.ndarray[Any, Any]) -> bytes:
    return array.tobytes() + str(array.shape).encode()


def test_documented_examples_work() -> None:
    done = doctest.testmod(ops)
    assert done.attempted >= 8 and done.failed == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_runs_and_not_the_body(dtype: str) -> None:
    """A body that gives back its input would show: silently, a node that is not claimed is slow."""
    for spec in (*losses(dtype), *gradients(dtype)):
        model = export(spec, shape=(4, 16))
        del model.metadata_props[:]
        arguments = arrays(spec, 4, 16)
        right = _run(model, spec, arguments, by_body=True)
        whole = model.functions[-1]
        assert whole.name == model.graph.node[0].op_type
        del whole.node[:]
        for output in whole.output:
            whole.node.append(helper.make_node("Identity", [whole.input[0]], [output]))
        for name, got in _run(model, spec, arguments).items():
            ulp = np.spacing(np.abs(right[name]).max())
            assert got.shape == right[name].shape, spec
            assert np.abs(got.astype("f8") - right[name].astype("f8")).max() <= ulp, (name, spec)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_run_what_a_loss_without_a_name_is_made_of(dtype: str) -> None:
    """Bodies that give 7 would show."""
    others = [
        LossSpec(0.5, "none", dtype, mask=True, gradient=True),
        LossSpec(0.5, "mean", dtype, mask=True, weight="count", per_sample=True, empty="zero"),
        LossSpec(0.5, "sum", dtype, axes=(0,), gradient=True, upstream=True),
        LossSpec(0.0, "mean", dtype, divisor=True, gradient=True, loss_weight=0.5),
        LossSpec(reduction="mean", dtype=dtype, mask=True, runtime_beta=True),
        LossSpec(np.linspace(0, 2, 16), dtype=dtype, gradient=True),
        LossSpec(loss="huber", delta=0.5, dtype=dtype, gradient=True),
        LossSpec(loss="huber", dtype=dtype, per_sample=True, runtime_beta=True),
        LossSpec(0.5, "mean", dtype, elements="losses"),
        LossSpec(0.5, "sum", dtype, weight="count", per_sample=True, elements="differences"),
    ]
    if dtype != "float64":
        others.append(LossSpec(0.5, dtype=dtype, mask=True, weight="weights", per_sample=True))
    for spec in others:
        model = export(spec, shape=(4, 16))
        del model.metadata_props[:]
        arguments = arrays(spec, 4, 16)
        right = _run(model, spec, arguments, by_body=True)
        parts = [f for f in model.functions if f.name in operators() and f.name != "WideSum"]
        assert len(parts) == 1 + spec.gradient
        for body in parts:
            del body.node[:]
            for name in body.output:
                is_sum = name.endswith(("total", "count", "weights"))
                own = "float64" if is_sum else dtype
                seven = helper.make_tensor(name, ELEMENT_TYPE[own], [], [7.0])
                body.node.append(helper.make_node("Constant", [], [name], value=seven))
        for name, got in _run(model, spec, arguments).items():
            ulp = np.spacing(np.abs(right[name]).max())
            assert got.shape == right[name].shape, spec
            assert np.abs(got.astype("f8") - right[name].astype("f8")).max() <= ulp, (name, spec)


def _run(
    model: onnx.ModelProto, spec: LossSpec, arguments: dict[str, Any], *, by_body: bool = False
) -> dict[str, Any]:
    """A session as anyone opens it. The body as it stands in the file."""
    options = ort.SessionOptions()
    if by_body:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        register(options)
    session = ort.InferenceSession(model.SerializeToString(), options)
    beta = {"beta": np.asarray(arguments["beta"], np.float32)} if "beta" in arguments else {}
    return run_session(session, arguments | beta)


@pytest.fixture
def use() -> Iterator[Any]:
    """The function that picks an instruction set, of the library that sessions have loaded."""
    choose = ctypes.CDLL(str(library())).smoothl1_deploy_use
    yield choose
    choose(choose(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(
    use: Any, dtype: str
) -> None:
    sets = range(1, use(0) + 1)
    for spec in (*losses(dtype), *losses(dtype, gradient=True, upstream=True)):
        if spec.runtime_beta and dtype != "float64":
            continue
        arguments = arrays(spec, 3, 100_003)  # several tasks a row, and threads
        model = export(spec, shape=("N", "M"))
        found = set()
        for threads in (1, 2, 5):
            runner = load(model, threads=threads)
            for number in sets:
                use(number)
                found.add(b"".join(map(bits, runner.run(**arguments).values())))
        assert len(found) == 1, spec


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_format_is_rounded_once(use: Any, dtype: str) -> None:
    """From the exact loss; the body rounds to float32 first: 6e-8 against -1947 gives 1946."""
    for beta in (1.0, 0.1, 0.0, 3e38, np.inf):
        right = Exact(LossSpec(beta, "none", dtype, gradient=True))
        inputs = np.append(right.targets[5::4096], right.targets[:: (1 << 15) - 1])
        x = np.repeat(inputs, 1 << 16).reshape(len(inputs), -1)
        exact = right.answers(inputs)
        for spec in (right.spec, right.spec.without_gradient()):
            runner = load(export(spec, shape=("N", 1 << 16)))
            for number in range(1, use(0) + 1):
                use(number)
                for name, got in runner.run(x, np.tile(right.targets, (len(x), 1))).items():
                    differs = got.view(np.uint16) != exact[name]
                    assert np.isnan(got[differs].astype("f4")).all(), (beta, name, number)


def test_64_threads_on_one_session_get_the_bits_of_one_alone() -> None:
    spec = LossSpec(0.5, per_sample=True, weight="weights", gradient=True)
    runner = load(export(spec, shape=("N", "M")), threads=2)
    for shape in ((4, 16), (3, 100_003)):  # one task; and ONNX Runtime's threads
        drawn = [arrays(spec, *shape, seed=seed) for seed in range(4)]
        alone = [[*map(bits, runner.run(**one).values())] for one in drawn]
        with ThreadPoolExecutor(64) as pool:
            found = pool.map(lambda one: runner.run(**one).values(), drawn * 32)
            assert [[*map(bits, outputs)] for outputs in found] == alone * 32


def test_memory_is_flat_over_many_calls() -> None:
    spec = LossSpec(0.5, per_sample=True, weight="weights", gradient=True)
    options = ort.SessionOptions()
    register(options)
    session = ort.InferenceSession(export(spec, shape=("N", 16)).SerializeToString(), options)
    binding = session.io_binding()
    for name, array in arrays(spec, 16, 16).items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for name, given in (("loss", (16,)), ("grad_input", (16, 16))):
        binding.bind_ortvalue_output(
            name, ort.OrtValue.ortvalue_from_shape_and_type(given, np.float32)
        )
    process, before = psutil.Process(), 0
    for calls in (5_000, 45_000):
        before = process.memory_info().rss
        for _ in range(calls):
            session.run_with_iobinding(binding)
    assert process.memory_info().rss - before < 2**20  # what a call allocates, 45,000 times: 6 MB


def test_any_split_into_batches_gives_the_bits_of_the_whole() -> None:
    for spec in (
        LossSpec(reduction="none", gradient=True, upstream=True),
        LossSpec(per_sample=True, weight="weights", gradient=True, upstream=True),
    ):
        runner = load(export(spec, shape=("N", 7)))
        arguments = arrays(spec, 1000, 7)
        whole = runner.run(**arguments)
        for size in (1, 3, 997):
            parts = [
                runner.run(**{n: a[i : i + size] for n, a in arguments.items()})
                for i in range(0, 1000, size)
            ]
            for name in spec.outputs:
                assert bits(np.concatenate([part[name] for part in parts])) == bits(whole[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_has_the_bits_of_its_body(dtype: str) -> None:
    """In the half formats the cast of the body rounds twice (ONNX Runtime 1.31): a few differ."""
    shapes = [((5, 7), (1, 7), (5, 1)), ((2, 40_001),) * 3, ((0, 3),) * 3]
    for number, spec in enumerate(gradients(dtype)):
        given = shapes[number % 2] if number % 7 else shapes[2]
        beta = (0.0, 0.3, np.inf, -1.0, np.nan)[number % 5]
        if not spec.runtime_beta:
            spec = replace(spec, beta=beta if beta >= 0 else 1e300)
        arguments = arrays(spec, *given[0], seed=number)
        for name, shape in zip(("target", "weight"), given[1:], strict=True):
            if name in arguments:
                arguments[name] = arrays(spec, *shape, seed=number + 100)["target"]
        for name, value in {"input": -0.0, "target": np.inf, "weight": np.inf}.items():
            arguments.get(name, np.zeros(1)).reshape(-1)[:3] = value
        if number % 3 == 0:  # what is 0 has a sign too
            arguments.get("grad_output", np.zeros(1)).reshape(-1)[:1] = -0.0
        arguments |= {"beta": beta} if spec.runtime_beta else {}
        shape, target, weight = given
        weighted = {"weight_shape": weight} if spec.weight else {}
        model = export(spec, shape=shape, target_shape=target, **weighted)
        assert len(model.graph.node) == 1
        body = _run(model, spec, arguments, by_body=True)["grad_input"]
        ours = _run(model, spec, arguments)["grad_input"]
        assert ours.shape == given[0], spec
        assert_near(ours, body, int("16" in dtype), spec)
        finite = np.isfinite(body)
        assert np.array_equal(np.signbit(ours[finite]), np.signbit(body[finite])), spec
        assert np.count_nonzero((ours != body)[finite]) <= finite.sum() // 100, spec


def test_a_gradient_that_is_summed_back_is_left_to_the_body() -> None:
    """Where input is broadcast, or the file doesn't say that it isn't."""
    spec = LossSpec(0.5, gradient=True)
    arguments = arrays(spec, 5, 7) | {"input": arrays(spec, 1, 7)["input"]}
    for model in (export(spec), export(spec, shape=(1, 7), target_shape=(5, 7))):
        assert len(model.graph.node) > 1
        got, body = (_run(model, spec, arguments, by_body=by)["grad_input"] for by in (False, True))
        assert bits(got) == bits(body)


def test_what_flows_in_has_the_shape_of_the_loss() -> None:
    for reduction, wrong in (("none", (1, 4)), ("mean", (3,))):
        spec = LossSpec(reduction=reduction, gradient=True, upstream=True)
        arguments = arrays(spec, 3, 4) | {"grad_output": np.zeros(wrong, np.float32)}
        model = export(spec, shape=("N", 4))
        for value in model.graph.input:
            value.type.tensor_type.ClearField("shape")
        with pytest.raises(RuntimeError, match="grad_output hasn't the loss's shape"):
            _run(model, spec, arguments)


BROADCASTS = [
    [(), ()], [(3,), ()], [(5, 1), (1, 7)], [(2, 3, 1, 5), (4, 1)], [(40, 1, 900), (30, 1)],
    [(1, 1, 1), (1,)], [(0, 3), (1, 3)], [(3, 0), (3, 0)], [(1, 2) * 8, (2, 1) * 8],
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_broadcast(dtype: str) -> None:
    """Against the file's own body; sums in another order, so to an ULP."""
    for spec in losses(dtype):
        if spec.runtime_beta:
            continue
        ours, body = (load(export(spec), backend).run for backend in ("ort-cpu", "ort-cpu-bare"))
        for shapes in BROADCASTS:
            if spec.per_sample and not any(shapes):
                continue
            given = [*shapes, shapes[0][1:]][: 2 + bool(spec.weight)]
            names = ("input", "target", "weight")
            drawn = (arrays(spec, *shape, seed=seed)["input"] for seed, shape in enumerate(given))
            arguments = dict(zip(names, drawn, strict=False))
            with np.errstate(all="ignore"):
                assert_near(ours(**arguments)["loss"], body(**arguments)["loss"], 2, spec)


def test_a_mean_by_weights_whose_sums_overflow_is_the_body_s() -> None:
    for by_row, columns in itertools.product((False, True), (7, 100_003)):  # one task, and several
        spec = LossSpec(1e-3, dtype="float64", weight="weights", per_sample=by_row)
        model = export(spec, shape=("N", "M"))
        arguments = arrays(spec, 3, columns)
        arguments["weight"] *= 0.8e308
        arguments["input"][1] *= 1e300
        for largest in (arguments["weight"].max(), np.inf):
            arguments["weight"][0, 0] = largest
            body = _run(model, spec, arguments, by_body=True)["loss"]
            assert np.isfinite(body).any() == (by_row or largest < np.inf)
            assert_near(_run(model, spec, arguments)["loss"], body, 1, spec)


def test_what_is_no_beta_gives_nan_even_of_nothing() -> None:
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        spec = LossSpec(reduction=reduction, dtype=dtype, runtime_beta=True, gradient=True)
        runner = load(export(spec, shape=("N", 4)))
        for rows, beta in itertools.product((0, 2), (-1.0, np.nan)):
            found = runner.run(**arrays(spec, rows, 4) | {"beta": beta})
            assert all(np.isnan(output).all() for output in found.values())


def test_what_follows_the_node_knows_its_shape() -> None:
    """Without a kernel's own word, ONNX Runtime knows nothing of what an operator gives."""
    for spec, output, shape in (
        (LossSpec(reduction="none"), "loss", ["N", 16]),
        (LossSpec(per_sample=True), "loss", ["N"]),
        (LossSpec(gradient=True), "grad_input", ["N", 16]),
    ):
        host = model_of("g (float[N, 16] x) => (float[N, 16] y) { y = Relu(x) }")
        model = attach(host, "y", "t", spec)
        model.graph.node.append(helper.make_node("Identity", [output], ["after"]))
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("after", 1, None))
        del model.graph.output[1:]
        options = ort.SessionOptions()
        register(options)
        session = ort.InferenceSession(model.SerializeToString(), options)
        assert session.get_outputs()[0].shape == shape


def test_files_of_the_domain_s_first_version_load_and_gain() -> None:
    """Two nodes, as they were written until the domain's version 2."""
    spec = LossSpec(0.5)
    model = export(replace(spec, gradient=True))  # which is many nodes still
    names = {node.op_type for node in model.graph.node}
    assert {"SmoothL1Loss", "WideMean"} <= names
    for function in model.functions:
        if function.name in ("SmoothL1Loss", "WideMean"):  # bodies that would show
            given, gives = function.input[0], function.output[0]
            del function.node[:]
            function.node.append(helper.make_node("Identity", [given], [gives]))
    del model.metadata_props[:]
    arguments = arrays(spec, 8, 4)
    got = load(model, output_name="loss").run(**arguments)["loss"]
    assert np.allclose(got, load(export(spec)).run(**arguments)["loss"], rtol=1e-6)


def test_registered_twice_or_without_the_library_a_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    register(options)
    with pytest.raises(UnsupportedError, match="are registered with these SessionOptions already"):
        register(options)
    register(ort.SessionOptions())
    monkeypatch.setattr("smoothl1_deploy.ops._LIBRARY", tmp_path / "none.so")
    with pytest.raises(BackendUnavailableError, match="install a C compiler"):
        register(ort.SessionOptions())


def test_two_copies_of_the_library_serve_two_sessions_and_not_one(tmp_path: Path) -> None:
    copy = tmp_path / "copy.so"
    shutil.copy(library(), copy)
    spec = LossSpec(0.5, weight="count")
    model, arguments = export(spec).SerializeToString(), arrays(spec, 40, 16)
    sessions = []
    for path in (library(), copy):
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(path))
        sessions.append(ort.InferenceSession(model, options))
    ours, theirs = (session.run(None, arguments)[0] for session in sessions)
    assert bits(ours) == bits(theirs)
    options.register_custom_ops_library(str(library()))
    with pytest.raises(Exception, match="Domain already set in registry"):
        ort.InferenceSession(model, options)


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc has the sanitizers")
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    built = tmp_path / "sanitized.so"
    flags = ["-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-ffp-contract=off"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = FOLDER / "operators.c", FOLDER / "smooth_l1.c"
    subprocess.run(["gcc", *flags, "-o", built, *sources], check=True)
    asan = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    environment = os.environ | {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("sanitized.py"), built],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr[-3000:]
