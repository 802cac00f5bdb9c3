"""The two references: PyTorch eager (the contract) and the oracle (the truth)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._face import face

if TYPE_CHECKING:
    from ._oracle import oracle as oracle

__getattr__, __dir__, __all__ = face(__name__, {"._oracle": ("oracle",)})
