"""`ModelRunner`: a whole model, such as one with losses attached, run by its own names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx
from onnx import TensorProto
from onnx.numpy_helper import to_array

from .._dlpack import as_array
from .._floats import Array
from .._model import Loss, Port, element_name, inputs_of, main_tensors, read_attached
from ..errors import ArtefactError, InvalidInputError
from ._runner import check_interpreter, not_picklable

#: A backend's way to run a graph: arrays by the names of its inputs, to every output by its name.
Session = Callable[[dict[str, Array]], dict[str, Array]]


def takes(model: onnx.ModelProto) -> dict[str, Port]:
    """What a caller must give, by name.

    Raises:
        ArtefactError: for an input of anything but numbers.
    """
    for value in inputs_of(model):
        element = value.type.tensor_type.elem_type
        if not element or element == TensorProto.STRING:
            raise ArtefactError(
                f"the model's input {value.name!r} is {element_name(element)}, and only tensors of "
                "numbers can be given; run it with ONNX Runtime's own interface"
            )
    return {value.name: Port.of(value) for value in inputs_of(model)}


def listed(ports: Mapping[str, Port]) -> str:
    """`"images: float32[N,3,8,8], boxes_gt: float32[N,4]"`."""
    return ", ".join(map(str, ports.values()))


def check_names(ports: Mapping[str, Port], given: Iterable[str]) -> None:
    """Refuse names that aren't those of the inputs, and inputs that no name is given for.

    Raises:
        InvalidInputError: naming them, and what the model takes.
    """
    unknown, missing = {*given} - {*ports}, {*ports} - {*given}
    if unknown or missing:
        wrong = [f"no input {name!r}" for name in sorted(unknown)]
        wrong += [f"{name} is missing" for name in ports if name in missing]
        raise InvalidInputError(f"{', '.join(wrong)}; the model takes {listed(ports)}")


def checked(ports: Mapping[str, Port], arrays: Mapping[str, Any]) -> dict[str, Array]:
    """An array for each input, in the order of the inputs.

    Args:
        ports: what the model takes, on this machine or on a server.
        arrays: by name, as `ModelRunner.run` takes them.

    Raises:
        InvalidInputError: on a name, a dtype, a rank, a fixed axis or a repeated axis name that
            doesn't fit.
    """
    check_names(ports, arrays)
    feeds = {name: as_array(arrays[name], name) for name in ports}
    sizes: dict[str, tuple[Port, int]] = {}
    for name, array in feeds.items():
        _check(ports[name], array, sizes)
    return feeds


def _check(port: Port, array: Array, sizes: dict[str, tuple[Port, int]]) -> None:
    """Hold an array against its input, and each named axis against those of other inputs."""
    name = port.name
    if array.dtype.name != port.dtype:
        raise InvalidInputError(
            f"{name} is {array.dtype}, and the model takes {port}; convert it to {port.dtype}"
        )
    if port.axes is None:
        return
    fits = len(port.axes) == array.ndim and all(
        not isinstance(axis, int) or axis == size
        for axis, size in zip(port.axes, array.shape, strict=True)
    )
    if not fits:
        raise InvalidInputError(f"{name} has the shape {array.shape}, and the model takes {port}")
    for axis, size in zip(port.axes, array.shape, strict=True):
        if isinstance(axis, str):
            other, there = sizes.setdefault(axis, (port, size))
            if there != size:
                raise InvalidInputError(
                    f"{axis} is {there} in {other.name} and {size} in {name}, and the model takes "
                    f"{other} and {port}"
                )


def showing(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with what its losses are computed from among its outputs.

    Inputs and constants, which a caller has, are left out.

    Raises:
        ArtefactError: where the metadata tell of a tensor that isn't there.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    there = {value.name for value in (*inputs_of(model), *model.graph.output)}
    there |= {tensor.name for tensor in model.graph.initializer}
    known = main_tensors(model)
    for name in _operands(model):
        if name in there:
            continue
        tensor = known.get(name)
        if tensor is None or not tensor.element:
            raise ArtefactError(f"the metadata tell of a tensor {name!r}, and the model has none")
        value = onnx.helper.make_tensor_value_info(name, tensor.element, tensor.shape)
        copy.graph.output.append(value)
    return copy


def constant_operands(model: onnx.ModelProto) -> dict[str, Array]:
    """What of the losses' operands is constant, by the names of the tensors."""
    names = _operands(model)
    return {t.name: to_array(t) for t in model.graph.initializer if t.name in names}


def _operands(model: onnx.ModelProto) -> dict[str, None]:
    return {name: None for loss in read_attached(model) for name in loss.inputs.values()}


class ModelRunner:
    """A whole model; `run` may be called from many threads at once.

    Attributes:
        losses: what was attached, and by which tensors.
        inputs: what it takes, by name.
        outputs: the names of the outputs, in the order of the graph.
    """

    def __init__(self, model: onnx.ModelProto, open: Callable[[onnx.ModelProto], Session]) -> None:
        self.losses: tuple[Loss, ...] = read_attached(model)
        self.inputs: Mapping[str, Port] = takes(model)
        self.outputs = tuple(value.name for value in model.graph.output)
        self._session = open(model)

    def __repr__(self) -> str:
        return f"<ModelRunner: {listed(self.inputs)} -> {', '.join(self.outputs)}>"

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
        return self._session(checked(self.inputs, arrays))

    __reduce__ = not_picklable
