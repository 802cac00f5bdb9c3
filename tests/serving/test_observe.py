"""What a server tells about itself: metrics, the dashboard that reads them, and structured logs."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.request
from pathlib import Path

import ml_dtypes
import numpy as np

from smoothl1_deploy.serving._onnxruntime_backend import CANARY_ID
from smoothl1_deploy.serving._server import Server
from smoothl1_deploy.serving._supervise import Events
from smoothl1_deploy.serving._transport import open_transport

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"


def scrape(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(server.addresses.to_dict()["metrics"]) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_the_distribution_of_the_losses_without_those_of_canaries(server: Server) -> None:
    # The rows have the losses 0, 0.5 and 8.5 at beta 1, and one NaN.
    rows = np.repeat(np.array([[0.0], [1.0], [9.0], [np.nan]]), 16, axis=1)
    models = {"none": (np.float32, 16), "scores": (ml_dtypes.bfloat16, 1)}
    feeds = {
        name: {"input": rows.astype(dtype), "target": np.zeros_like(rows, dtype)}
        for name, (dtype, _) in models.items()
    }
    with contextlib.closing(open_transport(server.addresses.to_dict()["grpc"], 10, 0)) as transport:

        def told() -> dict[str, float]:
            """The metrics, after each model has passed on what it counted."""
            time.sleep(1.1)
            for name, arrays in feeds.items():
                transport.infer(name, "", arrays, CANARY_ID)
            return scrape(server)

        before = told()
        for name, arrays in feeds.items():
            transport.infer(name, "", arrays)
        after = told()
    grown = {name: after[name] - before[name] for name in after if name in before}
    below = {"0.001": 1, "0.3": 1, "1.0": 2, "3.0": 2, "10.0": 3, "100.0": 3, "+Inf": 3}
    for model, (_, size) in models.items():
        labels = f'model="{model}",version="1"'
        for bound, count in below.items():
            assert grown[f'smooth_l1_loss_bucket{{le="{bound}",{labels}}}'] == count * size, bound
        for name, total in (("count", 3), ("sum", 9.0), ("not_finite", 1)):
            assert grown[f"smooth_l1_loss_{name}{{{labels}}}"] == total * size, name


def test_the_dashboard_reads_what_the_server_tells(server: Server) -> None:
    known = {re.sub(r"\{.*", "", name) for name in scrape(server)}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    expressions += [v["query"]["query"] for v in dashboard["templating"]["list"][1:]]
    named = {n for e in expressions for n in re.findall(r"\b(?:nv|smooth)_\w+", e)}
    assert len(named) >= 9 and named <= known
    for panel in dashboard["panels"]:
        assert panel["title"] and panel["datasource"]["uid"] == "${datasource}"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_query_of_the_page_is_that_of_the_dashboard() -> None:
    page = DASHBOARD.with_name("serving.md").read_text()
    (query,) = re.findall(r"^histogram_quantile\(0.5.*", page, re.MULTILINE)
    assert (
        query.replace("[5m]", '{model=~"$model"}[5m]')
        in json.loads(DASHBOARD.read_text())["panels"][5]["targets"][0]["expr"]
    )


def test_events_are_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("{}\n")  # of the server before
    with contextlib.closing(Events(path)) as events:
        events.record(
            "canary_failed", model="mean", reason='it said "no"\nand more', seconds=0.123456
        )
        _, line = path.read_text().splitlines()  # there at once
    found = json.loads(line)
    assert found["event"] == "canary_failed" and found["level"] == "warning"
    assert found["reason"] == 'it said "no"\nand more' and found["seconds"] == 0.1235
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", found["time"])
    with contextlib.closing(Events(Path("/dev/full"))) as events:
        events.record("loaded", model="mean")  # a full disk ends no server
