"""`Finding`: one thing that is wrong with a model repository, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What the lint found.

    Attributes:
        model: name of the folder.
        rule: a short name of the kind of fault, such as `"wrong-dtype"`.
        problem: what is wrong, with the values.
        remedy: what to do.
    """

    model: str
    rule: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.model}: {self.rule}: {self.problem}; {self.remedy}"

    def to_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return asdict(self)
