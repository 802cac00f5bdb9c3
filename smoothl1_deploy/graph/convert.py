"""A model of an old opset, converted; and how much the steps that onnx takes in C++ can read."""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx.version_converter

from ..errors import ArtefactError
from ..model import MODEL_ERRORS

__all__ = ["check_parsed", "converted"]

_PARSED = 2**31 - 1  # bytes that protobuf reads in one message


def converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """`model` in the opset `opset`.

    Its functions are put in the places where they are called: onnx's converter (1.23) drops them.

    Raises:
        ArtefactError: for what the converter can't do, and for more than it can read.
    """
    check_parsed(model, "the conversion of the opset")
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model, convert_version=True)
        return onnx.version_converter.convert_version(model, opset)
    except (onnx.version_converter.ConvertError, *MODEL_ERRORS, RuntimeError) as exc:
        raise ArtefactError(f"onnx can't convert the model to opset {opset}: {exc}") from exc


def check_parsed(model: onnx.ModelProto, step: str) -> None:
    """Refuse a model too big for `step`, which onnx takes in C++: it arrives there as one message.

    Raises:
        ArtefactError: for more than 2 GB in memory.
    """
    size = model.ByteSize()
    if size > _PARSED:
        raise ArtefactError(
            f"the model holds {size} bytes in memory, and {step} takes {_PARSED} at most "
            "(protobuf's limit); leave its weights in a file beside it with "
            "onnx.load(path, load_external_data=False)"
        )
