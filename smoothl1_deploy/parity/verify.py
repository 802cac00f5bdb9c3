"""`verify`: one artefact, on one backend, against PyTorch and the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ..artefact import ModelSource, Signature, read_model, sha256
from ..backends.base import get_backend
from ..environment import environment
from ..errors import ArtefactError, SmoothL1DeployError, UnsupportedError
from ..graph.shapes import Shape
from ..spec import LossSpec
from .cases import LAYOUTS, Case, CaseResult, References, check
from .families import BRANCHES, FAMILIES

__all__ = ["Verification", "verify", "verify_table"]

_ROWS = 64  # size of a dynamic axis for the families
_LARGE = 1 << 20  # elements of the largest case


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. True where every case is green."""

    name: str
    sha256: str
    spec: LossSpec
    backend: str
    results: tuple[CaseResult, ...]
    environment: Mapping[str, Any]

    def __bool__(self) -> bool:
        return all(result.verdict.ok for result in self.results)

    @property
    def failures(self) -> tuple[CaseResult, ...]:
        """The red cases."""
        return tuple(result for result in self.results if not result.verdict.ok)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "ok": bool(self),
            "name": self.name,
            "sha256": self.sha256,
            "spec": self.spec.to_dict(),
            "backend": self.backend,
            "cases": [result.to_dict() for result in self.results],
            "environment": dict(self.environment),
        }


def _instantiate(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)


def _cases(signature: Signature, seed: int) -> Iterator[Case]:
    """Every family once, then nothing and a million elements where the shapes allow it."""
    a, b = signature.input.shape, signature.target.shape
    if a is None or b is None:
        for name in LAYOUTS:
            if name == "matrix":
                yield from (Case.of(family, name, seed) for family in FAMILIES)
            elif name != "2^24":
                yield Case.of("normal", name, seed)
        yield Case.of("constant", "2^20", seed)
        return
    names = [dim for dim in dict.fromkeys((*a, *b)) if isinstance(dim, str)]

    def case(family: str, layout: str, sizes: Mapping[str, int]) -> Case:
        return Case(family, layout, _instantiate(a, sizes), _instantiate(b, sizes), seed)

    usual = dict.fromkeys(names, _ROWS)
    shape = ",".join(map(str, _instantiate(a, usual))) or "scalar"
    yield from (case(family, shape, usual) for family in FAMILIES)
    if names:
        others = math.prod(_instantiate(a, {**usual, names[0]: 1}))
        large = {**usual, names[0]: max(_ROWS, _LARGE // max(others, 1))}
        yield case("normal", f"{names[0]}=0", {**usual, names[0]: 0})
        yield case("normal", f"{names[0]}={large[names[0]]}", large)
        yield case("constant", f"{names[0]}={large[names[0]]}", large)


def verify(
    model: ModelSource, backend: str = "ort-cpu", *, spec: LossSpec | None = None, seed: int = 0
) -> Verification:
    """Hold one artefact against PyTorch and the oracle, on every input family.

    Args:
        model: an `onnx.ModelProto`, its bytes, or a path.
        backend: what runs it.
        spec: what it ought to compute; by default what its metadata say.
        seed: of the inputs.

    Returns:
        A `Verification`: true where every case is green; `to_dict()` for JSON.

    Raises:
        ArtefactError: when the model carries no spec and none is given.
        UnsupportedError: when the backend can't carry out the spec faithfully.
        MissingDependencyError: when torch or the backend is not installed.
    """
    proto = read_model(model)
    chosen = get_backend(backend)
    runner = chosen.load(proto)
    expected = spec if spec is not None else runner.spec
    if expected is None:
        raise ArtefactError(
            "the model does not say what it computes (it was not exported by smoothl1-deploy); "
            "say it with spec=LossSpec(...), on the command line --beta and --reduction"
        )
    if runner.signature.input.dtype != expected.dtype:
        raise ArtefactError(
            f"the model takes {runner.signature.input.dtype}, the spec says {expected.dtype}"
        )
    reason = chosen.refuses(expected)
    if reason:
        raise UnsupportedError(reason)
    results = []
    for case in _cases(runner.signature, seed):
        refs = References.of(expected, case)
        try:
            results.append(check(runner, case, refs))
        except SmoothL1DeployError as exc:  # an answer that doesn't come is a wrong answer
            results.append(CaseResult.failed(case, refs, f"{type(exc).__name__}: {exc}"))
    digest = sha256(proto.SerializeToString(deterministic=True))
    return Verification(proto.graph.name, digest, expected, backend, tuple(results), environment())


def verify_table(verification: Verification) -> Table:
    """One row a case: distance to the oracle, PyTorch's own, what is allowed, branches reached."""
    table = Table(title=f"{verification.name} on {verification.backend}", title_justify="left")
    for column in ("family", "shape"):
        table.add_column(column)
    for column in ("ULP", "PyTorch's", "allowed", *BRANCHES):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for result in verification.results:
        verdict = result.verdict
        word = Text("better than PyTorch" if verdict.better else "equal", style="green")
        if not verdict.ok:
            word = Text(verdict.detail, style="bold red")
        shares = (f"{result.shares[key]:.0%}" for key in BRANCHES)
        numbers = (str(n) for n in (verdict.ulp, verdict.torch_ulp, verdict.allowed))
        table.add_row(result.case.family, result.case.layout, *numbers, *shares, word)
    return table
