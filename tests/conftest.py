"""What every test shares: hypothesis that gives the same examples every time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# `exact` is a module of the tests, not of the package; importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

# A shell that starts this in the background ignores SIGINT for us; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,  # the machine is shared
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# `HYPOTHESIS_PROFILE=search` looks for new examples.
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
