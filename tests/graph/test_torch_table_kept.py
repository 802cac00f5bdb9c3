"""The exporter's table of operators: made once, and every export gets its own."""

from __future__ import annotations

import pytest
import torch

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.graph.torch_route import _table, kept_registry

registration = pytest.importorskip("torch.onnx._internal.exporter._registration")


def _made() -> int:
    return _table.cache_info().misses


def test_the_table_is_made_once_for_many_exports() -> None:
    models = [export(LossSpec(0.3), "torch", ("N", 4)) for _ in range(2)]
    before = _made()
    models.append(export(LossSpec(0.3), "torch", ("N", 4)))
    assert _made() == before
    assert len({model.SerializeToString(deterministic=True) for model in models}) == 1


def test_it_is_the_exporter_s_own_table() -> None:
    own = registration.ONNXRegistry.from_torchlib(18)
    with kept_registry():
        kept = registration.ONNXRegistry.from_torchlib(opset_version=18)
    assert kept.functions.keys() == own.functions.keys()
    assert kept.opset_version == own.opset_version == 18


def test_what_one_export_adds_the_next_does_not_see() -> None:
    target = torch.ops.aten.abs.default

    def mine(x: object) -> object:
        return x

    with kept_registry():
        first = registration.ONNXRegistry.from_torchlib(opset_version=18)
        first.register_op(target, mine)
        second = registration.ONNXRegistry.from_torchlib(opset_version=18)
    functions = [[meta.onnx_function for meta in r.get_decomps(target)] for r in (first, second)]
    assert functions[0][0] is mine and mine not in functions[1]


def test_afterwards_pytorch_is_as_it_was() -> None:
    original = registration.ONNXRegistry.__dict__["from_torchlib"]
    with pytest.raises(ZeroDivisionError), kept_registry():
        assert registration.ONNXRegistry.__dict__["from_torchlib"] is not original
        raise ZeroDivisionError
    assert registration.ONNXRegistry.__dict__["from_torchlib"] is original
