"""Every view is parsed back: the same report, nothing lost, nothing that escapes."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

import smoothl1_deploy
from smoothl1_deploy import LossSpec, export, verify
from smoothl1_deploy._certainty import Certainty
from smoothl1_deploy._spec import DTYPES, REDUCTIONS
from smoothl1_deploy._table import Entry, Table, clean
from smoothl1_deploy.errors import MissingDependencyError
from smoothl1_deploy.parity._contract import Contract
from smoothl1_deploy.parity._drift import Drift, DriftPoint
from smoothl1_deploy.parity._pairs import PAIRS, Claim, Distances, Proof, Tally
from smoothl1_deploy.parity._report import Report, is_extended, repeat_command
from smoothl1_deploy.parity._verify import Verification
from smoothl1_deploy.parity._whole import ModelVerification, Run
from smoothl1_deploy.parity.views import _html as html
from smoothl1_deploy.parity.views import _junit as junit
from smoothl1_deploy.parity.views import _markdown as markdown
from smoothl1_deploy.parity.views import _tables as tables
from smoothl1_deploy.parity.views._tables import beta_text, distance_text, finding, variant

# --- what the views share


def test_names_of_numbers() -> None:
    assert [beta_text(b) for b in (0.0, 0.5, 1e-3, 1e4, 10.0, float("inf"))] == [
        "0", "0.5", "1e-3", "1e4", "10", "inf",
    ]  # fmt: skip
    assert beta_text(1.0000001) == "1.0000001"  # 1 to six digits, and another beta
    assert beta_text(0.1 + 0.2) == "0.30000000000000004"
    distances = [distance_text(n) for n in (0, 9999, 10_000, 2_500_000, 2**63)]
    assert distances == ["0", "9999", "10k", "2M", "9e18"]
    assert variant(LossSpec(reduction="sum")) == "sum"
    extended = LossSpec(per_sample=True, gradient=True, runtime_beta=True, weight="weights")
    assert variant(extended) == "mean per sample gradient runtime beta weight=weights"
    assert clean("a\x00\x1bb\ud800\n") == "a\ufffd\ufffdb\ufffd\n"


def test_a_finding_says_what_kind_of_red_it_is(red: Report, green: Report) -> None:
    kinds = {(c.beta, c.spec.reduction): finding(c) for c in red.cells if c.refused is None}
    assert {kinds[0.5, r] for r in ("none", "mean", "sum")} == {"error"}
    assert kinds[1.0, "mean"] == "distance"
    assert kinds[2.0, "none"] == "class"
    assert kinds[1.0, "none"] == kinds[0.0, "sum"] == ""
    assert {finding(cell) for cell in green.cells} == {""}


def test_what_stands_for_several_has_the_largest_distance_of_them(green: Report) -> None:
    """2 of 2 is nearer to its limit than 3 of 4, and 0 of 1 as near; the worst is 3."""
    spec = next(cell.spec for cell in green.cells if is_extended(cell.spec))
    numbers = ((0, 1), (2, 2), (3, 4), (3, 5))
    cells = [dataclasses.replace(green.cells[0], spec=spec, ulp=u, allowed=a) for u, a in numbers]
    report = dataclasses.replace(green, cells=tuple(cells))
    (table,) = tables.matrix(report)
    assert table.rows[0][1] == Entry("3/4", True)


def test_what_could_be_markup_is_code_in_a_markdown_table() -> None:
    for text in ("0.5", "3/4★", "mean per sample", "1.2e-08", "–"):
        assert f"| {text} |" in Table("", ("a",), [(text,)], "l").markdown()
    for text in ("a*b*", "<b>", "@someone", "www.example.org", "https://x", "a~b", "a[b](c)"):
        assert f"| `{text}` |" in Table("", ("a",), [(text,)], "l").markdown()
    assert r"| `a\|b` |" in Table("", ("a",), [("a|b",)], "l").markdown()


# --- JSON


def test_the_json_fits_its_schema(
    fits_schema: Callable[[Report], None],
    green: Report,
    red: Report,
    drift: Drift,
    contract: Contract,
) -> None:
    for report in (green, red, dataclasses.replace(green, drift=drift, contract=contract)):
        fits_schema(report)


def test_the_schema_is_a_valid_and_a_strict_one(schema: dict[str, Any]) -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(schema)
    objects = [schema, *schema["$defs"].values()]
    assert len(objects) > 10
    for node in objects:  # nothing more, or, in a map, values of one kind
        assert node.get("type") != "object" or node["additionalProperties"] is not True, node


def test_every_field_of_a_spec_is_in_the_schema(schema: dict[str, Any]) -> None:
    """Whoever extends `LossSpec` extends the schema too."""
    described = set(schema["$defs"]["spec"]["properties"])
    assert described == {field.name for field in dataclasses.fields(LossSpec)}


def test_the_worst_element_is_told_with_its_inputs(green: Report, red: Report) -> None:
    for cell in green.cells:
        assert cell.worst is not None and cell.worst.sample is not None
        sample, verdict = cell.worst.sample, cell.worst.verdict
        if not is_extended(cell.spec):
            assert (sample.behind == 1) == (cell.spec.reduction == "none")
        names = [*cell.spec.operands]
        assert list(sample.inputs) == names
        assert {len(x) for x in sample.inputs.values()} == {min(4, sample.behind)}
        if verdict.ulp == 0:
            assert sample.got == sample.oracle
    (cell,) = (c for c in red.cells if (c.beta, c.spec.reduction) == (2.0, "none") and c.worst)
    assert cell.worst is not None and cell.worst.sample is not None
    sample = cell.worst.sample
    assert "nan" in (*sample.inputs["input"], *sample.inputs["target"])
    assert (sample.output, sample.behind, len(sample.index)) == ("loss", 1, 2)
    assert (sample.got, sample.torch, sample.oracle) == ("0.0", "nan", "nan")


# --- JUnit

#: element -> (attributes it must have, those it may have, children). Source: Apache Ant's schema.
JUNIT = {
    "testsuites": (
        {"name", "tests", "failures", "errors", "skipped", "time"}, set(), {"testsuite"}
    ),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped"}, set(), {"properties", "testcase"}
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": ({"name", "classname"}, {"time"}, {"failure", "skipped", "system-out"}),
    "failure": ({"message", "type"}, set(), set()),
    "skipped": ({"message"}, set(), set()),
    "system-out": (set(), set(), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", ["green", "red"])
def test_junit_has_the_structure_that_ci_systems_read(
    name: str, request: pytest.FixtureRequest
) -> None:
    report: Report = request.getfixturevalue(name)
    root = ET.fromstring(junit.render(report))
    assert root.tag == "testsuites"
    for element in root.iter():
        must, may, children = JUNIT[element.tag]
        assert must <= set(element.attrib) <= must | may, element.tag
        assert {child.tag for child in element} <= children
    cases = root.findall("testsuite/testcase")
    names = [(case.get("classname"), case.get("name")) for case in cases]
    assert len(names) == len(set(names)) == len(report.cells) + len(report.builds)
    for element in (root, *root.findall("testsuite")):
        inside = list(element.iter("testcase"))
        assert int(element.get("tests", "")) == len(inside)
        for total, tag in (("failures", "failure"), ("skipped", "skipped")):
            assert int(element.get(total, "")) == sum(c.find(tag) is not None for c in inside)


def test_junit_is_green_or_red_as_the_report_is(green: Report, red: Report) -> None:
    assert ET.fromstring(junit.render(green)).get("failures") == "0"
    root = ET.fromstring(junit.render(red))
    assert root.get("failures") == str(len(red.red) + len(red.red_builds))
    failures = {f.get("type"): f for f in root.iter("failure")}
    assert set(failures) == {"error", "distance", "class", "build"}
    (cell,) = (c for c in red.red if finding(c) == "distance")
    text = failures["distance"].text or ""
    assert repeat_command(cell, 7) in text and "ULP >" in text
    assert len(text.splitlines()) == len(cell.failures) + 1


def test_junit_keeps_hostile_text_as_text(red: Report, hostile: str) -> None:
    document = junit.render(red)
    assert "\x00" not in document and "<script" not in document
    messages = [e.get("message") or "" for e in ET.fromstring(document).iter("skipped")]
    assert f"no float64 here {clean(hostile)}" in messages


# --- Markdown


def tables_in(text: str) -> list[list[list[str]]]:
    """Tables of a GitHub-flavoured document, as rows of cells; an escaped pipe is none."""
    found: list[list[list[str]]] = []
    previous = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            found[-1].append([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]])
        previous = line
    return found


@pytest.mark.parametrize("name", ["green", "red"])
def test_markdown_tables_are_rectangular(
    name: str, request: pytest.FixtureRequest, drift: Drift, contract: Contract
) -> None:
    report: Report = dataclasses.replace(
        request.getfixturevalue(name), drift=drift, contract=contract
    )
    matrix, *extensions, sure, backends, drifts, edges = tables_in(markdown.render(report))
    for table in (matrix, *extensions, sure, backends, drifts, edges):
        assert {len(row) for row in table} == {len(table[0])}
        assert all(re.fullmatch(r"-{3}:?", cell) for cell in table[1])
    betas = {cell.beta for cell in report.cells}
    assert [row[0] for row in matrix[2:]] == [beta_text(beta) for beta in sorted(betas)]
    variants = {variant(cell.spec) for cell in report.cells if is_extended(cell.spec)}
    assert {row[0] for table in extensions for row in table[2:]} == variants
    assert len(backends) - 2 == len({(c.backend, c.route) for c in report.cells})
    assert len(drifts) - 2 == len(drift.curves)
    assert edges[0] == ["edge", "PyTorch eager", "ort-cpu", "`torch.onnx.export`"]


def test_markdown_says_green_or_red(green: Report, red: Report) -> None:
    text = markdown.render(green)
    assert text.startswith("## ✅") and "❌" not in text
    # A reader has not gone far before it is said what is not proved.
    assert green.date in text.splitlines()[2] and text.splitlines()[4] == "Not run:"
    assert "- GPU kernels: torch-triton, ort-cuda" in text
    text = markdown.render(red)
    assert text.startswith(f"## ❌ Smooth L1 parity: {len(red.red)} red cells and 1 failed engine")
    assert all(repeat_command(cell, 7) in text for cell in red.red)
    assert text.count("❌ **error/") == 3 and text.count("❌ **class/") == 3


def test_markdown_puts_hostile_text_into_code(red: Report) -> None:
    text = markdown.render(red)
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)
    assert "someone" in text
    assert "someone" not in outside and "<script" not in outside and "\x00" not in text


def test_markdown_of_many_red_cells_stays_short(red: Report) -> None:
    many = dataclasses.replace(red, cells=red.cells * 40)
    text = markdown.render(many)
    assert len(text) < 60_000  # GitHub's limit for a comment is 65,536
    assert f"and {len(many.red) - 20} more" in text


def test_how_sure_each_statement_is_has_one_of_four_words(red: Report) -> None:
    """`red` has one backend, which refuses float64."""
    table = tables.certainty(red)
    told = {
        name: dict(zip(table.columns[1:], row, strict=True))
        for names, *row in table.rows
        for name in str(names).split(", ")
    }
    assert {word for row in told.values() for word in row.values()} <= {*Certainty}
    assert told["ort-cpu"] == dict.fromkeys(DTYPES, "not run") | {"float32": "measured on samples"}
    assert {*told["trt"].values()} == {"not run"}
    assert {*told["the error bound of the graphs"].values()} == {"proved"}
    assert "torch" not in told
    for text in (markdown.render(red), html.render(red)):
        assert "measured on samples" in text and "proved" in text
    assert not tables.certainty(dataclasses.replace(red, cells=())).rows  # draws alone


def test_every_pair_stands_in_the_report(
    fits_schema: Callable[[Report], None], green: Report
) -> None:
    """And is told apart from what is sampled; a red one is told of."""
    ours, torch = Distances((PAIRS - 1, 1, 0, 0), 1), Distances((PAIRS, 0, 0, 0))
    tally = Tally(PAIRS, ours, torch, worst={"input": "1.0"})
    whole = dataclasses.replace(
        Proof.begun(Claim("float16", math.inf)), outputs={"ort-cpu": {"loss": tally}}, left=()
    )
    begun = dataclasses.replace(Proof.begun(Claim("bfloat16", 1.0)), outputs={})
    report = dataclasses.replace(green, pairs=(whole, begun))
    assert report
    fits_schema(report)
    sure = {str(names): words for names, *words in tables.certainty(report).rows}
    of_pairs = sure["ort-cpu: none and its gradient at beta inf"]
    assert of_pairs == ["measured on every pair" if d == "float16" else "" for d in DTYPES]
    assert not any("at beta 1" in what for what in sure)
    for text in (markdown.render(report), html.render(report)):
        assert "99.9999%, 1 ULP" in text and "4,294,967,296" in text
    alone = html.render(dataclasses.replace(report, cells=()))  # as of draws
    assert "99.9999%, 1 ULP" in alone and 'href="#certainty"' in alone
    inlined = dataclasses.replace(whole, claim=dataclasses.replace(whole.claim, route="inlined"))
    assert len(tables.pairs(dataclasses.replace(report, pairs=(whole, inlined)))) == 2
    wrong = dataclasses.replace(tally, wrong_class=20)
    shown = dataclasses.replace(whole, outputs={"ort-cpu": {"loss": wrong}})
    told = markdown.render(dataclasses.replace(report, pairs=(shown,)))
    assert "beta inf, ort-cpu, loss: red, of another class, 20, as" in told


# --- the terminal


def test_the_terminal_shows_every_table(green: Report, red: Report) -> None:
    for report in (green, red):
        console = Console(width=200, record=True, file=io.StringIO())
        shown = [*tables.matrix(report), tables.backends(report), tables.branches(report)]
        assert len(shown) == (4 if report is green else 3)  # the extensions have one of their own
        for table in shown:
            console.print(table)
        text = console.export_text()
        assert "float32" in text and "quadratic" in text
        assert ("error/" in text) == ("class/" in text) == (report is red)


HUGE = 2_994_212_345


@pytest.mark.parametrize("width", [80, 120])
def test_no_number_is_cut_in_a_terminal(
    width: int, green: Report, red: Report, contract: Contract, drift: Drift
) -> None:
    """Every dtype and reduction, and distances as a wrong graph has them."""
    specs = [LossSpec(1.0, r, d) for d in DTYPES for r in REDUCTIONS]
    every = tuple(
        dataclasses.replace(green.cells[0], spec=spec, beta=beta, ulp=HUGE, allowed=HUGE)
        for spec in specs
        for beta in (0.0, 1e-3, 0.1 + 0.2, math.inf)
    )
    found = verify(export(LossSpec(), shape=("N", 16)), drift=False)
    assert isinstance(found, Verification)
    wrong = [
        dataclasses.replace(
            result,
            verdict=dataclasses.replace(result.verdict, ok=False, ulp=HUGE, detail=f"{HUGE} off"),
        )
        for result in found.results
    ]
    of_constants = next(result for result in wrong if result.case.family == "constant")
    point = DriftPoint(1 << 24, of_constants, "grad_input", 1.25, 1.0, 1.0, 12_345.6)
    bad = dataclasses.replace(found, results=tuple(wrong), drift=(point,))
    whole = ModelVerification(
        "model", "0" * 64, "ort-cpu", {}, (Run("normal", {"loss": wrong[0].verdict}, {}),), {}
    )
    shown = [
        *tables.matrix(dataclasses.replace(green, cells=every)),
        *(each for r in (green, red) for each in (*tables.matrix(r), tables.backends(r))),
        *(tables.branches(green), tables.engines(red.builds), tables.drift(drift)),
        *(each for v in (found, bad) for each in tables.verified(v)),
        tables.whole_runs(whole),
    ]
    assert len(shown) > 12
    for table in shown:
        console = Console(width=width, file=io.StringIO(), soft_wrap=True)
        console.print(table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, text.splitlines())) <= width, table.title
        words = text.split()
        for row in table.rows:
            entries = [entry if isinstance(entry, str) else entry.text for entry in row]
            assert {word for entry in entries for word in entry.split()} <= {*words}, table.title
        assert {word for name in table.columns for word in name.split()} <= {*words}


# --- packaging


def test_every_file_of_the_package_is_packaged() -> None:
    package = Path(smoothl1_deploy.__file__).parent
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text())
    data = settings["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for name, patterns in data.items()
        for pattern in patterns
        for path in package.joinpath(*name.split(".")[1:]).glob(pattern)
    }
    others = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
        if "__pycache__" not in path.parts
    }
    assert others == packaged


def test_a_missing_package_is_a_sentence(green: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        MissingDependencyError, match=r"the HTML report needs .*'jinja2'.*\[report\]'"
    ):
        html.render(green)
