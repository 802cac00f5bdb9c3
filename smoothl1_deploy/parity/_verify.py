"""`verify`: one artefact, anyone's, on one backend, against PyTorch and the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from html import escape
from typing import TYPE_CHECKING, Any

from .._artefact import ModelSource, Signature, check_spec, read_model, select_ports, sha256
from .._environment import environment, now
from .._model import read_attached
from .._records import plain
from .._spec import LossSpec
from ..backends._base import get_backend
from ..errors import ArtefactError, SpecError, UnsupportedError, require
from ..graph._metadata import is_changed, warn_if_changed
from ._cases import LAYOUTS, Case, CaseResult, References, check, is_for, needs_wider, with_beta
from ._diagnose import diagnose
from ._drift import DriftPoint, artefact_drift
from ._families import FAMILIES
from ._faults import Diagnosis
from ._shapes import ShapePlan, elements

if TYPE_CHECKING:
    from ._whole import ModelVerification, Run

_MOST = 1 << 27  # elements of fixed shapes: some GB of references in float64
_LARGE = 1 << 20  # elements of the largest case of a loss that isn't reduced


def _shown(found: Verification | ModelVerification) -> str:
    """What a notebook shows: the verdict in a line, and every table."""
    from .views._tables import verified

    return "".join([f"<p>{escape(repr(found))}</p>", *(table.html() for table in verified(found))])


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. True where every case is green.

    Attributes:
        name: of the graph.
        sha256: of the model as it was read.
        spec: what it was held against.
        backend: what ran it.
        results: one a case.
        environment: versions and hardware.
        seed: of the inputs.
        drift: the error of what adds up, by size; empty where nothing does, and for fixed shapes.
        diagnoses: what is wrong, the likeliest first; empty where every case is green.
        changed: whether something else has changed the model since it was exported.
        date: when it was found, ISO 8601, UTC.

    >>> from smoothl1_deploy import LossSpec, export, verify
    >>> found = verify(export(LossSpec(), shape=("N", 16)), drift=False)
    >>> bool(found), found.failures, found.to_dict()["backend"]
    (True, (), 'ort-cpu')
    """

    name: str
    sha256: str
    spec: LossSpec
    backend: str
    results: tuple[CaseResult, ...]
    environment: Mapping[str, Any]
    seed: int = 0
    drift: tuple[DriftPoint, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    changed: bool = False
    date: str = field(default_factory=now, compare=False)

    def __bool__(self) -> bool:
        return not self.failures

    def __repr__(self) -> str:
        cases = len(self.every_result)
        green = f"{cases - len(self.failures)} of {cases} cases green"
        return f"<Verification of {self.name} on {self.backend}: {green}>"

    _repr_html_ = _shown

    @property
    def losses(self) -> Mapping[str, Verification]:
        """Itself, as a `ModelVerification` has those of its losses."""
        return {"loss": self}

    @property
    def runs(self) -> tuple[Run, ...]:
        """None: there is no more than the loss."""
        return ()

    @property
    def every_result(self) -> tuple[CaseResult, ...]:
        """Every case, those of the drift among them."""
        return (*self.results, *(point.result for point in self.drift))

    @property
    def failures(self) -> tuple[CaseResult, ...]:
        """The red cases, those of the drift among them."""
        return tuple(result for result in self.every_result if not result.verdict.ok)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        found = {each.name: plain(getattr(self, each.name)) for each in fields(self)}
        found["cases"] = found.pop("results")
        return {"ok": bool(self), **found}


def _cases(signature: Signature, spec: LossSpec, seed: int) -> Iterator[Case]:
    """Every family once, then nothing at all; a million elements where the drift has none."""
    is_any = signature.input.shape is None or signature.target.shape is None
    if is_any and not spec.beta_shape:
        for name in LAYOUTS:
            if name == "matrix":
                yield from (Case.of(family, name, seed) for family in FAMILIES)
            elif "^" not in name and is_for(spec, name):
                yield Case.of("normal", name, seed)
        if spec.reduction == "none":
            yield Case.of("normal", "2^20", seed)
        return
    plan = ShapePlan.of(signature, spec.beta_shape)
    usual = plan.usual()
    if elements(usual) > _MOST:
        raise ArtefactError(
            f"the model's fixed shapes have {elements(usual):,} elements, and verify compares "
            f"{_MOST:,} at most; export it with a name for an axis, which makes it dynamic"
        )
    layout, shapes = ",".join(map(str, usual[0])) or "scalar", plan.by_role(usual)
    yield from (Case.at(family, layout, shapes, seed) for family in FAMILIES)
    if plan.growing is not None:
        yield Case.at("normal", f"{plan.growing}=0", plan.by_role(plan.empty()), seed)
        if spec.reduction == "none":
            large = plan.of_size(_LARGE)
            yield Case.at("normal", ",".join(map(str, large[0])), plan.by_role(large), seed)


def verify(
    model: ModelSource,
    backend: str = "ort-cpu",
    *,
    spec: LossSpec | None = None,
    seed: int = 0,
    input_name: str | None = None,
    target_name: str | None = None,
    output_name: str | None = None,
    drift: bool = True,
    large: bool = False,
    against: ModelSource | None = None,
    data: Mapping[str, Any] | None = None,
) -> Verification | ModelVerification:
    """Hold one artefact against PyTorch and the oracle, and say what is wrong where it is red.

    One that something else has changed since it was exported is held against the spec in its
    metadata as well, with a `ModelWarning`. Cases that only a wider format can get right
    (`_cases.needs_wider`) are spared, as the matrix spares them.

    Args:
        model: an `onnx.ModelProto`, its bytes, or a path; of this tool's making or anyone's.
        backend: what runs it. `ort-cpu` runs a file of the route `function` twice, by our
            operators and by its own body, and the worse of two answers counts.
        spec: what it ought to compute; by default what its metadata say.
        seed: of the inputs.
        input_name: of the graph input, where it is not clear which of several it is.
        target_name: likewise.
        output_name: of the loss, where there are several outputs and none is called `loss`.
        drift: measure the error of what adds up, losses and gradients, at 2^10 to 2^22 elements.
        large: at 2^24 as well: up to 1.6 GB of memory, 2.7 GB for float64 with weights; with a
            gradient 2.6 and 4.7 GB.
        against: of a model with losses attached, the model that it was before: what both give must
            be equal in every bit.
        data: of such a model, an array for each input by its name; by default some are made up.

    Returns:
        A `Verification`, or, of a model with losses attached where neither a spec nor names are
        given, a `ModelVerification`: each loss by itself, and the whole model. Either is true
        where all is green, and has `to_dict()` for JSON.

    Raises:
        ArtefactError: when the model carries no spec and none is given; when it can't be told
            which of its inputs and outputs to compare.
        SpecError: for `against` or `data` of a model that nothing was attached to.
        UnsupportedError: when the backend can't carry out the spec faithfully.
        MissingDependencyError: when torch or the backend is not installed.

    >>> from smoothl1_deploy import LossSpec, export, verify
    >>> report = verify(export(LossSpec(beta=0.5), shape=("N", 16)), backend="ort-cpu", drift=False)
    >>> bool(report), report.failures
    (True, ())
    """
    read = read_model(model)
    options: dict[str, Any] = {"seed": seed, "drift": drift, "large": large}
    names: dict[str, Any] = {"input_name": input_name, "target_name": target_name}
    names["output_name"] = output_name
    if read_attached(read) and all(value is None for value in (spec, *names.values())):
        from ._whole import verify_model

        return verify_model(read, backend, against=against, data=data, **options)
    if against is not None or data is not None:
        raise SpecError(
            "against and data are for a model that a loss was attached to, and this is a loss of "
            "its own; leave them out"
        )
    return verify_loss(read, backend, spec=spec, **names, **options)


def verify_loss(
    model: ModelSource,
    backend: str = "ort-cpu",
    *,
    spec: LossSpec | None = None,
    seed: int = 0,
    drift: bool = True,
    large: bool = False,
    **names: str | None,
) -> Verification:
    """Hold one loss against PyTorch and the oracle; see `verify`."""
    original = read_model(model)
    warn_if_changed(original)
    require("torch", "torch", "verify, which compares with PyTorch,")
    chosen = get_backend(backend)
    ports = select_ports(original, **names)
    runner = chosen.load(ports)
    expected = spec if spec is not None else runner.spec
    if expected is None:
        raise ArtefactError(
            "the model does not say what it computes (it was not exported by smoothl1-deploy); "
            "say it by a spec: beta, reduction, and whatever else it computes"
        )
    check_spec(runner.signature, expected)
    if reason := chosen.refuses(expected):
        raise UnsupportedError(reason)
    # A bound is proved for our own graphs alone.
    accumulator = chosen.accumulator if runner.exported else None
    # A kernel of ours says nothing about the body that the file carries for everyone else.
    body = chosen.load_body(ports)
    others = [] if body is None else [body]
    fed = with_beta(expected, expected.knee)
    results = tuple(
        check(runner, References.of(fed, case), accumulator, others)
        for case in _cases(runner.signature, fed, seed)
        if not needs_wider(fed, case, chosen.accumulator != "float32")
    )
    points: tuple[DriftPoint, ...] = ()
    if drift:
        points = artefact_drift(
            runner, fed, seed=seed, large=large, accumulator=accumulator, others=others
        )
    digest = sha256(original.SerializeToString(deterministic=True))
    what = original.graph.name, digest, expected, backend
    found = Verification(*what, results, environment(), seed, points, changed=is_changed(original))
    if found:
        return found
    named = diagnose(body or runner, fed, failures=found.failures, drift=points)
    return replace(found, diagnoses=named)
