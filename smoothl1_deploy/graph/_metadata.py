"""What a model says about itself: its spec, its route, its content hash, a name of its own."""

from __future__ import annotations

import hashlib
import json
import warnings

import onnx

from .. import __version__
from .._model import metadata_of
from .._spec import LossSpec
from ..errors import ArtefactError, ModelWarning, SpecError

_PREFIX = "smoothl1_deploy."
SPEC, ROUTE, VERSION, HASH = (_PREFIX + key for key in ("spec", "route", "version", "sha256"))
#: The entry of a graph whose ports have a server's shapes: see serving/_graph.py.
SERVED = _PREFIX + "served"
#: What is said of a model for which `is_changed` is true.
CHANGED = (
    "the model was changed by something else after smoothl1-deploy exported it: its content does "
    f"not match its own metadata entry {HASH}, or has lost that entry. It is used as it is; "
    "whether it still computes the spec in its metadata, smoothl1-deploy verify says"
)


def _drop(model: onnx.ModelProto, *keys: str) -> None:
    kept = [entry for entry in model.metadata_props if entry.key not in keys]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def content_hash(model: onnx.ModelProto) -> str:
    """The sha256, in hex, of the serialised model without its own hash entry."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _drop(copy, HASH)
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()


def stamp(
    model: onnx.ModelProto,
    spec: LossSpec,
    route: str,
    shapes: str,
    *,
    served: bool = False,
    changed: bool = False,
) -> None:
    """Write name, doc string and metadata into `model`, the content hash last.

    A model that something else has changed gets no hash, and so stays known for that.
    """
    model.graph.name = f"{spec.name}_{route}_{shapes}"
    knee = f"an array {list(spec.beta_shape)}" if spec.beta_shape else repr(spec.knee)
    said = f"Huber loss: delta={knee}" if spec.loss == "huber" else f"Smooth L1 loss: beta={knee}"
    model.graph.doc_string = f"{said}, reduction={spec.reduction}, dtype={spec.dtype}"
    model.doc_string = f"{model.graph.doc_string}; route={route}, shapes={shapes}"
    model.producer_name = "smoothl1-deploy"
    model.producer_version = __version__
    onnx.helper.set_model_props(
        model,
        {
            SPEC: json.dumps(spec.to_dict(), sort_keys=True),
            ROUTE: route,
            VERSION: __version__,
            **({SERVED: "1"} if served else {}),
        },
    )
    if not changed:
        sign(model)


def sign(model: onnx.ModelProto) -> None:
    """Write the content hash of `model` as it is now."""
    onnx.helper.set_model_props(model, {**metadata_of(model), HASH: content_hash(model)})


def read_route(model: onnx.ModelProto) -> str | None:
    """The route that made `model`, or None for a model of other origin."""
    return metadata_of(model).get(ROUTE)


def is_served(model: onnx.ModelProto) -> bool:
    """Whether loss and beta have a server's shapes: [1] for rank 0, [N, 1] for a score a row."""
    return SERVED in metadata_of(model)


def read_spec(model: onnx.ModelProto) -> LossSpec | None:
    """The spec `model` carries, or None for a model of other origin.

    Of a model that was changed since (`is_changed`) it is what the model ought to compute.

    Raises:
        ArtefactError: when the entry is damaged.
    """
    properties = metadata_of(model)
    if SPEC not in properties:
        return None
    try:
        return LossSpec.from_dict(json.loads(properties[SPEC]))
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        kind = "" if isinstance(exc, SpecError) else "damaged "
        raise ArtefactError(f"the model's {kind}metadata entry {SPEC}: {exc}") from exc


def is_changed(model: onnx.ModelProto) -> bool:
    """Whether `model` carries a spec and its content is no longer what was exported with it.

    A model cut off on its way, for instance, has lost its hash.
    """
    properties = metadata_of(model)
    return SPEC in properties and properties.get(HASH) != content_hash(model)


def warn_if_changed(model: onnx.ModelProto) -> None:
    """Warn the caller of the public function that calls this of a model that was changed."""
    if is_changed(model):
        warnings.warn(CHANGED, ModelWarning, stacklevel=3)


def forget_spec(model: onnx.ModelProto) -> None:
    """Drop from `model` what it says of itself as a loss artefact: it is about to be another."""
    _drop(model, SPEC, ROUTE, HASH, SERVED)
