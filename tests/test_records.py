"""One rule makes JSON of every record."""

import json
import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from smoothl1_deploy import LossSpec
from smoothl1_deploy._records import Record


class _Colour(Enum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class _Part:
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Whole(Record):
    value: float
    content: Any
    _cache: list[int] = field(default_factory=list)
    derived: ClassVar[tuple[str, ...]] = ("twice",)

    @property
    def twice(self) -> float:
        return 2 * self.value


def test_numbers_that_json_lacks_are_words_and_what_is_private_stays_out():
    content = {
        "spec": LossSpec(math.inf, "sum"),
        "part": _Part((2, 3)),
        "colour": _Colour.RED,
        "path": Path("a") / "b",
        7: np.float64("nan"),
        "list": [-math.inf, None, True],
    }
    written = _Whole(math.inf, content).to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == {
        "value": "inf",
        "content": {
            "spec": {"beta": "inf", "reduction": "sum", "dtype": "float32"},
            "part": {"sizes": [2, 3]},
            "colour": "red",
            "path": "a/b",
            "7": "nan",
            "list": ["-inf", None, True],
        },
        "twice": "inf",
    }
