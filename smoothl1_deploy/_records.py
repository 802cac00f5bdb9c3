"""Records as JSON, by one rule for every dataclass that the package writes; values by a key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Record:
    """The base of a dataclass that is written as JSON.

        @dataclass(frozen=True, slots=True)
        class Timing(Record):
            median: float
            derived: ClassVar = ("per_second",)

            @property
            def per_second(self) -> float: ...

    Attributes:
        derived: the properties that are written after the fields.
    """

    __slots__ = ()
    derived: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The public fields in their order, then what is derived of them, each by `plain`."""
        return {name: plain(getattr(self, name)) for name in (*_public(self), *self.derived)}


def _public(record: Any) -> list[str]:
    return [field.name for field in fields(record) if not field.name.startswith("_")]


def plain(value: Any) -> Any:
    """`value` in what JSON has: a number that it lacks becomes `"inf"`, `"-inf"` or `"nan"`."""
    match value:
        case Enum():
            return plain(value.value)
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case Path():
            return str(value)
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return {name: plain(getattr(value, name)) for name in _public(value)}
    return value


def grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """The values of each key, both in the order in which they come.

    >>> grouped([("a", 1), ("b", 2), ("a", 3)])
    {'a': [1, 3], 'b': [2]}
    """
    groups: dict[Key, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
