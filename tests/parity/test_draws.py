"""Random draws: one number decides all of one, together they reach what broke, and a red one is
repeated by the command that it prints."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from planted import planted

from smoothl1_deploy import LossSpec
from smoothl1_deploy._floats import Array
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy.backends._ort_cpu import OrtCpuBackend
from smoothl1_deploy.cli import main
from smoothl1_deploy.parity._cases import Case, References, check
from smoothl1_deploy.parity._draws import Draw
from smoothl1_deploy.parity._families import ADVERSARIAL, FAMILIES, WEIGHTS
from smoothl1_deploy.parity._matrix import DRAWS, Matrix, run_matrix
from smoothl1_deploy.parity._report import Report, repeat_command
from smoothl1_deploy.parity.views import _html as html
from smoothl1_deploy.parity.views import _junit as junit
from smoothl1_deploy.parity.views import _markdown as markdown
from smoothl1_deploy.parity.views import _tables as tables

ALL = [Draw.of(number) for number in range(DRAWS)]  # of the whole matrix, with seed 0


def test_a_number_decides_the_spec_the_shapes_and_the_data() -> None:
    for drawn in ALL[:40]:
        again = Draw.of(drawn.number)
        assert repr(again) == repr(drawn)  # a beta may be NaN, which equals nothing
        for case in drawn.cases:
            one, two = drawn.references(case), again.references(case)
            assert one.input.tobytes() == two.input.tobytes()
            assert one.oracle["loss"].tobytes() == two.oracle["loss"].tobytes()
    assert len({repr(drawn.spec) for drawn in ALL}) > 0.8 * DRAWS


def test_seeds_have_no_draw_in_common() -> None:
    tasks = [task for seed in (0, 1, 2) for task in Matrix((), seed=seed, draws=DRAWS).tasks()]
    numbers = [number for task in tasks for number in getattr(task, "numbers", ())]
    assert len(numbers) == len({*numbers}) == 3 * DRAWS


def met(condition: Callable[[Draw, Case], bool]) -> bool:
    """Whether a case of some draw is so."""
    return any(condition(drawn, case) for drawn in ALL for case in drawn.cases)


def test_every_kind_of_data_is_drawn() -> None:
    assert {case.family for drawn in ALL for case in drawn.cases} == {*FAMILIES, *ADVERSARIAL}
    assert {case.weighting for drawn in ALL for case in drawn.cases} == {*WEIGHTS}
    for family in ("repeated", "magnitudes", "brink"):  # many patterns on large arrays
        assert met(lambda d, c: c.family == family and math.prod(c.shape(d.spec)) > 4096)  # noqa: B023


def test_each_dtype_meets_gradients_that_are_summed_back_and_subnormal_betas() -> None:
    def summed_back(d: Draw, c: Case) -> bool:
        return d.spec.gradient and c.input_shape != c.shape(d.spec)

    def odd(d: Draw, c: Case) -> bool:  # float64 holds every one of float32's, and half of it
        return 0 < d.beta < 1e-37 and d.beta / 2.0**-149 % 2 == 1

    for dtype, condition in product(DTYPES, (summed_back, odd)):
        assert met(lambda d, c: d.spec.dtype == dtype and condition(d, c)), dtype  # noqa: B023


def test_weights_of_every_shape_are_declared_and_fed() -> None:
    shapes = {
        "scalar": lambda own, whole: own == (),
        "one": lambda own, whole: own == (1,) and len(whole) > 1,
        "row": lambda own, whole: len(own) == 1 and len(whole) > 1 and own[0] == whole[-1] > 1,
        "column": lambda own, whole: own == (*whole[:-1], 1) and whole[0] > 1,
        "wider": lambda own, whole: len(own) > 1 and own[0] == "copies",
    }
    for name in ("scalar", "one", "row", "column"):
        assert met(
            lambda d, c: d.spec.weight is not None and shapes[name](c.weight_shape, c.shape(d.spec))  # noqa: B023
        ), name
    declared = [drawn.declared[2] for drawn in ALL if drawn.spec.weight and drawn.declared]
    assert any(shapes["wider"](own, ()) for own in declared)


def test_artefacts_of_every_kind_are_exported() -> None:
    by_torch = [drawn for drawn in ALL if drawn.route == "torch"]
    assert len({drawn.axes for drawn in by_torch}) > 5  # not (N, 16) alone
    assert all(drawn.spec.is_of_torch for drawn in by_torch)
    assert any(drawn.spec.loss == "huber" for drawn in by_torch)
    assert any(drawn.declared is None for drawn in ALL)  # any rank
    assert any(drawn.declared not in (None, drawn.axes) for drawn in ALL)  # broadcast at run time


def test_a_beta_of_0_is_fed_and_one_that_is_none_to_empty_batches_too() -> None:
    assert met(lambda d, c: d.spec.runtime_beta and d.beta == 0)
    none = [drawn for drawn in ALL if not drawn.beta >= 0]
    assert none and all(drawn.spec.runtime_beta for drawn in none)
    assert any(math.isnan(drawn.beta) for drawn in none)
    assert met(lambda d, c: not d.beta >= 0 and not math.prod(c.shape(d.spec)))
    spec = LossSpec(reduction="sum", runtime_beta=True)
    drawn = Draw(0, spec, math.nan, "function", (("N",), ("N",)), None, ())
    refs = drawn.references(Case("normal", "nothing", (0,), (0,)))
    assert np.isnan(refs.oracle["loss"]) and np.isnan(refs.torch["loss"])
    assert math.isnan(refs.beta)


def lose_nan(spec: LossSpec, input: Array, right: dict[str, Array]) -> dict[str, Array]:
    """So that draws with NaN, as a beta too, are red."""
    return {name: np.nan_to_num(array) for name, array in right.items()}


#: A draw whose beta is no number, and one with NaN in its data.
RED = [
    next(d.number for d in ALL if math.isnan(d.beta) and math.prod(d.cases[0].input_shape)),
    next(
        d.number
        for d in ALL
        if d.cases[0].family == "nan" and not d.spec.runtime_beta and d.route == "inlined"
    ),
]


@pytest.fixture(scope="module")
def red() -> Report:
    with planted(lose_nan):
        return run_matrix(Matrix(("ort-cpu",), draw=tuple(RED)))


def test_a_red_draw_is_a_red_cell_whose_command_repeats_it(
    red: Report, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not red and {cell.draw for cell in red.red} == {*RED} and not red.cells
    cell = red.red[0]
    command = repeat_command(cell, red.seed)
    assert command == f"smoothl1-deploy parity --draw {cell.draw} --backend ort-cpu --no-engines"
    words = [*shlex.split(command)[1:], "-o", str(tmp_path), "--workers", "1"]
    with planted(lose_nan):
        assert main(words) == 1
    assert f"repeat it: {command}" in capfd.readouterr().out
    (row,) = json.loads((tmp_path / "report.json").read_text())["draws"]
    assert row["red"] == [cell.to_dict()]


def test_every_view_shows_a_red_draw(red: Report, fits_schema: Callable[[Report], None]) -> None:
    report = red.to_dict()
    assert report["summary"]["draws"] == 2 and report["summary"]["red"] == 2
    fits_schema(red)  # strict: a beta of NaN is a word
    assert {cell["beta"] for row in report["draws"] for cell in row["red"]} >= {"nan"}
    assert len(tables.draws(red).rows) == len(red.draws)
    suites = ET.fromstring(junit.render(red))
    assert {suite.get("name") for suite in suites} >= {f"draws.ort-cpu.{red.draws[0].route}"}
    assert len(suites.findall(".//failure")) == 2
    for text in (markdown.render(red), html.render(red)):
        for number in RED:
            assert f"--draw {number} --backend ort-cpu" in text


def test_a_green_draw_takes_a_line_and_no_cell(
    fits_schema: Callable[[Report], None],
) -> None:
    report = run_matrix(Matrix(("ort-cpu",), draw=(0, 1)))
    assert report, report.red
    fits_schema(report)
    found = json.loads(report.to_json())
    assert found["cells"] == [] and not any(row["red"] for row in found["draws"])
    assert sum(row["draws"] for row in found["draws"]) == 2
    assert {row["nearest"]["draw"] for row in found["draws"]} <= {0, 1}
    assert "draw" in markdown.render(report) and 'failures="0"' in junit.render(report)


def test_weights_of_more_axes_than_the_losses_are_judged_per_sample() -> None:
    """PyTorch's NaN is looked up by sample: those of the whole, and not of the input."""
    spec = LossSpec(per_sample=True, weight="count", gradient=True)
    case = Case("nan", "wider", (5,), (5,), (3, 5))
    refs = References.of(spec, case)
    runner = OrtCpuBackend().load(Draw(0, spec, 1.0, "function", (), None, ()).model(True))
    assert refs.oracle["loss"].shape == (3,) and np.isnan(refs.torch["loss"]).any()
    assert check(runner, refs, "float64").verdict.ok
