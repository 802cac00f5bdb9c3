"""An `ort-cpu` with a fault put into its answers: a parity that can't turn red proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import pytest

import smoothl1_deploy.backends._ort_cpu as ort_cpu
from smoothl1_deploy._floats import Array
from smoothl1_deploy._spec import LossSpec
from smoothl1_deploy.backends._ort_cpu import OrtCpuBackend
from smoothl1_deploy.backends._runner import Runner

#: Makes wrong answers of the spec, the input and the right answers, or raises.
Fault = Callable[[LossSpec, Array, dict[str, Array]], dict[str, Array]]


def plant(runner: Runner, fault: Fault) -> None:
    """Put a fault into the answers of one runner."""
    honest, spec = runner.run, runner.spec
    assert spec is not None

    def faulty(input: Array, target: Array, **given: Any) -> dict[str, Array]:
        return fault(spec, input, honest(input, target, **given))

    runner.run = faulty  # type: ignore[method-assign]


@contextmanager
def planted(
    fault: Fault, refusal: Callable[[LossSpec], str | None] = lambda spec: None
) -> Iterator[None]:
    """Every `ort-cpu` that is loaded meanwhile has the fault, and refuses what `refusal` says."""

    class Planted(OrtCpuBackend):
        def refuses(self, spec: LossSpec) -> str | None:
            return refusal(spec) or super().refuses(spec)

        def load(self, model: onnx.ModelProto) -> Runner:
            runner = super().load(model)
            plant(runner, fault)
            return runner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_cpu, "OrtCpuBackend", Planted)
        yield
