"""What runs an artefact; one file a backend, all behind the protocol in `base`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._face import face

if TYPE_CHECKING:
    from ._base import Backend as Backend
    from ._base import get_backend as get_backend
    from ._names import BACKENDS as BACKENDS
    from ._trt import TrtBackend as TrtBackend

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "._base": ("Backend", "get_backend"),
        "._names": ("BACKENDS",),
        "._trt": ("TrtBackend",),
    },
)
