"""Serving: Triton model repositories, a server of one, and a client that asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._face import face

if TYPE_CHECKING:
    from ._client import Client as Client
    from ._repository import ServedModel as ServedModel
    from ._repository import certify_model as certify_model
    from ._repository import write_loss as write_loss
    from ._repository import write_model as write_model

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "._client": ("Client",),
        "._repository": ("ServedModel", "certify_model", "write_loss", "write_model"),
    },
)
