"""The operators for CUDA where there is no card: their kernels on the CPU, and the library itself.

`host/cuda_runtime.h` stands in for CUDA: what runs are the kernels of the file, barriers included.
What a card makes of them is not shown here.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from handmade import assert_near, model_of, run_session
from host_device import HostCuda, operators_on_host
from onnx import helper

from smoothl1_deploy import LossSpec, export, load, ops
from smoothl1_deploy._floats import NUMPY_DTYPE, ulp_distance
from smoothl1_deploy._spec import DTYPES, NORMALIZERS, REDUCTIONS
from smoothl1_deploy.errors import BackendUnavailableError, SpecError, UnsupportedError
from smoothl1_deploy.reference._oracle import oracle

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "smoothl1_deploy" / "ops" / "c"
CAPABILITIES = ["75", "80", "86", "89", "90", "100", "120"]

Run = Callable[..., np.ndarray[Any, Any]]
Runs = Callable[[LossSpec], Run]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with its kernels compiled for the CPU, under the name of that for CUDA."""
    return operators_on_host(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def runner(on_host: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Of a spec, what runs its file in a session of the CPU by the kernels for CUDA."""

    def of(spec: LossSpec) -> Run:
        monkeypatch.setattr(ops, "_LIBRARY", on_host)
        held = load(export(spec, shape=None), "ort-cpu")
        monkeypatch.undo()
        return lambda **given: held.run(**given)["loss"]

    return of


def losses() -> Iterator[LossSpec]:
    """Every loss that is one node, once."""
    weights = None, *NORMALIZERS
    for reduction, by_row, weight, dtype in itertools.product(
        REDUCTIONS, (False, True), weights, DTYPES
    ):
        if not (dtype == "float64" and weight == "weights"):  # which its body computes
            with suppress(SpecError):
                yield LossSpec(0.5, reduction, dtype, per_sample=by_row, weight=weight)


def drawn(
    spec: LossSpec, shape: tuple[int, ...], scale: float = 1.0, weight_scale: float = 1.0
) -> dict[str, Any]:
    """Arrays of few bits, whose differences are exact."""
    random = np.random.default_rng(5)
    names = [name for name in spec.inputs if name != "beta"]
    dtype = NUMPY_DTYPE[spec.dtype]
    found = {n: (random.integers(-64, 65, shape) / 32 * scale).astype(dtype) for n in names}
    if "weight" in found:
        found["weight"] = np.abs(found["weight"] / dtype.type(scale)) * dtype.type(weight_scale)
    return found


@pytest.mark.parametrize("beta", [0.0, 2.0**-40, 0.7, 1e30, 3e38, np.inf])
def test_its_sums_are_the_exact_ones_rounded_once(runner: Runs, beta: float) -> None:
    """Also where no float32 holds beta times a loss, its product with a weight, or their sums."""
    beyond = ((-70, 0), (125, 0), (0, -140), (0, 126), (125, -110), (-70, 70))
    for spec in losses():
        if spec.reduction == "none" or (spec.dtype == "float16" and 1e4 < beta < np.inf):
            continue
        known = replace(spec, beta=beta)
        run = runner(known)
        shapes = ((5, 3), (40, 33), (2, 9001)) if spec.per_sample else ((1,), (77,), (3, 9001))
        tried = [(shape, (0, 0)) for shape in shapes]
        tried += [(shapes[1], exponents) for exponents in beyond if spec.dtype == "float32"]
        for shape, exponents in tried:
            given = drawn(known, shape, *(2.0**exponent for exponent in exponents))
            with np.errstate(all="ignore"):
                found, exact = run(**given), oracle(known, **given)
            apart = ulp_distance(found, exact).max()
            assert apart <= (1 if spec.dtype == "float64" else 0), (known, exponents, shape)


def test_its_elements_have_the_bits_of_the_body(runner: Runs) -> None:
    ends = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-310, 6e4, 3e38, 1e300]
    grid = {"input": ends * 10, "target": np.repeat(ends, 10), "weight": ends * 10}
    normal = np.random.default_rng(7).standard_normal((3, 5000))
    for spec in (spec for spec in losses() if spec.reduction == "none"):
        with np.errstate(all="ignore"):
            given = {
                name: np.concatenate([grid[name], row]).astype(NUMPY_DTYPE[spec.dtype])
                for name, row in zip(grid, normal, strict=True)
                if name in spec.inputs
            }
            for beta in (0.0, 0.3, 1e30, np.inf):
                known = replace(spec, beta=beta)
                body = load(export(known, shape=None), "ort-cpu-bare").run(**given)["loss"]
                found = runner(known)(**given)
                same = (found == body) & (np.signbit(found) == np.signbit(body))
                assert (same | (np.isnan(found) & np.isnan(body))).all(), known


BROADCASTS = [
    [(), (), ()], [(3,), (), (1,)], [(5, 1), (1, 7), (7,)], [(2, 3, 1, 5), (4, 1), (3, 4, 5)],
    [(2, 9001), (1, 9001), (2, 1)], [(700, 1, 3), (2, 1), ()], [(0, 3), (1, 3), ()],
    [(3, 0), (3, 0), (3, 1)],
]  # fmt: skip


def test_a_broadcast_has_the_bits_of_the_arrays_written_out(runner: Runs) -> None:
    random = np.random.default_rng(3)
    for spec in losses():
        run, bare = runner(spec), load(export(spec), "ort-cpu-bare")
        for shapes in BROADCASTS:
            if spec.per_sample and not any(shapes):
                continue
            names = [name for name in spec.inputs if name != "beta"]
            given = {n: random.random(s).astype(NUMPY_DTYPE[spec.dtype])
                     for n, s in zip(names, shapes, strict=False)}  # fmt: skip
            whole = dict(zip(given, np.broadcast_arrays(*given.values()), strict=True))
            with np.errstate(all="ignore"):
                found, written_out = run(**given), run(**{n: x.copy() for n, x in whole.items()})
                body = bare.run(**given)["loss"]
            assert (found.tobytes(), found.shape) == (written_out.tobytes(), written_out.shape)
            assert_near(found, body, 2, spec)


def test_a_beta_at_run_time_is_read_where_it_lies(runner: Runs) -> None:
    for spec in losses():
        run = runner(replace(spec, beta=1.0, runtime_beta=True))
        betas = (-1.0, np.nan, 0.0, 1e-45, 0.5, 1e-310, np.inf)
        for rows, beta in itertools.product((0, 40), betas):
            given = drawn(spec, (rows, 4))
            with np.errstate(all="ignore"):
                found = run(**given, beta=beta)
            if not beta >= 0:
                assert np.isnan(found).all(), spec
                continue
            exact = oracle(replace(spec, beta=float(np.float32(beta))), **given)
            assert np.array_equal(np.isnan(found), np.isnan(exact)), (spec, rows)
            apart = ulp_distance(found, exact)[~np.isnan(exact)].max(initial=0)
            assert apart <= (1 + (spec.reduction == "none")), (spec, rows)


def test_files_of_the_domain_s_first_version_gain(on_host: Path) -> None:
    random = np.random.default_rng(1)
    for name, dtype in itertools.product(("WideSum", "WideMean"), DTYPES):
        values = random.standard_normal(20_011).astype(NUMPY_DTYPE[dtype])
        text = f"g (float[N] x) => (double y) {{ y = smoothl1_deploy.{name}(x) }}"
        model = model_of(text, ir=10, imports=', "smoothl1_deploy" : 1')
        element = helper.np_dtype_to_tensor_dtype(values.dtype)
        model.graph.input[0].type.tensor_type.elem_type = element
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(on_host))
        session = ort.InferenceSession(model.SerializeToString(), options)
        found = run_session(session, {"x": values})["y"]
        exact = values.astype(np.longdouble).sum() / (1 if name == "WideSum" else values.size)
        assert found.dtype == np.float64 and abs(found - exact) <= 1e-13 * abs(exact), dtype


def test_ort_cuda_runs_the_kernels_of_what_has_one_and_the_body_of_the_rest(
    on_host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_LIBRARY", on_host.with_name("libsmoothl1_deploy.so"))
    ops.operators.cache_clear()
    backend = HostCuda()
    ops.operators.cache_clear()
    for spec, claims in (
        (LossSpec(0.5), True),
        (LossSpec(runtime_beta=True, dtype="bfloat16", per_sample=True), True),
        (LossSpec(1e-40), False),  # a beta that is subnormal in float32
    ):
        model = export(spec, shape=("N", 4))
        given = drawn(spec, (6, 4)) | ({"beta": 0.5} if spec.runtime_beta else {})
        fused, bare = backend.load(model), backend.load_body(model)
        assert bare is not None
        for each, expected in ((fused, claims), (bare, False)):
            parts = each._session.get_provider_graph_assignment_info()
            nodes = [node.op_type for part in parts for node in part.get_nodes()]
            assert (nodes == [model.graph.node[0].op_type]) == expected, (spec, nodes)
        assert ulp_distance(fused.run(**given)["loss"], bare.run(**given)["loss"]).max() <= 1
    assert backend.load_body(export(LossSpec(0.5), "inlined", ("N", 4))) is None


def test_without_the_library_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ops, "_LIBRARY", tmp_path / "libsmoothl1_deploy.so")
    with pytest.raises(BackendUnavailableError, match="for CUDA were not built .* install nvcc"):
        ops.register(ort.SessionOptions(), "cuda")
    with pytest.raises(UnsupportedError, match="for the provider 'rocm'; choose 'cpu' or 'cuda'"):
        ops.library("rocm")


# The library itself, where nvcc is


@pytest.fixture(scope="module")
def built() -> Path:
    """As an installation builds it; kept in build/, and built again when a source has changed."""
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("needs nvcc")
    pytest.importorskip("setuptools", minversion="77")
    folder = ROOT / "build" / "tests"
    places = ["--build-lib", folder, "--build-temp", folder / "objects"]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", *places], cwd=ROOT, check=True
    )
    return folder / FOLDER.relative_to(ROOT) / "libsmoothl1_deploy_cuda.so"


def test_it_has_code_for_every_card_and_fuses_no_product_of_an_element(built: Path) -> None:
    triton = find_spec("triton")
    found = shutil.which("cuobjdump")
    if triton and triton.submodule_search_locations and not found:
        found = f"{triton.submodule_search_locations[0]}/backends/nvidia/bin/cuobjdump"
    if not found or not Path(found).is_file():
        pytest.skip("needs cuobjdump, which CUDA and triton bring")
    elves = subprocess.check_output([found, "--list-elf", built], text=True)
    assert {*re.findall(r"\.sm_(\d+)\.", elves)} == {*CAPABILITIES}
    code = subprocess.check_output([found, "--dump-ptx", built], text=True)
    assert re.findall(r"\.target sm_(\d+)", code) == CAPABILITIES[-1:]
    kernels = re.split(r"\.entry ", code)[1:]
    fused = {kernel.split("(")[0]: len(re.findall(r"\bfma\.", kernel)) for kernel in kernels}
    assert len(fused) == 17
    for name, count in fused.items():  # two `fmaf` for each of 8 elements, of float32 sums alone
        assert count == (16 if "sums" in name and "ILi11E" not in name else 0), fused


def test_it_loads_where_there_is_no_card_and_says_so(built: Path) -> None:
    linked = subprocess.check_output(["readelf", "-d", built], text=True)
    assert "cuda" not in " ".join(re.findall(r"NEEDED.*\[(.*)\]", linked))
    program = "import sys, onnxruntime as ort\nort.SessionOptions().register_custom_ops_library"
    ran = subprocess.run(
        [sys.executable, "-c", f"{program}(sys.argv[1])", built],
        env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 1, ran
    assert re.search(r"smoothl1_deploy: CUDA says: .+; these operators need a GPU", ran.stderr)
