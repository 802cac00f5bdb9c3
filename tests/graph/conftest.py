"""The graphs run by their own nodes here: with the operators registered, those would be tested."""

from __future__ import annotations

import pytest

from smoothl1_deploy import ops


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "is_built", lambda provider="cpu": False)
