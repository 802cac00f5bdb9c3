"""Fuzzing of every public entry; not shipped. `scripts/fuzz` runs it, docs/security.md explains it.

A target draws a case (hypothesis) and gives it to an entry of the package. The outcome is a result,
or one of the errors of `smoothl1_deploy.errors`; anything else is a fault. Cases run in worker
processes, so that a dead interpreter or a hang is one fault more and not the end.
"""
