"""What the tests of the backends of a GPU share."""

from __future__ import annotations

import pytest
from host_device import on_host_device

from smoothl1_deploy.backends import _gpu as gpu


@pytest.fixture
def tensors_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's tensors of the host count as those of a `HostDevice`."""
    monkeypatch.setattr(gpu, "is_on_device", on_host_device)
