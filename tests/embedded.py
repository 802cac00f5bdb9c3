"""The embedded Triton, for the tests that need a server."""

from __future__ import annotations

from typing import Any

import pytest

from smoothl1_deploy.errors import SmoothL1DeployError


def embedded_triton() -> Any:
    """It is set up by the first test that asks for it; where it can't run the test is skipped."""
    pytest.importorskip("tritonclient")
    from smoothl1_deploy.serving._embedded import install

    try:
        return install()
    except SmoothL1DeployError as exc:
        pytest.skip(f"the embedded Triton can't run here: {exc}")
