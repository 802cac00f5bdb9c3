"""`verify`: green on what we export, red on what drifts, clear about what it can't judge."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx
import pytest
import torch

from smoothl1_deploy import LossSpec, export, verify
from smoothl1_deploy.errors import ArtefactError
from smoothl1_deploy.parity.verify import verify_table


@pytest.mark.parametrize("shape", [None, ("N", 16), ("N", "M"), (), (4,), (0, 3)])
@pytest.mark.parametrize("route", ["function", "inlined"])
def test_our_artefacts_are_green(shape: tuple[int | str, ...] | None, route: str) -> None:
    result = verify(export(LossSpec(0.5), route, shape))
    assert result, result.failures
    assert result.spec == LossSpec(0.5)
    layouts = {case.case.layout for case in result.results}
    if shape == ("N", 16):
        assert layouts == {"64,16", "N=0", "N=65536"}
    assert verify_table(result).row_count == len(result.results)
    assert result.to_dict()["ok"] is True


def test_a_spec_that_is_not_the_model_s_is_red() -> None:
    result = verify(export(LossSpec(0.5)), spec=LossSpec(0.6))
    assert not result
    assert any("ULP >" in failure.verdict.detail for failure in result.failures)


def test_a_path_will_do(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "loss.onnx"
    onnx.save(export(LossSpec(2.0, "sum", "float16"), shape=("N", 8)), path)
    assert verify(path)


@pytest.fixture(scope="module")
def plain_export() -> onnx.ModelProto:
    """What torch.onnx.export makes of the loss without this package."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            torch.nn.SmoothL1Loss().eval(),
            (torch.zeros(3, 16), torch.zeros(3, 16)),
            dynamic_shapes=({0: torch.export.Dim("N")},) * 2,
            dynamo=True,
            verbose=False,
        )
    logging.disable(logging.NOTSET)
    assert program is not None
    return program.model_proto


def test_the_plain_exporter_s_drift_and_its_empty_mean_are_found(
    plain_export: onnx.ModelProto,
) -> None:
    result = verify(plain_export, spec=LossSpec())
    failed = {(f.case.family, f.case.layout.split("=")[-1]) for f in result.failures}
    assert ("constant", "65536") in failed  # the sum of 2^20 equal float32 drifts
    assert ("normal", "0") in failed  # 0.0 where PyTorch has NaN


def test_a_model_of_other_origin_needs_a_spec(plain_export: onnx.ModelProto) -> None:
    with pytest.raises(
        ArtefactError, match=r"does not say what it computes.*--beta and --reduction"
    ):
        verify(plain_export)


def test_a_spec_of_another_dtype_is_refused() -> None:
    with pytest.raises(ArtefactError, match="takes float32, the spec says float64"):
        verify(export(LossSpec()), spec=LossSpec(dtype="float64"))


def test_the_seed_decides_the_inputs() -> None:
    model = export(LossSpec(0.3, "none"), shape=("N",))
    one, two = verify(model, seed=1), verify(model, seed=2)
    assert one and two
    assert np.any([a.shares != b.shares for a, b in zip(one.results, two.results, strict=True)])
