"""Scoring of data larger than memory: sources → shards → tasks → an engine → one exact result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._face import face

if TYPE_CHECKING:
    from ._score import score_files as score_files
    from ._scorer import make_job as make_job
    from ._shards import locate as locate

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "._score": ("score_files",),
        "._scorer": ("make_job",),
        "._shards": ("locate",),
    },
)
