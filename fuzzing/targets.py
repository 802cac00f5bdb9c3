"""Every target, the slowest first: what is begun last should be short."""

from __future__ import annotations

from . import answers, commands, files, models, scoring, serving, specs

_SLOW = ("torch-route", "verify", "build", "command")
TARGETS = sorted(
    (
        *specs.TARGETS,
        *models.TARGETS,
        *files.TARGETS,
        *scoring.TARGETS,
        *answers.TARGETS,
        *serving.TARGETS,
        *commands.TARGETS,
    ),
    key=lambda target: _SLOW.index(target.name) if target.name in _SLOW else len(_SLOW),
)
