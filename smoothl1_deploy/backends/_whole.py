"""`ModelRunner`: a model with losses attached, run as a whole, by its own names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import onnx
from onnx import TensorProto, helper

from .._dlpack import as_array
from .._floats import NUMPY_DTYPE, Array
from .._model import DTYPE_OF_ELEMENT, Loss, axes_of, element_name, inputs_of, read_attached
from ..errors import ArtefactError, InvalidInputError
from ._runner import check_interpreter, not_picklable

#: A backend's way to run a graph: arrays by the names of its inputs, to every output by its name.
Session = Callable[[dict[str, Array]], dict[str, Array]]


class ModelRunner:
    """A model with losses attached; `run` may be called from many threads at once.

    Attributes:
        losses: what was attached, and by which tensors.
        inputs: the name of each input, and how it reads in a message: `images: float32[N,3,32,32]`.
        outputs: the names of the outputs, in the order of the graph.
        axes: the declared shape of each input, as `_model.axes_of` tells it.
        dtypes: of each input.
    """

    def __init__(self, model: onnx.ModelProto, open: Callable[[onnx.ModelProto], Session]) -> None:
        self.losses: tuple[Loss, ...] = read_attached(model)
        self.axes = {value.name: axes_of(value) for value in inputs_of(model)}
        self.dtypes = {value.name: _dtype(value) for value in inputs_of(model)}
        self.inputs: Mapping[str, str] = {name: self._told(name) for name in self.axes}
        self.outputs = tuple(value.name for value in model.graph.output)
        self._session = open(model)

    def __repr__(self) -> str:
        return f"<ModelRunner: {', '.join(self.inputs.values())} -> {', '.join(self.outputs)}>"

    def run(self, **arrays: Any) -> dict[str, Array]:
        """Every output of the model, the losses among them.

            load("scored.onnx").run(images=images, boxes_gt=boxes)["loss"]

        Args:
            arrays: one for each input of the model, by its name (`**{"images:0": x}` where that
                is no identifier): numpy arrays (ml_dtypes for bfloat16) or anything with
                `__dlpack__`, of the input's dtype and a shape that fits.

        Raises:
            InvalidInputError: on arrays that don't fit; the message says what would.
            UnsupportedError: in a `__del__` that runs when the interpreter has shut down.
        """
        check_interpreter()
        unknown, missing = ({*a} - {*b} for a, b in ((arrays, self.axes), (self.axes, arrays)))
        if unknown or missing:
            wrong = [f"no input {name!r}" for name in sorted(unknown)]
            wrong += [f"{name} is missing" for name in self.axes if name in missing]
            raise InvalidInputError(
                f"{', '.join(wrong)}; the model takes {', '.join(self.inputs.values())}"
            )
        feeds = {name: as_array(arrays[name], name) for name in self.axes}
        sizes: dict[str, tuple[str, int]] = {}
        for name, array in feeds.items():
            self._check(name, array, sizes)
        return self._session(feeds)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            UnsupportedError: always; it says what to do instead.
        """
        not_picklable()

    def _told(self, name: str) -> str:
        axes, dtype = self.axes[name], self.dtypes[name]
        if axes is None:
            return f"{name}: {dtype}"
        return f"{name}: {dtype}[{','.join('?' if axis is None else str(axis) for axis in axes)}]"

    def _check(self, name: str, array: Array, sizes: dict[str, tuple[str, int]]) -> None:
        """Hold an array against its input, and each named axis against those of other inputs."""
        if array.dtype != self.dtypes[name]:
            raise InvalidInputError(
                f"{name} is {array.dtype}, and the model takes {self.inputs[name]}; convert it: "
                f"{name}.astype({str(self.dtypes[name])!r})"
            )
        axes = self.axes[name]
        if axes is None:
            return
        fits = len(axes) == array.ndim and all(
            not isinstance(axis, int) or axis == size
            for axis, size in zip(axes, array.shape, strict=True)
        )
        if not fits:
            raise InvalidInputError(
                f"{name} has the shape {array.shape}, and the model takes {self.inputs[name]}"
            )
        for axis, size in zip(axes, array.shape, strict=True):
            if isinstance(axis, str):
                other, there = sizes.setdefault(axis, (name, size))
                if there != size:
                    raise InvalidInputError(
                        f"{axis} is {there} in {other} and {size} in {name}, and the model takes "
                        f"{self.inputs[other]} and {self.inputs[name]}"
                    )


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    element = value.type.tensor_type.elem_type
    if element in DTYPE_OF_ELEMENT:
        return NUMPY_DTYPE[DTYPE_OF_ELEMENT[element]]
    if not element or element == TensorProto.STRING:
        raise ArtefactError(
            f"the model's input {value.name!r} is {element_name(element)}, and only tensors of "
            "numbers can be given; run it with ONNX Runtime's own interface"
        )
    return np.dtype(helper.tensor_dtype_to_np_dtype(element))
