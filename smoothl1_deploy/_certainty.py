"""How sure a statement is, in four words, of the report, the certificate and `doctor` alike."""

from __future__ import annotations

from enum import StrEnum


class Certainty(StrEnum):
    """What stands behind a statement, the surest first. The value is the word that people read."""

    #: By mathematics, or by an exact comparison of all there is.
    PROVED = "proved"
    #: Every pair of input and target of a format was tried.
    EVERY_PAIR = "measured on every pair"
    #: Some inputs were tried: families, shapes, random draws.
    SAMPLES = "measured on samples"
    #: Nothing was tried; nothing is known.
    NOT_RUN = "not run"
