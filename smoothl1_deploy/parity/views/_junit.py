"""The report as JUnit XML, for the test tab of a CI system.

A suite is one backend × route × dtype, a test case one cell; engines are suites of their own, and
so are random draws, of which a test case is one that is red, or all of them. A cell that isn't run,
or an engine that is refused, is skipped with its reason. Times are those of the whole run only: a
task of the matrix serves many cells at once.
Source of the structure: the JUnit schema of Apache Ant, as Jenkins and GitLab read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from ..._spec import LossSpec
from ..._table import clean
from .._families import usual_knee
from .._report import Build, Cell, Report, repeat_command
from ._tables import beta_text, finding, plural, variant

_TOTALS = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}


def _name(spec: LossSpec, beta: float | None) -> str:
    return f"beta={'runtime' if beta is None else beta_text(beta)} {variant(spec)}"


def _child(parent: ET.Element, tag: str, text: str = "", **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, tag, {key: clean(value) for key, value in attributes.items()})
    if text:
        child.text = clean(text)
    return child


def _cell(suite: ET.Element, cell: Cell, seed: int) -> None:
    classname = f"parity.{cell.backend}.{cell.route}.{cell.spec.dtype}"
    case = _child(suite, "testcase", name=_name(cell.spec, cell.beta), classname=classname)
    if cell.refused is not None:
        _child(case, "skipped", message=cell.refused)
    elif not cell.ok:
        lines = [
            f"{f.case.family} {f.case.layout} seed {f.case.seed}: {f.verdict.detail}"
            for f in cell.failures
        ]
        message = f"{plural(len(lines), 'red case')} of {cell.cases}; {lines[0]}"
        text = "\n".join([*lines, f"repeat: {repeat_command(cell, seed)}"])
        _child(case, "failure", text, message=message, type=finding(cell))
    else:
        measured = (
            f"{plural(cell.cases, 'case')}; at the worst {cell.ulp} ULP to the oracle, "
            f"PyTorch {cell.torch_ulp}, allowed {cell.allowed}, "
            f"proved bound {'none' if cell.bound is None else cell.bound}"
        )
        _child(case, "system-out", measured)


def _build(suite: ET.Element, build: Build) -> None:
    spec = build.spec
    name = _name(spec, None if spec.runtime_beta else usual_knee(spec))
    classname = f"engines.{build.flavour}.{build.route}.{spec.dtype}"
    time = f"{build.seconds:.3f}"
    case = _child(suite, "testcase", name=name, classname=classname, time=time)
    if build.refused is not None:
        _child(case, "skipped", message=build.refused)
    elif build.error is not None:
        _child(case, "failure", build.error, message=build.error.split("\n")[0], type="build")


def _properties(suite: ET.Element, report: Report) -> None:
    flat: dict[str, Any] = {"seed": report.seed}
    for key, value in report.environment.items():
        nested = value.items() if isinstance(value, Mapping) else ()
        flat |= {f"{key}.{name}": entry for name, entry in nested} or {key: value}
    flat |= {f"note.{number}": note for number, note in enumerate(report.notes, 1)}
    holder = _child(suite, "properties")
    for key, value in flat.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            _child(holder, "property", name=key, value=text)


def render(report: Report) -> str:
    """The XML document, declaration included."""
    root = ET.Element("testsuites", name="smoothl1-deploy parity", time=f"{report.seconds:.3f}")
    suites: dict[str, ET.Element] = {}

    def suite(name: str) -> ET.Element:
        if name not in suites:
            suites[name] = _child(root, "testsuite", name=name)
            _properties(suites[name], report)
        return suites[name]

    for cell in report.cells:
        _cell(suite(f"{cell.backend}.{cell.route}.{cell.spec.dtype}"), cell, report.seed)
    for row in report.draws:
        name = f"draws.{row.backend}.{row.route}"
        for cell in row.red:
            _cell(suite(name), cell, report.seed)
        if row.draws and not row.red:
            case = _child(suite(name), "testcase", name=plural(row.draws, "draw"), classname=name)
            _child(case, "system-out", plural(row.cases, "case"))
    for build in report.builds:
        _build(suite(f"engines.{build.flavour}.{build.route}"), build)
    for element in (root, *suites.values()):
        for total, tag in _TOTALS.items():
            element.set(total, str(len(element.findall(f".//{tag}"))))
    ET.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, "unicode") + "\n"
