"""The published JSON Schema of `report.json` (draft 2020-12), and validation against it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ...errors import InvalidInputError, require

__all__ = ["schema", "validate"]


def schema() -> dict[str, Any]:
    """The schema, as it lies beside this module."""
    text = files(__package__).joinpath("schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def validate(report: Mapping[str, Any]) -> None:
    """Hold a parsed `report.json` against the schema.

    Raises:
        InvalidInputError: when it doesn't fit; names the place and what is wrong with it.
        MissingDependencyError: without jsonschema.
    """
    jsonschema = require("jsonschema", "report", "validating report.json")
    validator = jsonschema.Draft202012Validator(schema())
    error = jsonschema.exceptions.best_match(validator.iter_errors(report))
    if error is not None:
        raise InvalidInputError(
            f"the report does not fit its schema at {error.json_path}: {error.message[:300]}; "
            "it was changed by hand, or written by another version of smoothl1-deploy"
        )
