"""`Finding`: one thing that is wrong with a model repository, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

__all__ = ["RULES", "Fault", "Finding"]

#: Rule -> what to do; docs/serving-repository.md says what each is about.
RULES: Mapping[str, str] = {
    "refused": "mend what it names",
    "no-config": "write one, or let smoothl1-deploy repository write it",
    "bad-config": "mend the text where it says so",
    "no-model-file": "put it there, or delete the version's folder",
    "bad-model": "write the file again",
    "engine-inside": "serve the model that it was built from",
    "damaged-metadata": "write the model again with smoothl1-deploy repository",
    "changed-model": "smoothl1-deploy verify --certificate; a green certificate settles it",
    "unknown-tensor": "write the names as the model has them",
    "missing-input": "add it, or let smoothl1-deploy repository write the config",
    "wrong-dtype": "write the data_type as the model has it",
    "wrong-dims": "write the dims as the model has them, without the rows where max_batch_size is "
    "above 0; for a number the graph needs the shape [1], which repository --model gives it",
    "batched-reduction": "write max_batch_size: 0, leave dynamic_batching out, and give every dims "
    "its axis of rows (-1); for one score a row export with --per-sample",
    "not-batchable": "write max_batch_size: 0, and give every dims its axis of rows (-1)",
    "missing-guard": "put Reshape(target, Shape(input)) before the loss, as smoothl1-deploy "
    "repository --model does",
    "warmup-batch": "write a batch_size that the model takes",
    "operator-library": "put it there, or lint where the server runs",
    "other-tensorrt": "build it with --flavour tensorrt in the container that serves it",
    "stale-plan": "build it again from that file",
    "damaged-plan": "copy the plan and its sidecar again, or build it again",
    "stale-certificate": "write a new one with smoothl1-deploy verify --certificate",
    "red-certificate": "write a new one with smoothl1-deploy verify --certificate",
    "damaged-certificate": "write a new one with smoothl1-deploy verify --certificate",
}

#: A rule and what is wrong, with the values.
Fault = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """What the lint found.

    Attributes:
        model: name of the folder.
        rule: one of `RULES`.
        problem: what is wrong, with the values.
    """

    model: str
    rule: str
    problem: str

    @property
    def remedy(self) -> str:
        """What to do."""
        return RULES[self.rule]

    def __str__(self) -> str:
        return f"{self.model}: {self.rule}: {self.problem}; {self.remedy}"

    def to_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return {**asdict(self), "remedy": self.remedy}
