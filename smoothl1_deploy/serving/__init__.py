"""Serving: Triton model repositories, a server of one, and a client that asks it."""

from __future__ import annotations

from .client import Client

__all__ = ["Client"]
