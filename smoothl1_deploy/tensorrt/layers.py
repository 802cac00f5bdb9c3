"""The layers of an engine, as TensorRT's engine inspector names them.

Written against the documented API and tested with a fake of it: no GPU has run this module yet.
"""

from __future__ import annotations

import json

from ..errors import UnsupportedError
from .engine import Engine
from .execution import deserialize
from .flavour import Flavour

__all__ = ["engine_layers"]


def engine_layers(engine: Engine, flavour: Flavour) -> list[str]:
    """One text a layer: its name, and its type where the engine was built with such detail.

    Raises:
        BackendUnavailableError: when the engine can't be deserialised on this machine.
        UnsupportedError: when the inspector's answer can't be read.
    """
    _runtime, made = deserialize(engine, flavour)
    text = made.create_engine_inspector().get_engine_information(
        flavour.need("LayerInformationFormat", "JSON", "the engine inspector")
    )
    try:
        layers = json.loads(text)["Layers"]
        # Names alone, unless the engine was built with ProfilingVerbosity.DETAILED.
        return [
            layer if isinstance(layer, str) else f"{layer['Name']} ({layer['LayerType']})"
            for layer in layers
        ]
    except (ValueError, KeyError, TypeError) as exc:
        raise UnsupportedError(
            f"the engine inspector of {flavour} gave what can't be read as layers: {text[:200]!r}"
        ) from exc
