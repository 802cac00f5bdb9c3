"""Peak memory of one call, each in a process of its own (Linux)."""

from __future__ import annotations

import json
import subprocess
import sys

__all__ = ["peak_ratio"]


def peak_ratio(name: str, size: int, threads: int) -> float | None:
    """Peak memory of a `mean` over float32 arrays, the inputs included, over that of the inputs.

    Args:
        name: of a contestant.
        size: elements.
        threads: for it.

    Returns:
        The ratio; None where the system doesn't tell, or the contestant isn't there.
    """
    command = [sys.executable, "-m", __name__, name, str(size), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return None
    return float(found)


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _main() -> None:
    import numpy as np

    from ..spec import LossSpec
    from .contestants import contestants

    name, size, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    (chosen,) = contestants(LossSpec(), 16, threads, only=name)[0]
    rng = np.random.default_rng(0)
    input, target = rng.standard_normal((2, size // 16, 16), dtype=np.float32)
    few = slice(0, 1 << 14)  # sessions and code are there before it counts
    for _ in range(2):
        chosen.call(input[few], target[few])
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the high-water mark is what is resident now
    before = _status("VmRSS")
    chosen.call(input, target)
    inputs = input.nbytes + target.nbytes
    print(json.dumps(1 + max(0, _status("VmHWM") - before) / inputs))


if __name__ == "__main__":
    _main()
