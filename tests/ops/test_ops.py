"""The operators of `ops`: ONNX Runtime runs them for the files, and their bits are everyone's."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, parser

from smoothl1_deploy import LossSpec, attach, export, load
from smoothl1_deploy.errors import BackendUnavailableError, SpecError, UnsupportedError
from smoothl1_deploy.floats import NUMPY_DTYPE, ulp_distance
from smoothl1_deploy.ops import library, register
from smoothl1_deploy.spec import DTYPES, NORMALIZERS, REDUCTIONS

FOLDER = Path(__file__).parents[2] / "smoothl1_deploy" / "ops" / "c"

try:
    library()
except BackendUnavailableError as exc:
    if shutil.which("cc"):
        raise
    pytest.skip(str(exc), allow_module_level=True)


def losses(dtype: str) -> Iterator[LossSpec]:
    """Every loss that is one node."""
    weights = None, *NORMALIZERS
    for reduction, by_row, weight in itertools.product(REDUCTIONS, (False, True), weights):
        with suppress(SpecError):
            spec = LossSpec(0.5, reduction, dtype, per_sample=by_row, weight=weight)
            yield from (spec, replace(spec, beta=1.0, runtime_beta=True))


def arrays(spec: LossSpec, *shape: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    names = [name for name in spec.inputs if name != "beta"]
    drawn = {n: random.uniform(0, 2, shape).astype(NUMPY_DTYPE[spec.dtype]) for n in names}
    return drawn | ({"beta": 0.5} if spec.runtime_beta else {})


def bits(array: np.ndarray[Any, Any]) -> bytes:
    return array.tobytes() + str(array.shape).encode()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_runs_and_not_the_body(dtype: str) -> None:
    """A body that gives back its input would show: silently, a node that is not claimed is slow."""
    for spec in losses(dtype):
        model = export(spec, shape=None)
        del model.metadata_props[:]
        arguments = arrays(spec, 4, 16)
        right = load(export(spec, shape=None)).run(**arguments)["loss"]
        whole = model.functions[-1]
        assert whole.name == model.graph.node[0].op_type
        del whole.node[:]
        whole.node.append(helper.make_node("Identity", [whole.input[0]], [whole.output[0]]))
        got = _run(model, spec, arguments)
        is_claimed = not (dtype == "float64" and spec.weight == "weights")
        if is_claimed:  # the others' bodies keep a sum from overflowing
            ulp = np.spacing(np.abs(right).max())
            assert got.shape == right.shape, spec
            assert np.abs(got.astype(float) - right.astype(float)).max() <= ulp, spec
        else:
            assert np.array_equal(got, arguments["input"]), spec


def _run(model: onnx.ModelProto, spec: LossSpec, arguments: dict[str, Any]) -> Any:
    """A session as anyone opens it; bfloat16 by address."""
    options = ort.SessionOptions()
    register(options)
    session = ort.InferenceSession(model.SerializeToString(), options)
    binding = session.io_binding()
    for name, value in arguments.items():
        array = np.asarray(value, np.float32) if name == "beta" else value
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        binding.bind_input(name, "cpu", 0, element, array.shape, array.ctypes.data)
    binding.bind_output("loss")
    session.run_with_iobinding(binding)
    (out,) = binding.get_outputs()
    size = int(np.prod(out.shape())) * np.dtype(NUMPY_DTYPE[spec.dtype]).itemsize
    held = (ctypes.c_char * size).from_address(out.data_ptr())
    return np.frombuffer(bytes(held), NUMPY_DTYPE[spec.dtype]).reshape(out.shape())


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
    for spec in losses(dtype):
        if spec.runtime_beta and dtype != "float64":
            continue
        arguments = arrays(spec, 3, 100_003)  # several tasks a row, and threads
        found = set()
        for threads, number in itertools.product((1, 2, 5), sets):
            use(number)
            model = export(spec, shape=("N", "M"))
            found.add(bits(load(model, threads=threads).run(**arguments)["loss"]))
        assert len(found) == 1, spec


def test_any_split_into_batches_gives_the_bits_of_the_whole() -> None:
    for spec in (LossSpec(reduction="none"), LossSpec(per_sample=True, weight="weights")):
        runner = load(export(spec, shape=("N", 7)))
        arguments = arrays(spec, 1000, 7)
        whole = runner.run(**arguments)["loss"]
        for size in (1, 3, 997):
            parts = [
                runner.run(**{n: a[i : i + size] for n, a in arguments.items()})["loss"]
                for i in range(0, 1000, size)
            ]
            assert bits(np.concatenate(parts)) == bits(whole)


@pytest.mark.parametrize(
    "shapes",
    [
        [(), ()],
        [(3,), ()],
        [(5, 1), (1, 7)],
        [(2, 3, 1, 5), (4, 1)],
        [(40, 1, 900), (30, 1)],
        [(1, 1, 1), (1,)],
        [(0, 3), (1, 3)],
        [(3, 0), (3, 0)],
        [(1, 2) * 12, (2, 1) * 12],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_broadcast(dtype: str, shapes: list[tuple[int, ...]]) -> None:
    """Against the file's own body; sums in another order, so to an ULP."""
    for spec in losses(dtype):
        if spec.runtime_beta or (spec.per_sample and not any(shapes)):
            continue
        given = [*shapes, shapes[0][1:]][: 2 + bool(spec.weight)]
        names = ("input", "target", "weight")
        drawn = (arrays(spec, *shape, seed=seed)["input"] for seed, shape in enumerate(given))
        arguments = dict(zip(names, drawn, strict=False))
        model = export(spec, shape=None)
        with np.errstate(all="ignore"):
            ours = load(model).run(**arguments)["loss"]
            body = load(model, "ort-cpu-bare").run(**arguments)["loss"]
        assert ours.shape == body.shape, spec
        finite = np.isfinite(body)
        assert np.array_equal(ours[~finite], body[~finite], equal_nan=True), spec
        assert ulp_distance(ours[finite], body[finite]).max(initial=0) <= 2, spec


@pytest.mark.parametrize("beta", [-1.0, np.nan])
def test_what_is_no_beta_gives_nan_even_of_nothing(beta: float) -> None:
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        spec = LossSpec(reduction=reduction, dtype=dtype, runtime_beta=True)
        runner = load(export(spec, shape=("N", 4)))
        for rows in (0, 2):
            found = runner.run(**arrays(spec, rows, 4) | {"beta": beta})["loss"]
            assert np.isnan(found).all()


def test_what_follows_the_node_knows_its_shape() -> None:
    """Without a kernel's own word, ONNX Runtime knows nothing of what an operator gives."""
    text = """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 16] x) => (float[N, 16] y) { y = Relu(x) }"""
    for spec, shape in (
        (LossSpec(reduction="none"), ["N", 16]),
        (LossSpec(per_sample=True), ["N"]),
    ):
        model = attach(parser.parse_model(text), "y", "t", spec)
        model.graph.node.append(helper.make_node("Identity", ["loss"], ["after"]))
        del model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info("after", TensorProto.FLOAT, None))
        options = ort.SessionOptions()
        register(options)
        session = ort.InferenceSession(model.SerializeToString(), options)
        assert session.get_outputs()[0].shape == shape


def test_files_of_the_domain_s_first_version_load_and_gain() -> None:
    """Two nodes, as they were written until the domain's version 2."""
    spec = LossSpec(0.5)
    model = export(replace(spec, gradient=True), shape=("N", 4))  # still many nodes
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


def test_registered_twice_is_one_sentence() -> None:
    options = ort.SessionOptions()
    register(options)
    with pytest.raises(UnsupportedError, match="are registered with these SessionOptions already"):
        register(options)
    register(ort.SessionOptions())


def test_without_the_library_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("smoothl1_deploy.ops._LIBRARY", tmp_path / "none.so")
    with pytest.raises(BackendUnavailableError, match="install a C compiler"):
        register(ort.SessionOptions())


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc has the sanitizers")
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    built = tmp_path / "sanitized.so"
    flags = ["-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-ffp-contract=off"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = FOLDER / "operators.c", FOLDER / "smooth_l1.c"
    subprocess.run(["gcc", *flags, "-o", built, *sources], check=True)
    asan = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    environment = os.environ | {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("sanitized.py"), built],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr[-3000:]
