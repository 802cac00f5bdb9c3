"""Makes the fixtures of `conftest_serving` known to the tests beside it."""

from __future__ import annotations

from conftest_serving import repository, server, triton

__all__ = ["repository", "server", "triton"]
