"""Error against size: ours and PyTorch's stay at the rounding, the plain graph's grows."""

from __future__ import annotations

from smoothl1_deploy.parity._drift import DATA, WAYS, Curve, Drift, measure_drift


def curve(drift: Drift, way: str, data: str) -> Curve:
    (found,) = (c for c in drift.curves if (c.way, c.data) == (way, data))
    return found


def test_every_way_on_every_kind_of_data(drift: Drift) -> None:
    assert [(c.way, c.data) for c in drift.curves] == [(w, d) for d in DATA for w in WAYS]
    assert {c.elements for c in drift.curves} == {(2**10, 2**14, 2**18)}
    for c in drift.curves:
        assert len(c.relative_error) == len(c.ulp) == 3


def test_ours_does_not_drift_and_the_plain_graph_does(drift: Drift) -> None:
    for data in DATA:
        ours = curve(drift, "smoothl1-deploy", data)
        assert max(ours.ulp) <= 1 and max(ours.relative_error) < 2**-23
        assert max(curve(drift, "PyTorch eager", data).ulp) <= 8
    plain = curve(drift, "torch.onnx.export", "constant")
    assert plain.ulp[-1] > 500 and plain.relative_error[-1] > 5e-5
    assert plain.relative_error[-1] > 10 * plain.relative_error[0]


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    measure_drift([16, 32], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
