"""The HTML report, parsed: complete, self-contained, and safe with hostile text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

import pytest

from smoothl1_deploy import LossSpec, export, verify
from smoothl1_deploy._table import clean
from smoothl1_deploy.backends._names import BACKENDS, REFERENCES
from smoothl1_deploy.graph._export import ROUTES
from smoothl1_deploy.parity._cases import LAYOUTS
from smoothl1_deploy.parity._contract import Contract
from smoothl1_deploy.parity._drift import Curve, Drift
from smoothl1_deploy.parity._families import FAMILIES
from smoothl1_deploy.parity._report import Cell, Report, repeat_command
from smoothl1_deploy.parity._verify import Verification
from smoothl1_deploy.parity.views import _html as html
from smoothl1_deploy.parity.views._html import STEPS, anchors, maps, step
from smoothl1_deploy.parity.views._tables import overviews

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Document(HTMLParser):
    """Elements with their attributes and text; fails on tags that don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open, [self.elements[i][0] for i in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}, []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.elements[self.open[-1]][0], f"</{tag}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.elements[index][2].append(data)

    def all(self, tag: str, cls: str | None = None) -> list[tuple[dict[str, str], str]]:
        return [
            (attributes, " ".join("".join(text).split()))
            for name, attributes, text in self.elements
            if name == tag and (cls is None or cls in attributes.get("class", "").split())
        ]


@pytest.fixture(scope="module")
def full(green: Report, drift: Drift, contract: Contract) -> str:
    return html.render(dataclasses.replace(green, drift=drift, contract=contract))


@pytest.fixture(scope="module")
def red_page(red: Report) -> str:
    return html.render(red)


def test_every_cell_has_a_place_and_a_panel(full: str, green: Report) -> None:
    document = Document(full)
    ids = anchors(green.cells)
    assert len(set(ids.values())) == len(green.cells)
    panels = [attributes["id"] for attributes, _ in document.all("article", "panel")]
    assert panels == list(ids.values())
    places = [attributes["href"][1:] for attributes, _ in document.all("a", "place")]
    extra = sum(bool(cells) for grid in overviews(green) for _, row in grid.rows for cells in row)
    assert len(places) == len(green.cells) + extra
    assert set(places) == set(panels)


def test_the_maps_are_beta_by_reduction_and_extension_by_beta(green: Report) -> None:
    drawn = maps(green)
    assert list(drawn) == ["float32", "bfloat16"]
    for number, grid in enumerate(drawn["float32"]):
        columns = [name for _, name in grid.columns]
        rows = [name for name, _ in grid.rows]
        if number < 4:
            assert (grid.corner, columns) == ("beta", ["none", "mean", "sum"])
            assert rows == ["0.5", "inf"]
        else:
            assert (grid.corner, columns) == ("extension", ["0.5", "inf"])
            assert rows == ["mean per sample gradient runtime beta weight=weights upstream mask"]
    titles = [(grid.subtitle, grid.title) for grid in drawn["float32"]]
    assert titles == 2 * [
        (backend, route)
        for backend in ("ort-cpu", "onnx-reference")
        for route in ("function", "inlined")
    ]


def test_the_overviews_take_the_worst(full: str, red_page: str, red: Report) -> None:
    (grid,) = overviews(red)
    assert grid.groups == {"float32": 3, "float64": 3}
    (text,) = (text for _, text in Document(red_page).all("table", "overview"))
    kinds = {row.split()[0]: row for row in re.split(r"(?=\b(?:0|0\.5|1|2) )", text) if row}
    assert kinds["0.5"].count("error") == 3 and kinds["0.5"].count("–") == 3
    assert kinds["2"].split()[1].startswith("class")
    assert [a["class"] for a, _ in Document(full).all("table", "overview")] == [
        "map overview", "map overview wide",
    ]  # fmt: skip


def test_the_colour_is_a_step_of_the_scale() -> None:
    assert [step(n) for n in (0, 1, 2, 3, 4, 5, 16, 17, 256, 257, 2**64)] == [
        0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6,
    ]  # fmt: skip
    assert len(STEPS) == 7


def test_a_place_shows_ours_pytorch_s_and_the_limit(full: str, green: Report) -> None:
    document = Document(full)
    by_id: dict[str, Cell] = {anchors(green.cells)[id(cell)]: cell for cell in green.cells}
    for attributes, text in document.all("a", "place"):
        cell = by_id[attributes["href"][1:]]
        assert text.startswith(f"{cell.ulp}{cell.torch_ulp}")
        assert f"≤{cell.allowed}" in text
        assert {f"s{step(cell.ulp)}", f"t{step(cell.torch_ulp)}"} <= set(
            attributes["class"].split()
        )
        assert f"PyTorch {cell.torch_ulp}, allowed {cell.allowed}" in attributes["aria-label"]


def test_a_panel_holds_the_worst_case_and_its_command(red_page: str, red: Report) -> None:
    panels = dict(
        (attributes["id"], text) for attributes, text in Document(red_page).all("article")
    )
    ids = anchors(red.cells)
    for cell in red.cells:
        text = panels[ids[id(cell)]]
        assert repeat_command(cell, 7) in text
        if cell.refused is not None:
            assert "not run" in text
            continue
        assert cell.worst is not None
        case, sample = cell.worst.case, cell.worst.sample
        assert f"family {case.family} · layout {case.layout} · seed 7" in text
        for failure in cell.failures:
            assert " ".join(clean(failure.verdict.detail).split()) in text
        if sample is not None:
            for number in (*sum(sample.inputs.values(), ()), sample.torch, sample.oracle):
                assert number in text
            assert (sample.got or "no answer") in text


def test_the_headline_is_the_verdict(full: str, red_page: str, green: Report, red: Report) -> None:
    assert full.startswith("<!DOCTYPE html>")
    ((attributes, text),) = Document(full).all("h1")
    assert text == f"✓ All {len(green.cells)} cells agree with PyTorch"
    assert attributes["class"] == "good"
    ((attributes, text),) = Document(red_page).all("h1")
    run = sum(cell.refused is None for cell in red.cells)
    assert text == f"✕ {len(red.red)} of {run} cells red, 1 engine failed"
    assert attributes["class"] == "bad"
    listed = [text for _, text in Document(red_page).all("ul", "red-list")]
    assert "BuildError: planted" in " ".join(listed)
    assert len(red.red) == len(re.findall(r"\d+ of \d+ cases", " ".join(listed)))


@pytest.fixture(scope="module")
def verified(hostile: str) -> str:
    """The page of a red verification of a model with a hostile name."""
    found = verify(export(LossSpec(0.5), shape=("N", 4)), spec=LossSpec(), drift=False)
    assert isinstance(found, Verification) and not found
    return html.render(dataclasses.replace(found, name=hostile))


def test_a_verification_is_a_page_too(verified: str, hostile: str) -> None:
    document = Document(verified)
    ((attributes, text),) = document.all("h1")
    assert attributes["class"] == "bad"
    assert re.fullmatch(
        r"✕ \d+ of 13 cases equal to PyTorch, or nearer to the truth, measured on samples", text
    )
    assert clean(" ".join(hostile.split())) in " ".join(t for _, t in document.all("code"))
    assert not document.all("script")
    assert "wrong beta" in " ".join(text for _, text in document.all("td"))
    assert "GPU kernels" in [text for _, text in document.all("dt")]


def test_what_was_not_run_stands_at_the_top(full: str, red_page: str, red: Report) -> None:
    for page in (full, red_page):
        head = page[: page.index("<main")]
        assert "<time>" in head and "onnxruntime" in head
        document = Document(f"{head}</body></html>")
        terms = ([text for _, text in document.all(tag)] for tag in ("dt", "dd"))
        told = dict(zip(*terms, strict=True))
        assert told["GPU kernels"] == "torch-triton, ort-cuda, ort-tensorrt, ort-tensorrt-rtx, trt"
        assert told["served by Triton"] == "triton-http, triton-grpc"
    assert told["TensorRT engines"] == "1 built, none executed"
    assert told["12 cells"].startswith("no float64 here")


def test_maps_without_a_red_cell_are_folded(red_page: str) -> None:
    folded = "".join(re.findall(r"<details>.*?</details>", red_page, re.DOTALL))
    outside = red_page
    for part in re.findall(r"<details>.*?</details>", red_page, re.DOTALL):
        outside = outside.replace(part, "")
    assert len(Document(folded).all("table", "small")) == 1  # float64, which is not run
    assert len(Document(outside).all("table", "small")) == 1


def test_one_file_and_no_network(full: str, red_page: str, verified: str) -> None:
    for page in (full, red_page, verified):
        document = Document(page)
        names = {tag for tag, _, _ in document.elements}
        assert not names & {"link", "img", "iframe", "object", "base"}
        for tag, attributes, _ in document.elements:
            assert "src" not in attributes
            target = attributes.get("href", attributes.get("xlink:href", "#"))
            assert target.startswith("#"), (tag, target)
        addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert not re.search(r"url\((?!#)|@import", page)


def test_links_and_ids(full: str, red_page: str) -> None:
    for page in (full, red_page):
        document = Document(page)
        ids = [attributes["id"] for _, attributes, _ in document.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        targets = {a["href"][1:] for a, _ in document.all("a")}
        assert targets - set(ids) == {"closed"}  # an id that no element has closes the panel


def test_hostile_text_stays_text(red_page: str, hostile: str) -> None:
    document = Document(red_page)
    assert len(document.all("script")) == 1
    assert "\x00" not in red_page
    assert "49" not in [text for _, text in document.all("li")]  # {{ 7*7 }} was not evaluated
    assert clean(hostile) in [text for _, text in document.all("li")]
    assert " ".join(clean(hostile).split()) in [text for _, text in document.all("td")]
    assert not [a for _, a, _ in document.elements if any(key.startswith("on") for key in a)]


def test_names_from_elsewhere_are_escaped_too(green: Report, hostile: str) -> None:
    cells = [
        dataclasses.replace(cell, route=f"{cell.route}{hostile}", backend=hostile)
        for cell in green.cells
    ]
    document = Document(html.render(dataclasses.replace(green, cells=tuple(cells))))
    assert len(document.all("script")) == 1
    ids = [a["id"] for a, _ in document.all("article")]
    assert len(set(ids)) == len(cells)
    assert all(re.fullmatch(r"[A-Za-z0-9.+-]+", name) for name in ids)


def test_the_policy_allows_this_script_alone(full: str) -> None:
    document = Document(full)
    (policy,) = (a["content"] for a, _ in document.all("meta") if "http-equiv" in a)
    script = re.search(r"<script>(.*?)</script>", full, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


def test_every_curve_is_drawn_and_its_numbers_are_in_a_table(full: str, drift: Drift) -> None:
    svgs = re.findall(r"<svg.*?</svg>", full, re.DOTALL)
    assert len(svgs) == 2
    for svg in svgs:
        assert svg.count("<polyline") == 3 and svg.count("<circle") == 9
        for way in ("smoothl1-deploy", "torch.onnx.export", "PyTorch eager"):
            assert f"<title>{way}</title>" in svg
    numbers = Document(full).all("table", "numbers")[0][1]
    for curve in drift.curves:
        assert f"{curve.relative_error[-1]:.1e} {curve.ulp[-1]:,} ULP" in numbers


def test_an_error_of_zero_lies_at_the_bottom_of_the_plot_and_one_of_ten_inside() -> None:
    plot = html.Plot([Curve("odd", "constant", (16, 64), (0.0, 10.0), (0, 0))])
    assert (plot.x(16), plot.y(0.0)) == (0, html._HEIGHT)
    assert (plot.x(64), plot.y(10.0)) == (html._WIDTH, 0)
    alone = html.Plot([Curve("one", "constant", (32,), (0.0,), (0,))])
    assert (alone.x(32), alone.y(0.0)) == (0, html._HEIGHT)


def test_the_contract_table_is_whole(full: str, contract: Contract) -> None:
    ((_, text),) = Document(full).all("table", "edges")
    for edge in contract.edges:
        assert edge.name in text and edge.question in text
        for answer in edge.answers:
            assert answer.text[:40] in text


def test_sections_without_content_are_left_out(red_page: str, green: Report) -> None:
    sections = {a["id"] for a, _ in Document(red_page).all("section")}
    assert sections == {"red", "maps", "certainty", "branches", "engines", "environment"}
    sections = {a["id"] for a, _ in Document(html.render(green)).all("section")}
    assert sections == {"maps", "certainty", "branches", "environment"}


def test_environment_and_engines(red_page: str, red: Report) -> None:
    text = " ".join(" ".join(Document(red_page).elements[0][2]).split())
    for package, version in red.environment["packages"].items():
        assert f"{package} {version or 'not installed'}" in text
    tables = Document(red_page).all("table", "plain")
    engines = next(text for _, text in tables if text.startswith("engines by route"))
    assert "functiontensorrt_rtx1✕ 110.25 s20 kB" in engines
    assert "engines built" in red_page
    none = html.render(dataclasses.replace(red, builds=()))
    assert "engines built" not in none and 'class="tiles four"' in none


def test_every_name_is_explained(full: str, green: Report) -> None:
    ran = [name for name in BACKENDS if name not in REFERENCES]
    assert set(html.BACKENDS) == set(ran)
    assert tuple(html.ROUTES) == ROUTES
    assert all(html.family_meaning(name) for name in FAMILIES)
    assert all(html.layout_meaning(name) for name in LAYOUTS)
    document = Document(full)
    terms = {text for _, text in document.all("dt")}
    for cell in green.cells:
        assert {cell.route, cell.backend, *cell.layouts} <= terms
    assert html.family_meaning("boundary") in " ".join(t for _, t in document.all("th"))


def test_a_limit_below_pytorch_s_own_distance_says_why(green: Report) -> None:
    said = "Allowed is the proved bound here"
    cell = dataclasses.replace(green.cells[0], bound=4, allowed=3, torch_ulp=2, ulp=1)
    for one, there in ((cell, False), (dataclasses.replace(cell, bound=1, allowed=1), True)):
        assert (said in html.render(dataclasses.replace(green, cells=(one,)))) is there
